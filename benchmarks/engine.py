"""The training engine at the paper's sizes: tokens/s, MFU, peak memory against the estimate.

    python benchmarks/engine.py                  # 125m and 1.3b on CUDA; small shapes on a CPU
    python benchmarks/engine.py --presets 125m 350m --steps 30 --out benchmarks/results/X.md

Each row is a process of its own, so that one's peak memory and compiled code are not another's.
Text is random tokens: speed does not depend on it. Peaks are those of training/hardware.py (stated
by the vendor, dense); on a CPU the peak is measured here, by matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from photon.config import parse_run_config
from photon.models import build_model, build_skeleton
from photon.training import Schedule, Seat, Trainer, count_flops, mfu, plan_compute, plan_fit
from photon.training.hardware import measure_peak, stated_peak

VOCABULARY = 50_368
#: (compile, recomputation)
SETTINGS = [("off", "none"), ("on", "none"), ("on", "selective"), ("on", "full")]


class RandomText:
    """Tokens without meaning, the same for the same index."""

    def __init__(self, length: int, vocabulary: int) -> None:
        draw = np.random.default_rng(0)
        self._rows = draw.integers(0, vocabulary, size=(64, length + 1))

    def batch(self, start: int, count: int) -> np.ndarray:
        return self._rows[np.arange(start, start + count) % len(self._rows)]

    def document_ids(self, start: int, count: int) -> np.ndarray:
        return np.zeros((count, self._rows.shape[1]), dtype=np.int32)


def run_config(options: dict[str, Any]) -> Any:
    return parse_run_config(
        {
            "model": {"preset": options["preset"]},
            "data": {"path": "none", "sequence_length": options["length"]},
            "local": {"batch_size": options["batch"], "optimizer": options["optimizer"]},
            "compute": {
                "compile": options["compile"],
                "activation_checkpointing": options["recomputation"],
            },
        }
    )


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """One row: trains a few steps and says what they took."""
    config = run_config(options)
    sizes = {
        "vocab_size": options["vocabulary"],
        "sequence_length": options["length"],
        "eos_id": 0,
    }
    skeleton = build_skeleton(config.model, **sizes)
    plan = plan_compute(config.compute)
    fit = plan_fit(skeleton, config, plan, Seat())
    model = build_model(config.model, seed=0, **sizes)
    trainer = Trainer(
        model, config.local, Schedule("constant", 10**6), plan, micro_batch=fit.micro_batch
    )
    stream = RandomText(options["length"], options["vocabulary"])
    trainer.fit(stream, cursor=0, global_step=0, steps=options["warm_up"])
    result = trainer.fit(stream, cursor=0, global_step=0, steps=options["steps"])
    flops = count_flops(skeleton, options["length"]).per_token
    speed = result.tokens / result.train_s
    device = plan.device.type
    stated = stated_peak(torch.cuda.get_device_name()) if device == "cuda" else None
    peak = stated.flops(plan.precision) if stated is not None else None
    measured = measure_peak(plan.device, plan.autocast_dtype or torch.float32)
    phases = {name: seconds / options["steps"] for name, seconds in vars(result.times).items()}
    return {
        "tokens_per_s": speed,
        "mfu": mfu(speed, flops, peak) if peak else None,
        "of_measured_peak": mfu(speed, flops, measured),
        "micro_batch": result.micro_batch_size,
        "precision": plan.precision,
        "peak_bytes": result.peak_memory_bytes,
        "estimated_bytes": fit.estimate(skeleton, result.micro_batch_size).total_bytes,
        "phases": phases,
    }


def row_of(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", json.dumps(options)]
    # As the command line does: threads that spin at barriers slow down whoever else is there.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    lines = [
        "| model | optimizer | compile | recomputation | micro-batch | tokens/s "
        "| MFU (stated peak) | of measured matmul peak "
        "| data / forward / backward / optimizer, ms | peak | estimate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for asked, found in rows:
        head = f"| {asked['preset']} | {asked['optimizer']} | {asked['compile']} | "
        head += f"{asked['recomputation']} | "
        if "error" in found:
            lines.append(f"{head} {found['error']} | | | | | | |")
            continue
        stated = f"{found['mfu']:.1%}" if found["mfu"] is not None else "-"
        phases = " / ".join(f"{seconds * 1e3:.0f}" for seconds in found["phases"].values())
        ratio = found["estimated_bytes"] / found["peak_bytes"] - 1
        lines.append(
            f"{head}{found['micro_batch']} | {found['tokens_per_s']:,.0f} | {stated} | "
            f"{found['of_measured_peak']:.1%} | {phases} | {found['peak_bytes'] / 1e9:.2f} GB | "
            f"{found['estimated_bytes'] / 1e9:.2f} GB ({ratio:+.0%}) |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--presets", nargs="+")
    parser.add_argument("--length", type=int, help="tokens of a sequence; 2048 on CUDA")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--steps", type=int, help="measured steps")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(json.loads(asked.one))))
        return
    cuda = torch.cuda.is_available()
    here = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    base = {
        "length": asked.length or (2048 if cuda else 128),
        "batch": asked.batch or (64 if cuda else 4),
        "steps": asked.steps or (20 if cuda else 4),
        "warm_up": 5 if cuda else 2,
        "vocabulary": VOCABULARY if cuda else 8192,
    }
    presets = asked.presets or (["125m", "1.3b"] if cuda else ["tiny", "75m"])
    lines = [f"# Training engine, {date.today()}", "", f"{here}, torch {torch.__version__}."]
    if not cuda:
        lines.append("No CUDA device could be reached: small shapes on a CPU, nothing of a GPU.")
    rows = []
    for preset in presets:
        for optimizer in asked.optimizers:
            for compiled, recomputation in SETTINGS if cuda else [("off", "none"), ("off", "full")]:
                options = base | {
                    "preset": preset,
                    "optimizer": optimizer,
                    "compile": compiled,
                    "recomputation": recomputation,
                }
                print(f"{preset} {optimizer} compile {compiled} {recomputation}", file=sys.stderr)
                rows.append((options, row_of(options)))
    lines += [f"Sequences of {base['length']}, {base['batch']} a step.", "", *table(rows)]
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
