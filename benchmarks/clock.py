"""What a clock says of served runs before they are run, against what they then take.

    python benchmarks/clock.py [--text FILE_OR_FOLDER] [--out FILE.md]

Needs root, Debian's iproute2, and /dev/net/tun. An aggregator and two silos, each in a network
namespace of its own: a real `photon serve` and real `photon join`, a link for each silo, whose rate
tc's tbf sets and whose delay a relay in user space. A first run calibrates: a step's seconds at
each silo, what a transfer takes besides bytes over rate (seconds, and round trips), the
aggregator's part. From that a clock file follows for the links, local steps and codecs
of other runs; `photon simulate --clock` says how long their rounds take; then they are run.

The first round, in which trainers build their models, and the last, in which the model is scored,
are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deployment.federation import Federation, Plan, prepare_text
from deployment.links import ip, relayed
from photon.config import load_run_config
from photon.config.clock import ClockConfig
from photon.runs import simulate
from photon.telemetry import RunHistory, read_history
from photon.telemetry.events import LocalFinished, RoundFinished
from trainer import machine, table

AGGREGATOR = "10.98.0.1"
#: Of what tbf lets through: the rest is headers (52 of 1,500 bytes, Ethernet's, TLS records').
PAYLOAD = 0.95
#: A relay only delays: its rate is far above tbf's.
_RELAY_BIT_PER_S = 10e9


@dataclass(frozen=True)
class Line:
    """A silo's link, the same both ways."""

    mbit_per_s: float
    rtt_s: float

    def __str__(self) -> str:
        return f"{self.mbit_per_s:g} Mbit/s, RTT {self.rtt_s * 1e3:g} ms"


@dataclass(frozen=True)
class Setting:
    """A run: its local steps, silos' links, and sections of its run file."""

    name: str
    steps: int
    lines: Mapping[str, Line]
    more: str = ""


INT8 = '[link]\nupdate_codec = "int8"\nbroadcast_codec = "int8"'
#: Up and down differ in bytes, the lines in both rate and delay.
CALIBRATION = Setting(
    "calibration",
    120,
    {"silo-0": Line(50, 0.020), "silo-1": Line(20, 0.100)},
    '[link]\nupdate_codec = "int8"',
)
SETTINGS = (
    Setting(
        "twice the steps, slower lines", 240, {"silo-0": Line(20, 0.060), "silo-1": Line(10, 0.060)}
    ),
    Setting(
        "int8 both ways over a long line",
        240,
        {"silo-0": Line(8, 0.020), "silo-1": Line(4, 0.200)},
        INT8,
    ),
    Setting("lines ten times apart", 240, {"silo-0": Line(100, 0.010), "silo-1": Line(10, 0.150)}),
)


@dataclass(frozen=True)
class Round:
    """Medians over a run's rounds, seconds; by silo where it says so."""

    round_s: float
    train_s: Mapping[str, float]
    load_s: Mapping[str, float]
    publish_s: Mapping[str, float]
    bytes_down: Mapping[str, float]
    bytes_up: Mapping[str, float]

    @property
    def computed(self) -> float:
        """Share of the round in which the silo that took longest trained."""
        return max(self.train_s.values()) / self.round_s


@dataclass(frozen=True)
class Calibration:
    """What a run tells about this deployment.

    Attributes:
        step_s: of each silo.
        merge_s: of a round, while no silo receives, trains or sends.
        fixed_s, trips: of each transfer, besides: seconds, and round trips.
    """

    step_s: Mapping[str, float]
    merge_s: float
    fixed_s: float
    trips: float

    def clock(self, lines: Mapping[str, Line]) -> ClockConfig:
        silos = {
            silo: {
                "step_s": self.step_s[silo],
                "down_mbit_s": line.mbit_per_s * PAYLOAD,
                "up_mbit_s": line.mbit_per_s * PAYLOAD,
                "latency_s": self.fixed_s + self.trips * line.rtt_s,
            }
            for silo, line in lines.items()
        }
        return ClockConfig.model_validate({"silos": silos, "merge_s": self.merge_s})


def calibrated(setting: Setting, seen: Round) -> Calibration:
    """Least squares over all transfers: seconds = bytes over rate + fixed + trips x RTT."""
    rows, seconds = [], []
    for silo, line in setting.lines.items():
        for took_s, count in (
            (seen.load_s[silo], seen.bytes_down[silo]),
            (seen.publish_s[silo], seen.bytes_up[silo]),
        ):
            rows.append((1.0, line.rtt_s))
            seconds.append(took_s - count * 8e-6 / (PAYLOAD * line.mbit_per_s))
    fixed_s, trips = np.linalg.lstsq(np.array(rows), np.array(seconds))[0]
    longest = max(
        seen.train_s[silo] + seen.load_s[silo] + seen.publish_s[silo] for silo in setting.lines
    )
    return Calibration(
        {silo: seen.train_s[silo] / setting.steps for silo in setting.lines},
        seen.round_s - longest,
        max(0.0, float(fixed_s)),
        max(0.0, float(trips)),
    )


@contextlib.contextmanager
def network(lines: Mapping[str, Line]) -> Iterator[dict[str, str]]:
    """A namespace for the aggregator ("server") and for each silo; its link goes to the first."""
    mark = f"photon-{os.getpid()}"
    spaces = {name: f"{mark}-{name}" for name in ("server", *lines)}
    with contextlib.ExitStack() as stack:
        for space in spaces.values():
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)
            ip("-n", space, "link", "set", "lo", "up")
        server = spaces["server"]
        ip("-n", server, "address", "add", f"{AGGREGATOR}/32", "dev", "lo")
        for number, (silo, line) in enumerate(lines.items(), start=1):
            ends = (server, f"to{number}"), (spaces[silo], "wire")
            own = f"10.98.{number}.2"
            delay_s = line.rtt_s / 2
            stack.enter_context(
                relayed(ends, bit_per_s=_RELAY_BIT_PER_S, delay_s=delay_s, loss=0.0, queue_s=1.0)
            )
            for (space, device), here, there in zip(
                ends, (AGGREGATOR, own), (own, AGGREGATOR), strict=True
            ):
                ip("-n", space, "address", "add", f"{here}/32", "dev", device)
                ip("-n", space, "link", "set", device, "mtu", "1500", "txqueuelen", "20000", "up")
                ip("-n", space, "route", "add", f"{there}/32", "dev", device, "src", here)
                rate = f"rate {line.mbit_per_s:g}mbit burst 64kb latency 200ms"
                words = ["tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf"]
                subprocess.run([*words, *rate.split()], check=True)
        yield spaces


def plan_of(setting: Setting, options: argparse.Namespace) -> Plan:
    return Plan(
        "tiny",
        options.rounds,
        setting.steps,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        optimizer="adamw",
        more=setting.more,
    )


def served(
    setting: Setting, options: argparse.Namespace, data: Path, folder: Path
) -> tuple[Round, Path]:
    """Run it for real; its rounds, and its run file."""
    with network(setting.lines) as spaces:
        plan = plan_of(setting, options)
        silos = list(setting.lines)
        with Federation(folder, data, silos, plan, address=AGGREGATOR, spaces=spaces) as federation:
            federation.begin()
            federation.wait("the run is over", lambda: federation.over, within_s=3600)
    return round_of(read_history(federation.run), silos), federation.run_file


def round_of(history: RunHistory, silos: Sequence[str]) -> Round:
    ends = history.of(RoundFinished)[1:-1]
    told = [one for one in history.of(LocalFinished) if one.round in {end.round for end in ends}]

    def median(figure: str) -> dict[str, float]:
        return {
            silo: statistics.median(getattr(one, figure) for one in told if one.silo == silo)
            for silo in silos
        }

    figures = ("train_s", "load_s", "publish_s", "bytes_down", "bytes_up")
    round_s = statistics.median(one.round_s for one in ends)
    return Round(round_s, **{figure: median(figure) for figure in figures})


def predicted_s(setting: Setting, clock: ClockConfig, run_file: Path, folder: Path) -> float:
    """Of a round by real learning on simulated time: the second, as updates have a size then."""
    config = load_run_config(run_file, ("federation.rounds=2",))
    ends = read_history(simulate(config, clock=clock, run_dir=folder).folder).of(RoundFinished)
    assert ends[-1].simulated_s is not None
    assert ends[0].simulated_s is not None
    return ends[-1].simulated_s - ends[0].simulated_s


def measure(options: argparse.Namespace, data: Path, scratch: Path) -> tuple[str, list[list[str]]]:
    seen, _ = served(CALIBRATION, options, data, scratch / "calibration")
    found = calibrated(CALIBRATION, seen)
    print(seen, found, sep="\n", file=sys.stderr)
    rows = []
    for number, setting in enumerate(options.settings):
        folder = scratch / str(number)
        real, run_file = served(setting, options, data, folder)
        clock = found.clock(setting.lines)
        clock_s = predicted_s(setting, clock, run_file, folder / "simulated")
        print(setting.name, real, clock_s, sep="\n", file=sys.stderr)
        # What of the error is the machine's: the same clock with the steps as they then were.
        steps = {silo: real.train_s[silo] / setting.steps for silo in setting.lines}
        drift = statistics.mean(steps[silo] / found.step_s[silo] - 1 for silo in steps)
        rows.append(
            [
                setting.name,
                "; ".join(str(line) for line in setting.lines.values()),
                f"{setting.steps}",
                f"{real.computed:.0%}",
                f"{clock_s:.2f}",
                f"{real.round_s:.2f}",
                f"{clock_s / real.round_s - 1:+.1%}",
                f"{drift:+.1%}",
            ]
        )
    words = (
        f"Calibrated on {CALIBRATION.steps} local steps over "
        f"{' and '.join(str(line) for line in CALIBRATION.lines.values())}: steps of "
        f"{' and '.join(f'{one * 1e3:.0f}' for one in found.step_s.values())} ms, "
        f"{found.merge_s:.2f} s of the aggregator, "
        f"{found.fixed_s:.2f} s and {found.trips:.1f} round trips a transfer besides its bytes."
    )
    return words, rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="file or folder; made up by default")
    parser.add_argument("--rounds", type=int, default=5, help="of each served run")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="three short rounds, to see it run")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    options.settings = SETTINGS
    if options.quick:
        options.rounds, options.vocabulary = 3, 512
        options.settings = [replace(SETTINGS[0], steps=4)]
    return options


def main() -> None:
    options = arguments()
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SystemExit("Needs root on Linux: it makes network namespaces.")
    with tempfile.TemporaryDirectory(prefix="photon-clock-") as folder:
        scratch = Path(folder)
        data, _ = prepare_text(
            scratch / "text", 2, vocabulary=options.vocabulary, text=options.text
        )
        words, rows = measure(options, data, scratch)
    head = ["run", "links of the two silos", "tau", "trained", "the clock, s", "served, s", "error"]
    text = (
        f"# A clock's rounds against served ones, {machine()}\n\n{words} Medians of rounds; "
        "drift: of a step's seconds, that run against the calibration.\n\n"
        f"{table([*head, 'drift'], rows)}\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
