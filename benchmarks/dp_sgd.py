"""DP-SGD's steps against plain ones: time and memory, and what vectorised gradients would take.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/dp_sgd.py [--preset tiny] [--batch 8] [--out FILE.md]

Ways take turns in one process, a task of four steps each, in shuffled order; memory is that of a
process for each. Clipping alone is DP-SGD with z = 0. The vectorised gradients (torch.func, plain
loss) are clipped and summed as well, and not noised or stepped with.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.models import build_model
from photon.training import PrivateSteps, Schedule, Trainer, plan_compute
from photon.training.device import cores
from trainer import Spread, machine, table

STEPS = 4
WAYS = ("plain", "clipped", "clipped and noised", "vectorised, clipped")


class Text:
    """Random tokens."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length

    def batch(self, start: int, count: int) -> np.ndarray:
        drawn = np.random.default_rng(start)
        return drawn.integers(0, self._vocabulary, (count, self._length + 1))


def steps_of(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """STEPS of each way, over one model and optimizer."""
    torch.set_num_threads(options.threads)
    model = build_model(
        ModelConfig.model_validate({"preset": options.preset}),
        vocab_size=options.vocabulary,
        sequence_length=options.length,
        eos_id=0,
        seed=0,
    )
    plan = plan_compute(ComputeConfig(device="cpu", precision="fp32", threads=options.threads))
    local = LocalConfig.model_validate({"batch_size": options.batch, "optimizer": "adamw"})
    trainer = Trainer(model, local, Schedule("constant", 10**6), plan)
    text: Any = Text(options.vocabulary, options.length)
    clock = iter(range(10**9))

    def step(private: PrivateSteps | None) -> None:
        now = next(clock)
        trainer.fit(text, cursor=now, global_step=now, steps=STEPS, private=private)

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": row[None, :-1], "use_cache": False}
        logits = functional_call(model, parameters, (), inputs).logits[0]
        return functional.cross_entropy(logits.float(), row[1:])

    single = vmap(grad(loss), in_dims=(None, 0), randomness="different")

    def vectorised() -> None:
        for _ in range(STEPS):
            rows = torch.from_numpy(text.batch(next(clock), options.batch))
            found = single({name: one.detach() for name, one in model.named_parameters()}, rows)
            norms = torch.stack([one.flatten(1).norm(dim=1) for one in found.values()]).norm(dim=0)
            shares = (1 / norms).clamp(max=1)
            for one in found.values():
                torch.tensordot(shares, one, 1)

    return dict(
        zip(
            WAYS,
            (
                lambda: step(None),
                lambda: step(PrivateSteps(1.0, 0.0, b"", ())),
                lambda: step(PrivateSteps(1.0, 1.0, bytes(32), ("bench",))),
                vectorised,
            ),
            strict=True,
        )
    )


def timed(options: argparse.Namespace) -> dict[str, list[float]]:
    steps, shuffle = steps_of(options), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 2):
        names = list(steps)
        shuffle.shuffle(names)
        for name in names:
            started = time.perf_counter()
            steps[name]()
            if repeat > 1:  # the first two warm up
                times[name].append((time.perf_counter() - started) / STEPS)
    return times


def held_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def peak_mb(options: argparse.Namespace, way: str) -> float:
    """How far two tasks of a way raise a process of its own, its model and optimizer included."""
    # Every large tensor is then a mapping of its own, gone when it is freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    asked = [*sys.argv[1:], "--measure", way]
    done = subprocess.run(
        [sys.executable, __file__, *asked],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.length, options.vocabulary = "mini", 16, 64
        options.repeats = 2
    warnings.filterwarnings("ignore", message="There is a performance drop")
    if options.measure:
        before = held_mb("VmRSS")
        step = steps_of(options)[options.measure]
        for _ in range(2):
            step()
        print(held_mb("VmHWM") - before)
        return
    times = timed(options)
    rows = [
        (
            name,
            f"{1e3 * statistics.median(taken):.1f}",
            str(Spread.of([one / other for one, other in zip(taken, times["plain"], strict=True)])),
            f"{peak_mb(options, name):.0f}",
        )
        for name, taken in times.items()
    ]
    shape = f"{options.preset}, batch {options.batch} x {options.length}, V {options.vocabulary}"
    head = ("way", "ms a step", "over plain", "MB at the fullest")
    title = f"DP-SGD's steps, {shape}, {options.threads} threads, {machine()}"
    text = f"# {title}\n\n{table(head, rows)}\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
