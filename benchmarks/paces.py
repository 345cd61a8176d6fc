"""Time to the same loss under each pace, one silo slower than the rest; and a week of failures.

    python benchmarks/paces.py --text DIR [--slow NAME] [--seeds 3] [--out FILE]
    python benchmarks/paces.py --week [--out FILE]

DIR has a folder of text for each silo, of one genre each: what the slow silo has, nobody else has.
Learning is real, time simulated (docs/clock.md). Every policy anneals over its own rounds; its time
is that at the end of them, its losses are held against those of synchronous rounds of the seed.

--week trains nothing: 64 silos, failures drawn beforehand, at three rates, under each policy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from codec_quality import small_llama
from photon.config import RunConfig, parse_run_config
from photon.config.clock import ClockConfig
from photon.data import PrepareOptions, prepare
from photon.runs import simulate
from photon.runs.study import study_time
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated
from trainer import machine, table

#: By name: keys of [federation], of [outer], and rounds over the synchronous run's.
POLICIES: dict[str, tuple[dict, dict, float]] = {
    "synchronous": ({}, {}, 1.0),
    "quorum of 3, late dropped": ({"pace": "quorum", "quorum": 3, "grace": 0.1}, {}, 1.0),
    "quorum of 3, late merged": (
        {"pace": "quorum", "quorum": 3, "grace": 0.1, "late": "merge"},
        {},
        1.0,
    ),
    "unequal steps": ({"unequal_steps": True}, {}, 1.25),
    "unequal steps, normalised": (
        {"unequal_steps": True, "normalise": True, "weighting": "equal"},
        {},
        1.25,
    ),
    "buffered, 1": ({"pace": "buffered", "quorum": 1, "max_staleness": 64}, {"lr": 0.25}, 1.25),
    "buffered, 2": ({"pace": "buffered", "quorum": 2, "max_staleness": 64}, {"lr": 0.5}, 1.25),
    "buffered, 1, delayed Nesterov": (
        {"pace": "buffered", "quorum": 1, "max_staleness": 64},
        {"name": "delayed_nesterov", "lr": 0.7, "momentum": 0.3, "delay": 4},
        1.25,
    ),
}

#: Of --week: keys of [federation], and who is asked.
WEEK_POLICIES: dict[str, tuple[dict, str]] = {
    "everybody or nobody": ({"quorum": 64}, "all"),
    "synchronous, who is up": ({"quorum": 1}, "up"),
    "quorum of half": ({"pace": "quorum", "quorum": 32, "grace": 0.25}, "up"),
    "quorum of half, late merged": (
        {"pace": "quorum", "quorum": 32, "grace": 0.25, "late": "merge"},
        "up",
    ),
    "buffered, 16": ({"pace": "buffered", "quorum": 16}, "up"),
}
#: Mean time between a silo's failures, hours; each lasts half an hour in the mean.
RATES_H = (48.0, 12.0, 3.0)


def config_of(
    options: argparse.Namespace, data: Path, model: Path, seed: int, policy: str
) -> RunConfig:
    federation, outer, factor = POLICIES[policy]
    return parse_run_config(
        {
            "run": {"seed": seed, "keep_checkpoints": 1, "log_every": 1000},
            "model": {"path": str(model)},
            "data": {"path": str(data), "sequence_length": options.sequence_length},
            "federation": {
                "rounds": round(options.rounds * factor),
                "optimizer_state": "keep",
                **federation,
            },
            "outer": outer,
            "local": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "lr": options.lr,
                "warmup_steps": options.steps,
            },
            "compute": {"threads": options.threads},
            "eval": {"every": 0, "max_tokens": 40_000},
        }
    )


def run(config: RunConfig, clock: ClockConfig, folder: Path, slow: str) -> dict[str, float]:
    """Losses at the end, and the simulated time."""
    summary = simulate(config, clock=clock, run_dir=folder).summary
    own = [one for one in read_history(folder).of(Evaluated) if one.silo == slow]
    return {
        "loss": summary["global_loss"],
        "own": own[-1].loss,
        "time_s": summary["simulated_s"],
        "goodput": summary["goodput"],
        "tokens": summary["tokens"],
    }


def measure(options: argparse.Namespace, data: Path, model: Path, scratch: Path) -> list[list[str]]:
    silos = {"*": {"step_s": 1.0}, options.slow: {"step_s": options.slowness}}
    clock = ClockConfig.model_validate({"silos": silos})
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for policy in options.policy or POLICIES:
            started = time.perf_counter()
            config = config_of(options, data, model, seed, policy)
            one = run(config, clock, scratch / f"{seed}-{policy}", options.slow)
            found.setdefault(policy, []).append(one)
            took_s = time.perf_counter() - started
            print(f"seed {seed}, {policy}: {one} ({took_s:.0f} s)", file=sys.stderr)
    base = found["synchronous"]
    rows = []
    for policy, ones in found.items():
        against = [
            (
                100 * (one["loss"] / other["loss"] - 1),
                100 * (one["own"] / other["own"] - 1),
                other["time_s"] / one["time_s"],
                one["goodput"],
                one["tokens"] / other["tokens"],
            )
            for one, other in zip(ones, base, strict=True)
        ]
        loss, own, faster, goodput, tokens = zip(*against, strict=True)
        rows.append(
            [
                policy,
                spread(loss),
                spread(own),
                f"{statistics.mean(faster):.2f}x",
                f"{statistics.mean(goodput):.0%}",
                f"{statistics.mean(tokens):.2f}",
            ]
        )
    return rows


def spread(values: tuple[float, ...]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}%{deviation}"


def week(options: argparse.Namespace) -> list[list[str]]:
    """A row for each policy: goodput at each rate of failures."""
    rows = []
    silos = {f"silo-{number:02d}": {"step_s": 1.0} for number in range(64)}
    for policy, (federation, asked) in WEEK_POLICIES.items():
        row = [policy]
        for hours in RATES_H:
            started = time.perf_counter()
            failures = {
                "mean_up_s": hours * 3600,
                "mean_down_s": 1800.0,
                "seed": 1,
                "asked": asked,
            }
            clock = ClockConfig.model_validate(
                {
                    "silos": silos,
                    "failures": failures,
                    "until_s": options.days * 86_400.0,
                    "time_only": True,
                }
            )
            config = parse_run_config(
                {
                    "model": {"preset": "tiny"},
                    "data": {"path": "none"},
                    "federation": {"rounds": 1_000_000, "deadline_s": 2_592_000.0, **federation},
                    "local": {"steps": 500},
                }
            )
            result = study_time(config, clock)
            took_s = time.perf_counter() - started
            print(f"{policy}, {hours:g} h: {result} ({took_s:.1f} s)", file=sys.stderr)
            row.append(f"{result['goodput']:.0%} of {result['up_share']:.0%} up")
        rows.append(row)
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="folder with a folder of text for each silo")
    source.add_argument("--data", type=Path, help="or a prepared folder")
    source.add_argument("--week", action="store_true", help="failures over simulated days instead")
    parser.add_argument("--days", type=float, default=7.0, help="of --week")
    parser.add_argument("--slow", help="the slow silo; the last by name by default")
    parser.add_argument("--slowness", type=float, default=5.0, help="times the others' step")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10, help="tau")
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
        options.seeds, options.rounds, options.steps, options.days = 1, 2, 5, 0.2
        options.policy = ["synchronous", "unequal steps"]
    if options.policy and "synchronous" not in options.policy:
        options.policy.insert(0, "synchronous")
    return options


def main() -> None:
    options = arguments()
    if options.week:
        head = ["policy", *(f"a failure in {hours:g} h" for hours in RATES_H)]
        text = (
            f"# Goodput of 64 silos over {options.days:g} simulated days, {machine()}\n\n"
            "tau = 500 steps of one second; 125M parameters over 100 Mbit/s; failures of each silo "
            "by itself, half an hour long in the mean. Goodput: silo-seconds in local steps whose "
            "update was merged, over all silo-seconds; beside it, the share of time that silos "
            f"were up.\n\n{table(head, week(options))}\n"
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            model = small_llama(
                scratch / "model", options.width, options.layers, options.vocabulary
            )
            data = options.data
            if data is None:
                data = scratch / "data"
                made = prepare(
                    PrepareOptions(
                        input=options.text,
                        out=data,
                        silo_folders=True,
                        vocab_size=options.vocabulary,
                    )
                )
                options.slow = options.slow or max(made.silos)
            rows = measure(options, data, model, scratch)
        head = ["policy", "loss", "slow silo's own", "faster", "goodput", "tokens"]
        text = (
            f"# Paces with one silo {options.slowness:g} times slower, {machine()}\n\n"
            f"Llama of {options.layers} layers of width {options.width}; {options.rounds} "
            f"synchronous rounds of tau = {options.steps}, {options.batch_size} x "
            f"{options.sequence_length} tokens a step and silo, AdamW {options.lr:g}, kept state; "
            f"{options.slow} is the slow one. Held-out losses and simulated time at the end, "
            f"against synchronous rounds; {options.seeds} seeds, mean ± standard deviation.\n\n"
            f"{table(head, rows)}\n"
        )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
