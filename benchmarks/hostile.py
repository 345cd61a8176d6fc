"""What one hostile silo of four costs, for the mean and for each robust rule, over seeds.

    python benchmarks/hostile.py --text FOLDER_OR_FILE [--seeds 3] [--out FILE.md]
    python benchmarks/hostile.py --data FOLDER --rule median --attack invert

Four silos train a small Llama on parts of one text that are alike; the last of them sends something
else than it learned, in every round:

- `invert`: minus its update. Same norm, same spread, nothing a norm could tell.
- `invert-large`: minus its update, as large as the default bound of that round lets through
  (federation.max_update_norm = "auto").
- `noise`: random values of its update's norm.

The loss is compared, seed by seed, with that of the three honest silos training without the fourth
under the plain mean: what the run would have been had the member never joined. So a row of 0% means
that the attack cost nothing but the member. `none` has the fourth silo honest.

Rules that need a number get one here: clipped_mean clips to the median norm of an honest run's
updates; trimmed_mean drops one of four at each end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from codec_quality import small_llama
from photon.config import RunConfig, parse_run_config
from photon.data import PrepareOptions, prepare
from photon.engines.local import LocalEngine
from photon.federation import Answer, Task, Update, Version
from photon.federation import server as federated_server
from photon.federation.norm_bound import NormBound
from photon.runs import nodes, simulate
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished, UpdateDropped
from trainer import machine, table

SILOS = 4
RULES = ("mean", "clipped_mean", "median", "trimmed_mean", "edit")
ATTACKS = ("none", "invert", "invert-large", "noise")

Named = Iterable[tuple[str, Tensor]]


class Infiltrated(LocalEngine):
    """The in-process engine, whose last silo sends what an attack makes of its update.

    Attributes:
        attack: one of ATTACKS; "absent": it sends nothing.
        bound: of the round, as the product has it.
    """

    attack = "none"
    bound = NormBound()

    def submit(self, task: Task, version: Version) -> None:
        self.last = task
        super().submit(task, version)

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        return [
            (task, self._spoiled(answer))
            if task is self.last and isinstance(answer, Update)
            else (task, answer)
            for task, answer in super().arrivals(timeout_s)
        ]

    def _spoiled(self, update: Update) -> Update:
        if self.attack == "none":
            return update
        if self.attack == "absent":
            gone = dataclasses.replace(update.receipt, failure="not here", bytes_up=0)
            return Update.none(gone)
        norm = norm_of(update.tensors())
        if self.attack == "noise":
            sent = {name: torch.randn(tensor.shape) for name, tensor in update.tensors()}
            scale = norm / norm_of(sent.items())
        else:
            sent = {name: tensor.clone() for name, tensor in update.tensors()}
            scale = -1.0 if self.attack == "invert" else -0.999 * self.bound.norm / norm
        sent = {name: tensor * scale for name, tensor in sent.items()}
        return dataclasses.replace(update, tensors=lambda: iter(sent.items()), packed=None)


def norm_of(tensors: Named) -> float:
    return sum(float(tensor.norm()) ** 2 for _, tensor in tensors) ** 0.5


@contextlib.contextmanager
def infiltrated(attack: str) -> Iterator[None]:
    """Simulations meanwhile have such an engine."""
    engine = type("Engine", (Infiltrated,), {"attack": attack})
    asked = federated_server.norm_bound

    def noted(*args) -> NormBound:
        engine.bound = asked(*args)
        return engine.bound

    with (
        mock.patch.object(federated_server, "norm_bound", noted),
        mock.patch.object(nodes, "LocalEngine", engine),
    ):
        yield


def run(config: RunConfig, folder: Path, attack: str) -> dict:
    """Final loss, updates refused, and the median norm of those sent."""
    with infiltrated(attack):
        summary = simulate(config, run_dir=folder).summary
    history = read_history(folder)
    return {
        "loss": summary["global_loss"],
        "refused": len(history.of(UpdateDropped)),
        "norm": statistics.median(one.update_norm for one in history.of(LocalFinished)),
    }


def config_of(
    options: argparse.Namespace, data: Path, model: Path, seed: int, **federation
) -> RunConfig:
    tree = {
        "run": {"seed": seed, "keep_checkpoints": 1, "log_every": 1000},
        "model": {"path": str(model)},
        "data": {"path": str(data), "sequence_length": options.sequence_length},
        "federation": {"rounds": options.rounds, "optimizer_state": "keep", **federation},
        "local": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "lr": options.lr,
            "warmup_steps": options.steps,
        },
        "compute": {"threads": options.threads},
        "eval": {"every": 0, "max_tokens": 60_000, "per_silo": False},
    }
    return parse_run_config(tree)


def measure(options: argparse.Namespace, data: Path, model: Path, scratch: Path) -> list[list[str]]:
    """A row for each rule: for each attack the change in loss, and what was refused."""
    changes: dict[tuple[str, str], list[float]] = {}
    refused: dict[tuple[str, str], int] = {}
    for seed in range(options.seeds):
        base = run(config_of(options, data, model, seed), scratch / f"{seed}", "absent")
        print(f"seed {seed}, without the fourth: {base}", file=sys.stderr)
        for rule in options.rule or RULES:
            extra = {"merging_rule": rule}
            extra |= {"clip_update_norm": base["norm"]} if rule == "clipped_mean" else {}
            extra |= {"trim": 0.25} if rule == "trimmed_mean" else {}
            config = config_of(options, data, model, seed, **extra)
            for attack in options.attack or ATTACKS:
                started, folder = time.perf_counter(), scratch / f"{seed}-{rule}-{attack}"
                found = run(config, folder, attack)
                took_s = time.perf_counter() - started
                print(f"seed {seed}, {rule}, {attack}: {found} ({took_s:.0f} s)", file=sys.stderr)
                change = 100 * (found["loss"] / base["loss"] - 1)
                changes.setdefault((rule, attack), []).append(change)
                refused[rule, attack] = refused.get((rule, attack), 0) + found["refused"]
    return [
        [rule]
        + [
            words(changes[rule, attack], refused[rule, attack])
            for attack in options.attack or ATTACKS
        ]
        for rule in options.rule or RULES
    ]


def words(changes: list[float], refused: int) -> str:
    spread = f" ± {statistics.stdev(changes):.1f}" if len(changes) > 1 else ""
    return f"{statistics.mean(changes):+.1f}%{spread}" + (f", {refused} refused" if refused else "")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="folder or file of text, dealt to four silos")
    source.add_argument("--data", type=Path, help="or a prepared folder of four silos")
    parser.add_argument("--rule", action="append", choices=RULES, help="all by default")
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="tau")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024, help="that of --data, if given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps = 1, 2, 2
        options.rule, options.attack = ["mean"], ["invert-large"]
    return options


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = small_llama(scratch / "model", options.width, options.layers, options.vocabulary)
        data = options.data
        if data is None:
            data = scratch / "data"
            vocabulary = options.vocabulary
            prepare(PrepareOptions(input=options.text, out=data, iid=SILOS, vocab_size=vocabulary))
        rows = measure(options, data, model, scratch)
    text = (
        f"# One hostile silo of four, {machine()}\n\n"
        f"Llama of {options.layers} layers of width {options.width}, {options.rounds} rounds of "
        f"tau = {options.steps}, {options.batch_size} x {options.sequence_length} tokens a step "
        f"and silo, AdamW {options.lr:g}, kept state, {options.seeds} seeds. Change in held-out "
        "loss against the three honest silos alone, plain mean; mean ± standard deviation over "
        f"seeds.\n\n{table(['rule', *(options.attack or ATTACKS)], rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
