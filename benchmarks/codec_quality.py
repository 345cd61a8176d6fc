"""What codecs cost: final held-out loss and bytes of a federated run with each, over seeds.

    python benchmarks/codec_quality.py --text FOLDER_OR_FILE [--seeds 3] [--out FILE.md]
    python benchmarks/codec_quality.py --data FOLDER --codec int4 --codec "sparseloco / sparseloco"

A codec is `UP` (updates; states travel in fp32) or `UP / DOWN`. Each run trains a Llama of 0.3 M
parameters (four layers of width 64, vocabulary 1,024: small enough to see several tokens for each
parameter) on four silos from the same weights on the same text in the same order, so a seed's runs
differ by the codec only; the loss is compared seed by seed with the run without one.

Baselines of the bytes: gradients all-reduced in fp32 after every step (4 bytes x parameters, both
ways), and whole models exchanged in bf16 every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from photon.config import parse_run_config
from photon.data import PrepareOptions, prepare
from photon.runs import simulate
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished
from trainer import machine, table

NONE = "fp32"
CODECS = (
    NONE,
    "int8",
    "int4",
    "fp4",
    "sign",
    "topk(density=0.05)+int8+zstd",
    "sparseloco",
    "lowrank(energy=0.9)+int8",
    "powersgd(rank=4)+int8",
    "int4+zstd / int8+zstd",
    "sparseloco / sparseloco",
)


def small_llama(folder: Path) -> Path:
    """A model folder without weights."""
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    shape |= {"vocab_size": 1024, "tie_word_embeddings": False}
    folder.mkdir()
    text = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def run(
    data: Path, model: Path, folder: Path, codec: str, seed: int, options: argparse.Namespace
) -> dict:
    """Summary of one run, with the mean share of updates that was left for later."""
    up, _, down = (part.strip() for part in codec.partition("/"))
    config = parse_run_config(
        {
            "run": {"seed": seed, "keep_checkpoints": 1, "log_every": 1000},
            "model": {"path": str(model)},
            "data": {"path": str(data), "sequence_length": options.sequence_length},
            "federation": {
                "rounds": options.rounds,
                "optimizer_state": "keep",
                "workers": options.workers,
            },
            "local": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "lr": options.lr,
                "warmup_steps": options.steps,
            },
            "link": {
                "update_codec": up,
                "broadcast_codec": down or NONE,
                "feedback_decay": options.decay,
            },
            "eval": {"every": 0, "max_tokens": 60_000, "per_silo": False},
        }
    )
    summary = simulate(config, run_dir=folder).summary
    left = [event.left_out for event in read_history(folder).of(LocalFinished)]
    told = [share for share in left if share is not None]
    parameters = read_history(folder).started.parameters
    tasks = len(left)
    return {
        "loss": summary["global_loss"],
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "left_out": statistics.mean(told) if told else None,
        "all_reduce_bytes": 4 * parameters * 2 * options.steps * tasks,
        "bf16_exchange_bytes": 2 * parameters * 2 * tasks,
    }


def row(codec: str, found: list[dict], plain: list[dict]) -> tuple[str, ...]:
    """A line of the table: means over seeds, and the spread of what depends on them."""
    change = [100 * (a["loss"] / b["loss"] - 1) for a, b in zip(found, plain, strict=True)]
    spread = f" ± {statistics.stdev(change):.2f}" if len(change) > 1 else ""
    first = found[0]
    moved = first["bytes_up"] + first["bytes_down"]
    left = first["left_out"]
    return (
        codec,
        f"{statistics.mean(one['loss'] for one in found):.4f}",
        "" if codec == NONE else f"{statistics.mean(change):+.2f}%{spread}",
        f"{plain[0]['bytes_up'] / first['bytes_up']:.1f}",
        f"{plain[0]['bytes_down'] / first['bytes_down']:.1f}",
        f"{first['bf16_exchange_bytes'] / moved:.1f}",
        f"{first['all_reduce_bytes'] / moved:,.0f}",
        "" if left is None else f"{left:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="folder or file of text, dealt to four silos")
    source.add_argument("--data", type=Path, help="or a prepared folder")
    parser.add_argument("--codec", action="append", help="UP or UP / DOWN; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="tau")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.95, help="of error feedback")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="results so far, to go on from")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps, options.workers = 1, 2, 2, 0
        options.codec = options.codec or ["int8"]
    codecs = [NONE, *[codec for codec in options.codec or CODECS if codec != NONE]]
    recipe = [options.rounds, options.steps, options.batch_size, options.sequence_length]
    recipe += [options.lr, options.decay]
    results: dict[str, dict] = {}
    if options.keep is not None and options.keep.exists():
        results = json.loads(options.keep.read_text(encoding="utf-8"))
    # In memory where that is possible: waiting for a disk teaches nothing here.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        data, model = options.data, small_llama(Path(scratch) / "model")
        if data is None:
            data = Path(scratch) / "data"
            prepare(PrepareOptions(input=options.text, out=data, iid=4, vocab_size=1024))
        for seed in range(options.seeds):
            for number, codec in enumerate(codecs):
                name = json.dumps([codec, seed, *recipe])
                if name not in results:
                    started = time.perf_counter()
                    results[name] = run(
                        data, model, Path(scratch) / f"{seed}-{number}", codec, seed, options
                    )
                    took = time.perf_counter() - started
                    print(f"seed {seed}, {codec}: {results[name]} ({took:.0f} s)", file=sys.stderr)
                    if options.keep is not None:
                        options.keep.write_text(json.dumps(results, indent=1), encoding="utf-8")
    of = {
        codec: [results[json.dumps([codec, seed, *recipe])] for seed in range(options.seeds)]
        for codec in codecs
    }
    head = ("codec, up / down", "loss, nats", "against none", "up, times smaller")
    head += ("down", "than bf16 exchange", "than fp32 all-reduce", "left out")
    rows = [row(codec, found, of[NONE]) for codec, found in of.items()]
    text = (
        f"# Codecs and learning, {machine()}\n\n"
        f"Llama of 0.3 M parameters, four silos, {options.rounds} rounds of tau = {options.steps}, "
        f"{options.batch_size} x {options.sequence_length} tokens a step and silo, AdamW "
        f"{options.lr:g}, kept state, feedback decay {options.decay:g}, {options.seeds} seeds; "
        "mean ± standard deviation over seeds of the change in loss.\n\n"
        f"{table(head, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
