"""Trainer speed: `photon train`'s loop against a bare PyTorch loop, and two workers against one.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/trainer.py --data DIR [--steps 10] [--repeats 15]

Part 1 trains the same model on the same batches with the same optimizer, Photon's Trainer and a
bare loop alternating within one process; the ratio of tokens/s is the figure. Part 2 runs the same
federated rounds in-process and with two workers (start-up of the workers included and excluded).
Absolute times drift on a shared machine; ratios of alternated runs do not. The variable is what the
`photon` command sets for itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from photon.config import RunConfig, parse_run_config
from photon.data import open_data
from photon.federation.node import initial_model, open_stream
from photon.models import next_token_loss
from photon.runs import simulate
from photon.telemetry import read_history
from photon.telemetry.events import RoundFinished
from photon.training import InnerOptimizer, Schedule, Trainer, plan_compute


def bare_loop(config: RunConfig, model: nn.Module, optimizer: InnerOptimizer, stream, steps: int):
    """What one would write by hand: batch, forward, backward, clip, step."""
    cursor = 0
    batch_size = config.local.batch_size
    model.train()
    started = time.perf_counter()
    for _ in range(steps):
        batch = torch.from_numpy(stream.batch(cursor, batch_size))
        cursor += batch_size
        loss = next_token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1.0)
        model.zero_grad(set_to_none=True)
    return steps * batch_size * config.data.sequence_length / (time.perf_counter() - started)


def compare_trainer(config: RunConfig, steps: int, repeats: int) -> dict:
    data = open_data(config.data.path)
    silos = sorted(data.silos)
    plan = plan_compute(config.run)
    trainer = Trainer(initial_model(config, data), config.local, Schedule("constant", steps), plan)
    model = initial_model(config, data)
    optimizer = InnerOptimizer(model, config.local)
    ours, bare = [], []
    with open_stream(config, data, silos) as stream:
        trainer.fit(stream, cursor=0, global_step=0, steps=5)
        bare_loop(config, model, optimizer, stream, 5)
        for repeat in range(repeats):
            # Who goes first alternates, so that a drift of the machine favours neither.
            for who in ("bare", "ours") if repeat % 2 else ("ours", "bare"):
                if who == "bare":
                    bare.append(bare_loop(config, model, optimizer, stream, steps))
                else:
                    result = trainer.fit(stream, cursor=0, global_step=0, steps=steps)
                    ours.append(result.tokens / result.train_s)
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    return {
        "optimizer": config.local.optimizer,
        "photon_tokens_per_s": statistics.median(ours),
        "bare_tokens_per_s": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def compare_workers(config: RunConfig, repeats: int) -> dict:
    """Rounds per second in-process and with two workers, same rounds, alternating."""
    seconds: dict[int, list[float]] = {0: [], 2: []}
    walls: dict[int, list[float]] = {0: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for workers in seconds:
                federation = config.federation.model_copy(update={"workers": workers})
                folder = Path(scratch) / f"{workers}-{repeat}"
                result = simulate(
                    config.model_copy(update={"federation": federation}), run_dir=folder
                )
                rounds = read_history(folder).of(RoundFinished)
                # The first round holds the workers' start-up.
                seconds[workers].append(statistics.median(r.round_s for r in rounds[1:]))
                walls[workers].append(result.summary["wall_s"])
    return {
        "round_s_in_process": statistics.median(seconds[0]),
        "round_s_two_workers": statistics.median(seconds[2]),
        "ratio_round": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "ratio_wall_with_startup": statistics.median(
            a / b for a, b in zip(*walls.values(), strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder made by `photon data prepare`")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker-repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    results = {}
    for optimizer in ("adamw", "muon"):
        config = parse_run_config(
            {
                "model": {"preset": "tiny"},
                "data": {"path": options.data, "sequence_length": 128, "verify": False},
                "local": {"steps": 20, "batch_size": 8, "optimizer": optimizer, "lr": 3e-3},
                "federation": {"rounds": options.rounds, "optimizer_state": "keep"},
                "eval": {"every": 0, "max_tokens": 2000, "per_silo": False},
            }
        )
        results[optimizer] = compare_trainer(config, options.steps, options.repeats)
        print(json.dumps(results[optimizer], indent=1))
    results["workers"] = compare_workers(config, options.worker_repeats)
    print(json.dumps(results["workers"], indent=1))


if __name__ == "__main__":
    main()
