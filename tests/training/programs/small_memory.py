"""Trains two steps within a limit on memory; prints what became of the micro-batch."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.errors import DoesNotFitError
from photon.models import build_model
from photon.training import MicroBatch, Schedule, Trainer, plan_compute

LENGTH = 256


class Text:
    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None]
        return (rows * 7 + np.arange(LENGTH + 1)[None, :]) % 2000


def held_bytes(name: str) -> int:
    """A line of /proc/self/status: VmData is what RLIMIT_DATA counts, VmRSS what is in use."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def main() -> None:
    options = json.loads(sys.argv[1])
    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=2000, sequence_length=LENGTH, eos_id=0, seed=3
    )
    plan = plan_compute(ComputeConfig(device="cpu", precision="fp32", threads=1))
    memo = Path(options["memo"]) if "memo" in options else None
    trainer = Trainer(
        model,
        LocalConfig(batch_size=64, lr=1e-3),
        Schedule("constant", 10),
        plan,
        log_every=1,
        micro_batch=MicroBatch(64, memo=memo, key="test"),
    )
    # One sequence first, so that threads, kernels and optimizer state are there already.
    if "limit_bytes" not in options or options["limit_bytes"] > 64 << 20:
        small = Trainer(model, LocalConfig(batch_size=1, lr=0.0001), Schedule("constant", 9), plan)
        small.fit(Text(), cursor=10**6, global_step=0, steps=1)
    before_rss = held_bytes("VmRSS")
    if "limit_bytes" in options:
        limit = held_bytes("VmData") + options["limit_bytes"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    losses: list[float] = []
    notices: list[str] = []

    try:
        result = trainer.fit(
            Text(),
            cursor=0,
            global_step=0,
            steps=2,
            on_progress=lambda told: losses.append(told.loss),
            on_notice=notices.append,
        )
    except DoesNotFitError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return
    print(
        json.dumps(
            {
                "micro_batch_size": result.micro_batch_size,
                "losses": losses,
                "notices": notices,
                "needs_bytes": result.peak_memory_bytes - before_rss,
            }
        )
    )


if __name__ == "__main__":
    main()
