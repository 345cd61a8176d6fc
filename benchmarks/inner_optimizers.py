"""Inner optimizers on the same text, tokens and steps: held-out loss as training goes on.

    photon demo                                   # prepares the text; or use any prepared folder
    python benchmarks/inner_optimizers.py --data runs/demo/data --seeds 3 --plot curves.png

Centralised training (`photon train`), so that nothing but the inner optimizer differs. Each is
tried at several peak learning rates on the first seed; the best goes on to the other seeds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from photon import events, read_run
from photon.config import RunConfig, parse_run_config
from photon.runs import train

LEARNING_RATES = {
    "adamw": [1e-3, 3e-3, 6e-3, 1.2e-2],
    "muon": [6e-3, 1.2e-2, 2.4e-2],
    "adopt": [1e-3, 3e-3, 6e-3],
}

Curve = list[tuple[int, float]]


def run_config(data: Path, optimizer: str, lr: float, seed: int, points: int, steps: int):
    return parse_run_config(
        {
            "run": {"name": "bench", "seed": seed},
            "model": {"preset": "tiny"},
            "data": {"path": str(data), "sequence_length": 128},
            # A "round" of centralised training is the span between two evaluations.
            "federation": {"rounds": points},
            "local": {
                "steps": steps // points,
                "batch_size": 32,
                "optimizer": optimizer,
                "lr": lr,
                "warmup_steps": steps // 20,
            },
            "train": {"batch_size": 32},
            "eval": {"every": 1, "per_silo": False, "max_tokens": 20_000},
        }
    )


def curve(config: RunConfig) -> Curve:
    """(tokens, held-out loss in nats per token) at each evaluation."""
    folder = Path(tempfile.mkdtemp(prefix="photon-bench-"))
    try:
        train(config, run_dir=folder / "run")
        history = read_run(folder / "run")
        tokens = {0: 0} | {e.round: e.total_tokens for e in history.of(events.RoundFinished)}
        return [(tokens[e.round], e.loss) for e in history.of(events.Evaluated) if e.silo is None]
    finally:
        shutil.rmtree(folder)


def contest(asked: argparse.Namespace) -> dict[str, tuple[float, list[Curve], dict[float, float]]]:
    """Optimizer -> best rate, a curve for each seed, final loss for each rate."""
    found = {}
    for optimizer in asked.optimizers:
        tried: dict[float, Curve] = {}
        for lr in asked.rates or LEARNING_RATES[optimizer]:
            config = run_config(asked.data, optimizer, lr, 0, asked.points, asked.steps)
            tried[lr] = curve(config)
            print(f"{optimizer} {lr:g}: {tried[lr][-1][1]:.4f}", file=sys.stderr, flush=True)
        best = min(tried, key=lambda lr: tried[lr][-1][1])
        curves = [tried[best]]
        for seed in range(1, asked.seeds):
            config = run_config(asked.data, optimizer, best, seed, asked.points, asked.steps)
            curves.append(curve(config))
            print(f"{optimizer} {best:g} seed {seed}: {curves[-1][-1][1]:.4f}", file=sys.stderr)
        found[optimizer] = (best, curves, {lr: points[-1][1] for lr, points in tried.items()})
    return found


def show(found: dict[str, tuple[float, list[Curve], dict[float, float]]]) -> str:
    lines = ["| tokens | " + " | ".join(f"{n} ({lr:g})" for n, (lr, _, _) in found.items()) + " |"]
    lines.append("|---" * (len(found) + 1) + "|")
    first = next(iter(found.values()))[1][0]
    for place, (tokens, _) in enumerate(first):
        cells = []
        for _, curves, _ in found.values():
            losses = [points[place][1] for points in curves]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.3f}{spread}")
        lines.append(f"| {tokens / 1e3:,.0f} k | " + " | ".join(cells) + " |")
    lines.append("")
    for name, (_, _, rates) in found.items():
        tuned = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in rates.items())
        lines.append(f"{name}, last loss by peak rate (seed 0): {tuned}")
    return "\n".join(lines)


def plot(found: dict[str, tuple[float, list[Curve], dict[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (lr, curves, _) in found.items():
        tokens = [point[0] / 1e3 for point in curves[0]]
        losses = [
            statistics.mean(points[place][1] for points in curves) for place in range(len(tokens))
        ]
        axes.plot(tokens, losses, marker="o", label=f"{name}, peak rate {lr:g}")
    axes.set_xlabel("tokens, thousands")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared text")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--rates", nargs="+", type=float, help="peak learning rates to try")
    parser.add_argument("--steps", type=int, default=168, help="of 32 sequences of 128 tokens")
    parser.add_argument("--points", type=int, default=12, help="evaluations along the way")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="also draw the curves there (PNG or SVG)")
    asked = parser.parse_args()
    found = contest(asked)
    print(show(found))
    if asked.plot:
        plot(found, asked.plot)


if __name__ == "__main__":
    main()
