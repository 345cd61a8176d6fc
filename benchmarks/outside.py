"""Time outside local training and evaluation in the demo's federated run.

    python benchmarks/outside.py --data runs/demo/data [--workers 0 --workers 2] [--turns 2]
        [--against CHECKOUT]

The share of the run's wall clock that is neither its silos' training (their busy seconds, over the
workers that train side by side) nor evaluation: loading states, encoding, merging, checkpoints, and
waiting for one another. Beside it, the share in which no silo at all trains or is scored: with
several workers one may wait for another's last step, and the run does not stand still. With
--against, another checkout of Photon, with an environment of its own in .venv, takes its turns
between ours.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from photon.cli.demo import recipe

HERE = Path(__file__).resolve().parents[1]


def outside(checkout: Path, data: Path, workers: int, rounds: int) -> tuple[float, float, float]:
    """Wall seconds of a run, how many of them are outside, and in how many no silo is at work."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        settings = (f"data.path={data}", f"federation.workers={workers}")
        command = [checkout / ".venv/bin/photon", "simulate", recipe(), "--run-dir", run, "--quiet"]
        for setting in (*settings, f"federation.rounds={rounds}"):
            command += ["--set", setting]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "summary.json").read_text())
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    finished = [event for event in events if event["event"] == "round_finished"]
    first = [e for e in events if e["event"] == "evaluated" and e["round"] == 0]
    evaluation_s = sum(event["eval_s"] for event in finished)
    evaluation_s += sum(event["eval_s"] for event in first) / max(1, workers)
    wall_s = summary["wall_s"]
    return wall_s, wall_s - summary["local_train_s"] - evaluation_s, wall_s - at_work(events)


def at_work(events: list[dict]) -> float:
    """Seconds in which a silo trained or was scored, in any worker: the union of all of them.

    A silo's training ends when its last step is told of; local_finished comes when it is merged.
    """
    spans, told = [], {}
    for event in events:
        if event["event"] == "local_progress":
            told[event["round"], event["silo"]] = event["time_s"]
        elif event["event"] == "local_finished":
            end = told[event["round"], event["silo"]]
            spans.append((end - event["train_s"], end))
        elif event["event"] == "evaluated":
            spans.append((event["time_s"] - event["eval_s"], event["time_s"]))
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=lambda path: Path(path).resolve())
    parser.add_argument("--workers", type=int, action="append", help="0: in one process")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--against", type=lambda path: Path(path).resolve())
    options = parser.parse_args()
    for _ in range(options.turns):
        for workers in options.workers or [0, 2]:
            for checkout in filter(None, (HERE, options.against)):
                wall_s, rest_s, idle_s = outside(checkout, options.data, workers, options.rounds)
                print(
                    f"{checkout.name}, workers = {workers}: {wall_s:.1f} s, "
                    f"outside {rest_s:.2f} s, {rest_s / wall_s:.1%}; "
                    f"no silo at work {idle_s:.2f} s, {idle_s / wall_s:.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
