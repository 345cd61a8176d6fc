"""Trainer speed and memory: Photon against a bare PyTorch loop, its peers, and its own workers.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/trainer.py --data DIR [--size 30m] [--out FILE.md]
    OMP_WAIT_POLICY=PASSIVE python benchmarks/trainer.py --data DIR --peers [--size 30m]
    OMP_WAIT_POLICY=PASSIVE python benchmarks/trainer.py --data DIR --memory

Without --peers: (1) the same model on the same batches with the same optimizer, Photon's Trainer
and a bare loop alternating within one process, AdamW and Muon; (2) the same federated rounds
in-process and with two workers. With --peers, instead: Photon, a bare loop, Hugging Face's Trainer
and litgpt's pretraining loop, each in a process of its own, from the same initial weights on the
same windows with the same AdamW; they take turns, so one computes at a time, and their first losses
must agree. The peers' environment is made on first use, in build/peers. --memory is the same with
Photon and the bare loop only, which need no other environment.

Absolute times drift on a shared machine; ratios of alternated runs do not. The variable is what the
`photon` command sets for itself.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peers.contest import (
    BARE,
    HF,
    LEAN,
    LITGPT,
    LITGPT_EAGER,
    PHOTON,
    TWIN,
    Entry,
    Spread,
    Turn,
    contestants,
    peer_versions,
    peers_environment,
    require_same_work,
    speed_ratio,
    take_turns,
)
from peers.photon_loop import make_trainer
from peers.turns import Work
from photon.config import ModelConfig, RunConfig, parse_run_config
from photon.data import open_data, open_stream
from photon.federation.layout import initial_model
from photon.models import training_loss
from photon.models.presets import preset_config
from photon.models.quiet import quiet_transformers
from photon.runs import simulate
from photon.telemetry import read_history
from photon.telemetry.events import RoundFinished
from photon.training import InnerOptimizer
from photon.training.device import cores

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Size:
    """A llama to train, and how many sequences of which length at a time."""

    layers: int
    d_model: int
    heads: int
    width: int
    sequence_length: int
    batch_size: int


SIZES = {
    # Photon's preset of that name.
    "tiny": Size(4, 128, 4, 344, sequence_length=128, batch_size=8),
    "30m": Size(8, 512, 8, 1408, sequence_length=256, batch_size=4),
}


def write_model(size: Size, vocab_size: int, eos_id: int, seed: int, folder: Path) -> None:
    """Initial weights for every contestant, as a Hugging Face folder."""
    # The preset's configuration, stretched, so that the contest trains what `photon train` does.
    tiny = ModelConfig(preset="tiny")
    config = preset_config(tiny, vocab_size, size.sequence_length, eos_id)
    assert isinstance(config, LlamaConfig)
    shape = {
        "hidden_size": size.d_model,
        "intermediate_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.d_model // size.heads,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(config.to_dict() | shape)))
    with quiet_transformers():
        model.save_pretrained(folder)


def run_config(
    options: argparse.Namespace, model: Path, optimizer: str = "adamw", workers: int = 0
) -> RunConfig:
    size = SIZES[options.size]
    return parse_run_config(
        {
            "model": {"path": str(model), "init": "pretrained"},
            "data": {
                "path": options.data,
                "sequence_length": size.sequence_length,
                "verify": False,
            },
            "local": {
                "steps": 2 if options.quick else 20,
                "batch_size": size.batch_size,
                "optimizer": optimizer,
                "lr": 3e-3,
            },
            "compute": {"device": options.device, "precision": options.precision},
            "federation": {
                "rounds": options.rounds,
                "optimizer_state": "keep",
                "workers": workers,
            },
            "eval": {"every": 0, "max_tokens": 2000, "per_silo": False},
        }
    )


def bare_loop(config: RunConfig, model: nn.Module, optimizer: InnerOptimizer, stream, steps: int):
    """What one would write by hand: batch, forward, backward, clip, step."""
    cursor = 0
    batch_size = config.local.batch_size
    device = next(model.parameters()).device
    model.train()
    started = time.perf_counter()
    for _ in range(steps):
        batch = torch.from_numpy(stream.batch(cursor, batch_size)).to(device)
        cursor += batch_size
        with torch.autocast(
            device.type, torch.bfloat16, enabled=config.compute.precision == "bf16"
        ):
            loss, _ = training_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1.0)
        model.zero_grad(set_to_none=True)
    loss.item()  # waits for an accelerator
    return steps * batch_size * config.data.sequence_length / (time.perf_counter() - started)


def compare_trainer(config: RunConfig, steps: int, repeats: int) -> tuple[str, ...]:
    """A row of the table: Photon's Trainer against the bare loop."""
    data = open_data(config.data.path)
    silos = sorted(data.silos)
    trainer = make_trainer(config, initial_model(config, data), steps)
    model = initial_model(config, data).to(trainer.plan.device)
    optimizer = InnerOptimizer(model, config.local)
    ours, bare = [], []
    with open_stream(config, data, silos) as stream:
        trainer.fit(stream, cursor=0, global_step=0, steps=min(steps, 5))
        bare_loop(config, model, optimizer, stream, min(steps, 5))
        for repeat in range(repeats):
            # Who goes first alternates, so that a drift of the machine favours neither.
            for who in ("bare", "ours") if repeat % 2 else ("ours", "bare"):
                if who == "bare":
                    bare.append(bare_loop(config, model, optimizer, stream, steps))
                else:
                    result = trainer.fit(stream, cursor=0, global_step=0, steps=steps)
                    ours.append(result.tokens / result.train_s)
    ratio = Spread.of([mine / other for mine, other in zip(ours, bare, strict=True)])
    return (
        f"{config.local.optimizer}, tokens/s",
        f"{statistics.median(ours):,.0f}",
        f"bare loop {statistics.median(bare):,.0f}",
        str(ratio),
    )


def compare_workers(options: argparse.Namespace, model: Path) -> Rows:
    """Two rows: rounds in-process over rounds with two workers, same rounds, alternating."""
    seconds: dict[int, list[float]] = {0: [], 2: []}
    walls: dict[int, list[float]] = {0: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.worker_repeats):
            for workers in seconds:
                folder = Path(scratch) / f"{workers}-{repeat}"
                result = simulate(run_config(options, model, "muon", workers), run_dir=folder)
                rounds = read_history(folder).of(RoundFinished)
                # The first round holds the workers' start-up.
                seconds[workers].append(statistics.median(r.round_s for r in rounds[1:]))
                walls[workers].append(result.summary["wall_s"])
    rows: Rows = []
    for what, taken in (
        ("a Muon round, s", seconds),
        (f"a run of {options.rounds} rounds with the workers' start-up, s", walls),
    ):
        ratio = Spread.of([alone / both for alone, both in zip(taken[0], taken[2], strict=True)])
        alone, both = statistics.median(taken[0]), statistics.median(taken[2])
        rows.append((what, f"two workers {both:.1f}", f"in-process {alone:.1f}", str(ratio)))
    return rows


def compare_peers(options: argparse.Namespace, model: Path, scratch: Path) -> str:
    """The contest with other training loops, as Markdown."""
    work = make_work(options, model, scratch)
    entries = [PHOTON, BARE] if options.quick else [PHOTON, BARE, TWIN, LEAN]
    if options.peers:
        entries += [HF, LITGPT]
        if work.compile is None and work.device == "cpu":
            entries.append(LITGPT_EAGER)
    python = peers_environment(options.peers_torch) if options.peers else None
    with contestants(entries, work, scratch / "contest", python) as group:
        turns = take_turns(
            group,
            warmup=options.warmup,
            steps=options.steps,
            rounds=options.repeats,
            seed=options.seed,
        )
        reports = {contestant.entry.name: contestant.report() for contestant in group}
    # bf16 rounds the logits, in another order where a model is compiled.
    require_same_work(reports, tolerance=1e-2 if work.precision == "bf16" else 1e-4)
    tokens = options.steps * work.batch_size * work.sequence_length
    head = (
        "who",
        "tokens/s",
        "Photon's speed over it",
        "by CPU time",
        "peak MiB",
        "of it imports MiB",
    )
    losses = ("first loss", f"loss after {work.total_steps} steps")
    rows = [peer_row(entry, turns, reports[entry.name], tokens) for entry in entries]
    count = reports[BARE.name]["parameters"]
    mine, bare = reports[PHOTON.name]["peak_bytes"], reports[BARE.name]["peak_bytes"]
    return "\n".join(
        [
            f"{count / 1e6:.2f} M parameters, sequence {work.sequence_length}, batch "
            f"{work.batch_size}, {work.precision}, AdamW, {work.threads} threads, "
            f"{options.repeats} shuffled rounds of turns of {options.steps} steps. Ratios: median "
            "(quartiles), by the clock and by the CPU time of all threads, which neighbours on the "
            "machine disturb less." + (f" Peers: {peer_versions()}." if options.peers else ""),
            "",
            table((*head, *losses), rows),
            "",
            f"Memory, Photon over the bare loop with the same imports: {mine / bare:.3f}. Imports: "
            + "; ".join(f"{name}: {report['imports']}" for name, report in reports.items())
            + ".",
        ]
    )


def make_work(options: argparse.Namespace, model: Path, scratch: Path) -> Work:
    """What all contestants train; writes the windows that Photon's stream will give."""
    size = SIZES[options.size]
    steps = options.warmup + options.steps * options.repeats
    config = run_config(options, model)
    data = open_data(config.data.path)
    with open_stream(config, data, sorted(data.silos)) as stream:
        # One batch more than anyone trains on: loaders read ahead.
        windows = stream.batch(0, (steps + 1) * size.batch_size)
    np.save(scratch / "windows.npy", windows.astype(np.int32))
    return Work(
        data=options.data,
        windows=str(scratch / "windows.npy"),
        model=str(model),
        sequence_length=size.sequence_length,
        batch_size=size.batch_size,
        lr=1e-3,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        threads=options.threads,
        device=options.device,
        precision=options.precision,
        compile={"as-shipped": None, "on": True, "off": False}[options.compile],
        total_steps=steps,
        scratch=str(scratch),
        seed=options.seed,
    )


def peer_row(
    entry: Entry, turns: dict[str, list[Turn]], report: dict[str, Any], tokens: int
) -> tuple[str, ...]:
    timed = entry.name in turns
    ratios = [
        ""
        if entry is PHOTON or not timed
        else str(speed_ratio(turns, PHOTON.name, entry.name, key))
        for key in Turn._fields
    ]
    median = statistics.median(turn.seconds for turn in turns[entry.name]) if timed else 0.0
    return (
        entry.name,
        f"{tokens / median:,.0f}" if timed else "",
        *ratios,
        f"{report['peak_bytes'] / 2**20:,.0f}",
        f"{report['imports_bytes'] / 2**20:,.0f}",
        f"{report['first_loss']:.4f}",
        # One that takes no turns has only warmed up.
        f"{report['last_loss']:.4f}" if timed else "",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Hardware, date and versions, as every result needs them."""
    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = [
            line for line in cpu.read_text(encoding="utf-8").splitlines() if "model name" in line
        ]
        model = names[0].partition(":")[2].strip() if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores {model}{gpu}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, load {load} at the end."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder made by `photon data prepare`")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of one turn")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each")
    parser.add_argument("--worker-repeats", type=int, default=3, help="0 leaves workers out")
    parser.add_argument("--rounds", type=int, default=6, help="federated, for the workers")
    parser.add_argument("--peers", action="store_true", help="compare with other training loops")
    parser.add_argument(
        "--memory", action="store_true", help="Photon and the bare loop as processes, no peers"
    )
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps of each peer")
    parser.add_argument(
        "--compile",
        choices=("as-shipped", "on", "off"),
        default="as-shipped",
        help="torch.compile for the peers: as each one does by itself, for all, for none",
    )
    parser.add_argument(
        "--peers-torch",
        default=f"torch=={torch.__version__.partition('+')[0]}",
        help="what pip installs into build/peers, index options included",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    options.data = str(Path(options.data).resolve())
    if options.quick:
        options.steps, options.repeats, options.warmup = 2, 2, 2
        options.worker_repeats, options.rounds = 0, 2
    return options


def main() -> None:
    options = parse_arguments()
    data = open_data(options.data)
    with tempfile.TemporaryDirectory() as folder:
        scratch, model = Path(folder), Path(folder) / "model"
        write_model(SIZES[options.size], data.vocab_size, data.eos_id, options.seed, model)
        if options.peers or options.memory:
            body = compare_peers(options, model, scratch)
        else:
            rows = [
                compare_trainer(
                    run_config(options, model, optimizer), options.steps, options.repeats
                )
                for optimizer in ("adamw", "muon")
            ]
            rows += compare_workers(options, model) if options.worker_repeats else []
            body = table(("what", "Photon", "against", "ratio: median (quartiles)"), rows)
    text = "\n".join(
        [
            f"# Trainer, size {options.size}, {machine()}",
            "",
            f"    python benchmarks/trainer.py {' '.join(shown_arguments())}",
            "",
            body,
        ]
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


def shown_arguments() -> list[str]:
    """The command line without this machine's folders."""
    given = sys.argv[1:]
    hidden = {"--data": "DIR", "--out": "FILE"}
    return [hidden.get(given[i - 1], word) if i else word for i, word in enumerate(given)]


if __name__ == "__main__":
    main()
