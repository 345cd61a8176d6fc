"""Trains a tiny model case by case on this process's ranks; prints losses and sums of each."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from photon.config import ComputeConfig, LocalConfig
from photon.training import PrivateSteps, Schedule, Trainer, plan_compute
from photon.training.ranks import Ranks, Seat
from photon.training.strategy import choose_strategy
from photon.training.trainer import Progress


class Text:
    """The same learnable text on every rank, cut into documents."""

    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None]
        return (rows * 7 + np.arange(17)[None, :] * (1 + rows % 3)) % 61

    def document_ids(self, start: int, count: int) -> np.ndarray:
        cut = 3 + np.arange(start, start + count)[:, None] % 9
        return (np.arange(17)[None, :] >= cut).astype(np.int32)


def small_model() -> torch.nn.Module:
    """Two blocks whose rows four ranks can't share evenly; the same weights on every rank."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=90,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def train(case: dict[str, Any], seat: Seat, ranks: Ranks) -> dict[str, Any]:
    plan = plan_compute(
        ComputeConfig(device="cpu", precision="fp32", threads=1, **case.get("compute", {})),
        seat=seat,
    )
    # One launch serves one machine and, for hybrid, two that are imagined.
    seat = replace(seat, local_world_size=seat.world_size // case["machines"])
    placed = Ranks(seat, ranks.group, ranks.checkpoints)
    strategy = choose_strategy(case["strategy"], seat, state_bytes=1, device_bytes=100)
    trainer = Trainer(
        small_model(),
        LocalConfig(**{"batch_size": 8, "lr": 3e-3, **case["local"]}),
        Schedule("cosine", 40, 4),
        plan,
        log_every=1,
        placement=(placed, strategy),
    )
    losses: list[float] = []
    norms: list[float] = []

    def note(told: Progress) -> None:
        losses.append(told.loss)
        norms.append(told.gradient_norm)

    private = dict(case.get("private", {}))
    if private:
        private = PrivateSteps(**private | {"secret": private["secret"].encode()})
    result = trainer.fit(
        Text(),
        cursor=0,
        global_step=0,
        steps=case["steps"],
        on_progress=note,
        profile=case.get("profile", False),
        private=private or None,
    )
    state = trainer.optimizer.state_tensors()
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: float(w.double().norm()) for name, w in trainer.whole(trainer.weights())},
        "state": {name: float(t.double().norm()) for name, t in trainer.whole(state)},
        "tokens": result.tokens,
        "cursor": result.cursor,
        "communication_s": result.communication_s,
        "held": sum(
            weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel()
            for weight in trainer.weights().values()
        ),
    }


def main() -> None:
    cases = json.loads(sys.argv[1])
    seat = Seat.from_environment()
    ranks = Ranks.join(seat, torch.device("cpu"), collective_s=60)
    print(json.dumps([train(case, seat, ranks) for case in cases]))
    ranks.close()


if __name__ == "__main__":
    main()
