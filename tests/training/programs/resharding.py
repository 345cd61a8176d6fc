"""Trains, keeps a snapshot half-way, or goes on from one; prints losses and the numbers kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from photon.config import ComputeConfig, LocalConfig, ModelConfig
from photon.models import build_model, build_skeleton
from photon.training import (
    Ranks,
    Schedule,
    Seat,
    Trainer,
    plan_compute,
    read_snapshot,
    write_snapshot,
)
from photon.training.strategy import choose_strategy

SHAPE = {"vocab_size": 61, "sequence_length": 16, "eos_id": 0}


class Text:
    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None]
        return (rows * 7 + np.arange(17)[None, :] * (1 + rows % 3)) % 61


def main() -> None:
    options = json.loads(sys.argv[1])
    seat = Seat.from_environment()
    plan = plan_compute(ComputeConfig(device="cpu", precision="fp32", threads=1), seat=seat)
    ranks = Ranks.join(seat, plan.device, collective_s=60)
    strategy = choose_strategy(options["strategy"], seat, state_bytes=1, device_bytes=100)
    folder = Path(options["folder"])
    preset = ModelConfig(preset="tiny")
    # Who goes on has no weights but those of the snapshot.
    fresh = options["from"] == 0
    model = build_model(preset, seed=3, **SHAPE) if fresh else build_skeleton(preset, **SHAPE)
    trainer = Trainer(
        model,
        LocalConfig(batch_size=8, optimizer=options["optimizer"], lr=5e-3),
        Schedule("cosine", 40, 4),
        plan,
        log_every=1,
        placement=(ranks, strategy),
    )
    cursor = options["from"] * 8
    if not fresh:
        kept = read_snapshot(folder, allocate_for(trainer), ranks)
        groups: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimizer": {}}
        for name, tensor in kept.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        with torch.no_grad():
            for name, weight in trainer.weights().items():
                weight.copy_(groups["weights"][name])
        trainer.optimizer.load_state_tensors(groups["optimizer"])
        residual = dict(trainer.whole(groups["residual"]))
        assert all(float(t.min()) == float(t.max()) == 0.25 for t in residual.values())
    losses: list[float] = []
    pending = None
    for step in range(options["from"], options["to"]):
        result = trainer.fit(
            Text(),
            cursor=cursor,
            global_step=step,
            steps=1,
            on_progress=lambda told: losses.append(told.loss),
        )
        cursor = result.cursor
        if step + 1 == options.get("keep_after"):
            weights = trainer.weights()
            tensors = {f"weights/{name}": weight for name, weight in weights.items()}
            for name, tensor in trainer.optimizer.state_tensors().items():
                tensors[f"optimizer/{name}"] = tensor
            for name, weight in weights.items():
                tensors[f"residual/{name}"] = torch.full_like(weight, 0.25)
            # Training goes on while it is written; what is written must not see that.
            pending = write_snapshot(folder, tensors, ranks)
    if pending is not None:
        pending.finish()
    print(json.dumps({"losses": losses, "cursor": cursor}))
    ranks.close()


def allocate_for(trainer: Trainer):
    def allocate(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        parameter = name.partition("/")[2]
        if parameter not in trainer.placed.parameters:
            parameter = parameter.rpartition(".")[0]
        return trainer.placed.empty(parameter, shape, dtype)

    return allocate


if __name__ == "__main__":
    main()
