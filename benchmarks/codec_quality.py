"""What codecs cost: final held-out loss and bytes of a federated run with each, over seeds.

    python benchmarks/codec_quality.py --text FOLDER_OR_FILE [--seeds 3] [--out FILE.md]
    python benchmarks/codec_quality.py --data FOLDER --codec int4 --codec "sparseloco @ 2"

A codec is `UP` (updates; states travel in fp32) or `UP / DOWN`, and may end in `@ LR`, the outer
learning rate, which is 1 otherwise. What a sparse codec sends of a silo's update is a fraction of
it, so the rate that suits it is larger; `fp32 @ 2` shows what the same rate does without a codec.
`all-reduce` is no codec but one model on all four silos' text, with steps of the four silos'
batches: what gradients all-reduced after every step would compute.

Each run trains a small Llama (by default 0.3 M parameters: four layers of width 64, vocabulary
1,024: small enough to see several tokens for each) on four silos from the same weights on the same
text in the same order, so a seed's runs differ by the codec only; the loss is compared seed by seed
with the run without one, outer learning rate 1.

Baselines of the bytes: gradients all-reduced in fp32 after every step (4 bytes x parameters, both
ways), and whole models exchanged in bf16 every round. Small models' manifests weigh as much as what
a codec leaves of them; the ratio without them is that of larger models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from photon.compression import build_codec
from photon.compression.codec import bytes_of
from photon.config import parse_run_config
from photon.data import PrepareOptions, prepare
from photon.runs import simulate, train
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished
from trainer import machine, table

NONE = "fp32"
#: Instead of a codec: training that is not federated.
ALL_REDUCE = "all-reduce"
SILOS = 4
CODECS = (
    "int8",
    "int4",
    "fp4",
    "sign",
    "topk(density=0.05)+int8+zstd",
    "sparseloco",
    "sparseloco @ 2",
    "lowrank(energy=0.9)+int8",
    "powersgd(rank=4)+int8",
    "int4+zstd / int8+zstd",
    "sparseloco / sparseloco",
)
_HEAD = (
    "codec, up / down @ outer learning rate",
    "loss, nats",
    "against none",
    "up, times smaller",
    "without manifests",
    "down",
    "both, than bf16 exchange",
    "both, than fp32 all-reduce",
    "up, than half of it",
    "left out",
)


@dataclass(frozen=True)
class Case:
    """What a run is made with: codecs up and down, and the outer learning rate.

    `up` may be ALL_REDUCE.
    """

    up: str
    down: str
    outer_lr: float

    @classmethod
    def parse(cls, text: str) -> Case:
        """Of `UP`, `UP / DOWN`, each with or without `@ LR`."""
        codecs, _, rate = text.partition("@")
        up, _, down = (part.strip() for part in codecs.partition("/"))
        return cls(up, down or NONE, float(rate or 1.0))

    def __str__(self) -> str:
        down = "" if self.down == NONE else f" / {self.down}"
        return f"{self.up}{down}" + ("" if self.outer_lr == 1 else f" @ {self.outer_lr:g}")


PLAIN = Case(NONE, NONE, 1.0)


def small_llama(folder: Path, width: int, layers: int, vocabulary: int) -> Path:
    """A model folder without weights."""
    shape = {"hidden_size": width, "intermediate_size": width * 11 // 4}
    shape |= {"num_hidden_layers": layers, "max_position_embeddings": 256}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    shape |= {"vocab_size": vocabulary, "tie_word_embeddings": False}
    folder.mkdir()
    text = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def shapes_of(model: Path) -> list[torch.Size]:
    """Of all parameters."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return [parameter.shape for parameter in made.parameters()]


def ratio_without_manifests(codec: str, shapes: list[torch.Size]) -> float | None:
    """fp32 bytes over encoded ones; None where these depend on the values, or there are none."""
    if codec == ALL_REDUCE or "zstd" in codec or "lowrank" in codec:
        return None
    made = build_codec(codec)
    encoded = sum(bytes_of(made.encode(torch.randn(shape))) for shape in shapes)
    return sum(4 * shape.numel() for shape in shapes) / encoded


def run(
    data: Path, model: Path, folder: Path, case: Case, seed: int, options: argparse.Namespace
) -> dict:
    """Summary of one run, with the mean share of updates that was left for later."""
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
                "warmup_steps": max(options.steps, options.warmup_steps),
            },
            "compute": {"threads": options.threads},
            "outer": {"lr": case.outer_lr},
            "link": {
                "update_codec": NONE if case.up == ALL_REDUCE else case.up,
                "broadcast_codec": case.down,
                "feedback_decay": options.decay,
            },
            "eval": {"every": 0, "max_tokens": options.eval_tokens, "per_silo": False},
        }
    )
    start = train if case.up == ALL_REDUCE else simulate
    summary = start(config, run_dir=folder).summary
    history = read_history(folder)
    left = [event.left_out for event in history.of(LocalFinished)]
    told = [share for share in left if share is not None]
    updates = options.rounds * SILOS
    moved = {name: summary[name] for name in ("bytes_up", "bytes_down")}
    each_way = 4 * history.started.parameters * options.steps * updates
    return {
        "loss": summary["global_loss"],
        **(dict.fromkeys(moved, each_way) if case.up == ALL_REDUCE else moved),
        "left_out": statistics.mean(told) if told else None,
        "all_reduce_bytes": 2 * each_way,
        "bf16_exchange_bytes": 2 * history.started.parameters * 2 * updates,
    }


def row(
    case: Case, found: list[dict], plain: list[dict], without_manifests: float | None
) -> tuple[str, ...]:
    """A line of the table: means over seeds, and the spread of what depends on them."""
    change = [100 * (a["loss"] / b["loss"] - 1) for a, b in zip(found, plain, strict=True)]
    spread = f" ± {statistics.stdev(change):.2f}" if len(change) > 1 else ""
    first = found[0]
    moved = first["bytes_up"] + first["bytes_down"]
    left = first["left_out"]

    def times(way: str) -> str:
        ratio = plain[0][way] / first[way]
        return f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.1g}"

    return (
        str(case),
        f"{statistics.mean(one['loss'] for one in found):.4f}",
        "" if case == PLAIN else f"{statistics.mean(change):+.2f}%{spread}",
        times("bytes_up"),
        "" if without_manifests is None else f"{without_manifests:.1f}",
        times("bytes_down"),
        f"{first['bf16_exchange_bytes'] / moved:.1f}",
        f"{first['all_reduce_bytes'] / moved:,.0f}",
        f"{first['all_reduce_bytes'] / 2 / first['bytes_up']:,.0f}",
        "" if left is None else f"{left:.2f}",
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="folder or file of text, dealt to four silos")
    source.add_argument("--data", type=Path, help="or a prepared folder")
    parser.add_argument(
        "--codec", action="append", help="UP or UP / DOWN, then @ LR or not; all by default"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="tau")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=0, help="at least a round's")
    parser.add_argument("--decay", type=float, default=0.95, help="of error feedback")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024, help="that of --data, if given")
    parser.add_argument("--eval-tokens", type=int, default=60_000, help="held-out, at the end")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--keep", type=Path, help="results so far, to go on from")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps, options.workers = 1, 2, 2, 0
        options.codec = options.codec or ["int8"]
    return options


def measure(
    cases: list[Case], model: Path, scratch: Path, options: argparse.Namespace
) -> dict[Case, list[dict]]:
    """Summaries by seed of each case, those that options.keep holds already not run again."""
    recipe = [options.rounds, options.steps, options.batch_size, options.sequence_length]
    recipe += [options.lr, options.warmup_steps, options.decay, options.width, options.layers]
    results: dict[str, dict] = {}
    if options.keep is not None and options.keep.exists():
        results = json.loads(options.keep.read_text(encoding="utf-8"))
    data = options.data
    if data is None:
        data = scratch / "data"
        vocabulary = options.vocabulary
        prepare(PrepareOptions(input=options.text, out=data, iid=SILOS, vocab_size=vocabulary))
    found: dict[Case, list[dict]] = {case: [] for case in cases}
    for seed in range(options.seeds):
        for number, case in enumerate(cases):
            name = json.dumps([str(case), seed, *recipe])
            if name not in results:
                started = time.perf_counter()
                folder = scratch / f"{seed}-{number}"
                results[name] = run(data, model, folder, case, seed, options)
                took = time.perf_counter() - started
                print(f"seed {seed}, {case}: {results[name]} ({took:.0f} s)", file=sys.stderr)
                if options.keep is not None:
                    options.keep.write_text(json.dumps(results, indent=1), encoding="utf-8")
            found[case].append(results[name])
    return found


def main() -> None:
    options = arguments()
    cases = list(dict.fromkeys([PLAIN, *map(Case.parse, options.codec or CODECS)]))
    # In memory where that is possible: waiting for a disk teaches nothing here.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        scratch = Path(folder)
        model = small_llama(scratch / "model", options.width, options.layers, options.vocabulary)
        shapes = shapes_of(model)
        found = measure(cases, model, scratch, options)
    parameters = sum(shape.numel() for shape in shapes)
    rows = [
        row(case, of, found[PLAIN], ratio_without_manifests(case.up, shapes))
        for case, of in found.items()
    ]
    text = (
        f"# Codecs and learning, {machine()}\n\n"
        f"Llama of {parameters / 1e6:.2f} M parameters ({options.layers} layers of width "
        f"{options.width}), four silos, {options.rounds} rounds of tau = {options.steps}, "
        f"{options.batch_size} x {options.sequence_length} tokens a step and silo, AdamW "
        f"{options.lr:g}, kept state, feedback decay {options.decay:g}, plain averages at outer "
        f"learning rate 1 unless said, {options.seeds} seeds; mean ± standard deviation over seeds "
        f"of the change in loss.\n\n{table(_HEAD, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
