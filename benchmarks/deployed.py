"""A deployed round on loopback: where its seconds go, and the aggregator's memory.

    python benchmarks/deployed.py [--parameters 125] [--rounds 6] [--out FILE.md]

Starts a real `photon serve` and some `photon join`, TLS and all, first with the tiny model, then
with the one asked for: one local step of plain SGD on one short sequence, so that rounds are made
of what a deployment adds. When things happened is read from where they are written down anyway:
events.jsonl, the roster's tasks, the trainers' logs; memory is /proc's.

A round is told along the silo whose answer came last:

    published   the aggregator writes the global state into the store
    delivered   from the task's opening to the trainer's being asked (control)
    received    the silo reads the state from the store
    trained     it loads and trains
    sent        it encodes the update and writes it into the store
    returned    from the trainer's answer to the aggregator's verified receipt (control)
    collected   the aggregator reads the updates that are not here yet, and merges; the outer step
    checkpoint  the aggregator's
    rest        everything else of the round (control)
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from deployment.federation import EventFile, Federation, Plan, prepare_text, read_tasks
from deployment.processes import PeakWatch, Sample, sample
from deployment.store_alone import store_by_itself

PRESETS = {0: "tiny", 75: "75m", 125: "125m", 350: "350m", 1300: "1.3b"}
_LINE = re.compile(
    r"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) INFO "
    r"(?P<what>asked for|received|answered) (?P<rest>.*)"
)
_TASK = re.compile(r"/fit/(\d+)/")


@dataclass
class SiloRound:
    """A silo's part of a round; seconds since the epoch, and what its receipt says."""

    opened: float = math.nan
    asked: float = math.nan
    received: float = math.nan
    answered: float = math.nan
    closed: float = math.nan
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return bool(self.receipt) and not any(
            math.isnan(at)
            for at in (self.opened, self.asked, self.received, self.answered, self.closed)
        )


@dataclass(frozen=True)
class RoundTimes:
    """Seconds of a round, along the silo whose answer came last; see the top of this file.

    `less_work` is the round less the longest silo's receiving, training and sending, less merging
    and the checkpoint: control, and the aggregator's own reading and writing of tensors.
    """

    number: int
    round_s: float
    published: float
    delivered: float
    received: float
    trained: float
    sent: float
    returned: float
    collected: float
    checkpoint: float
    rest: float
    control: float
    less_work: float
    down_mb_per_s: float
    up_mb_per_s: float

    PARTS = (
        *("published", "delivered", "received", "trained", "sent", "returned"),
        *("collected", "checkpoint", "rest"),
    )


@dataclass
class Measured:
    """A federation that ran to its end."""

    parameters: int
    silos: int
    rounds: list[RoundTimes]
    #: After each round: its number, and each process.
    memory: list[tuple[int, dict[str, Sample]]]
    store_alone: Mapping[str, float] | None
    peaks: Mapping[str, int]
    bytes_down: int
    bytes_up: int

    def median(self, name: str) -> float:
        """Over rounds, without the first, in which trainers build their models."""
        return statistics.median(getattr(one, name) for one in self.rounds[1:] or self.rounds)


def measure(
    folder: Path,
    data: Path,
    silos: Sequence[str],
    plan: Plan,
    *,
    timeout_s: float,
    probe_bytes: int,
) -> Measured:
    """Run a federation and say what its rounds took.

    Args:
        probe_bytes: try the store by itself with so many before any silo comes; 0: don't.

    Raises:
        SystemExit: it ended before its end, or is not over in time.
    """
    with contextlib.ExitStack() as ends:
        federation = ends.enter_context(Federation(folder, data, silos, plan))
        federation.serve()
        alone = store_by_itself(federation, probe_bytes) if probe_bytes else None
        federation.join_all()
        assert federation.serving is not None
        roots = {"server": federation.serving.pid}
        roots |= {name: process.pid for name, process in federation.joined.items()}
        watch = ends.enter_context(PeakWatch(roots))
        book = _Book(federation)

        def over() -> bool:
            book.look()
            return federation.over

        federation.wait("the run is over", over, within_s=timeout_s)
        book.look()
    rounds = book.rounds()
    if not rounds:
        raise SystemExit(f"no round of {plan.preset} was written down whole: {book.missing()}")
    receipts = [one.receipt for (number, _), one in book.silos.items() if number > 1]
    receipts = receipts or [one.receipt for one in book.silos.values()]
    return Measured(
        book.parameters,
        len(silos),
        rounds,
        book.memory,
        alone,
        {
            "server": watch.peaks["server"],
            "client": max(peak for name, peak in watch.peaks.items() if name != "server"),
        },
        round(statistics.median(one["bytes_down"] for one in receipts if one)),
        round(statistics.median(one["bytes_up"] for one in receipts if one)),
    )


class _Book:
    """Everything that is written down about a run, gathered while it runs."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._events = EventFile(federation.run)
        self._tasks: dict[tuple[int, str], tuple[float, float | None]] = {}
        self._merged: dict[int, float] = {}
        self._finished: dict[int, dict[str, Any]] = {}
        self.parameters = 0
        self.silos: dict[tuple[int, str], SiloRound] = {}
        self.memory: list[tuple[int, dict[str, Sample]]] = []

    def look(self) -> None:
        """Read what is new; note memory where a round has ended."""
        ended = False
        for event in self._events.new():
            name = event["event"]
            if name == "run_started":
                self.parameters = event["parameters"]
            elif name == "local_finished":
                self._silo(event["round"], event["silo"]).receipt = event
            elif name == "round_merged":
                self._merged[event["round"]] = event["time_s"]
            elif name == "round_finished":
                self._finished[event["round"]] = event
                ended = True
        if ended:
            # Of this round and the one before: older ones are pruned.
            self._tasks |= read_tasks(self._federation.home)
            running = self._federation.services()
            found = {name: one for name, pid in running.items() if (one := sample(pid)) is not None}
            self.memory.append((max(self._finished), found))

    def rounds(self) -> list[RoundTimes]:
        """Of those whose every part was written down."""
        self._read_logs()
        for key, (opened, closed) in self._tasks.items():
            silo = self._silo(*key)
            silo.opened, silo.closed = opened, closed if closed is not None else math.nan
        return [
            self._times(number)
            for number in sorted(self._finished)
            if all(self._silo(number, name).whole for name in self._federation.silos)
        ]

    def missing(self) -> str:
        """What is known of the first round, for whoever has to find out what is not."""
        return str({key: vars(one) for key, one in self.silos.items() if key[0] == 1})[:2000]

    def _silo(self, number: int, name: str) -> SiloRound:
        return self.silos.setdefault((number, name), SiloRound())

    def _read_logs(self) -> None:
        """When trainers were asked, had the state, and answered; the first time it happened."""
        for name in self._federation.silos:
            at = 0
            log = self._federation.node_home(name) / "logs" / "trainer.log"
            for found in _LINE.finditer(log.read_text(encoding="utf-8", errors="replace")):
                moment = datetime.strptime(found["at"], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                task = _TASK.search(found["rest"])
                if found["what"] == "asked for":
                    at = int(task[1]) if task else 0
                if at:
                    what = found["what"].removesuffix(" for")
                    silo = self._silo(at, name)
                    if math.isnan(getattr(silo, what)):
                        setattr(silo, what, moment)

    def _times(self, number: int) -> RoundTimes:
        finished = self._finished[number]
        silos = [self._silo(number, name) for name in self._federation.silos]
        last = max(silos, key=lambda one: one.closed)
        ended = self._events.clock(finished["time_s"])
        parts = {
            "published": last.opened - (ended - finished["round_s"]),
            "delivered": last.asked - last.opened,
            "received": last.received - last.asked,
            "trained": last.answered - last.received - last.receipt["publish_s"],
            "sent": last.receipt["publish_s"],
            "returned": last.closed - last.answered,
            "collected": self._events.clock(self._merged[number]) - last.closed,
            "checkpoint": finished["checkpoint_s"],
        }
        parts["rest"] = finished["round_s"] - sum(parts.values())
        longest = max(one.answered - one.asked for one in silos)
        less_work = finished["round_s"] - longest - finished["merge_s"] - finished["checkpoint_s"]
        return RoundTimes(
            number,
            finished["round_s"],
            **parts,
            control=parts["delivered"] + parts["returned"] + max(0.0, parts["rest"]),
            less_work=less_work,
            down_mb_per_s=_together(
                finished["bytes_down"], [(one.asked, one.received) for one in silos]
            ),
            up_mb_per_s=_together(
                finished["bytes_up"],
                [(one.answered - one.receipt["publish_s"], one.answered) for one in silos],
            ),
        )


def _together(count: int, spans: Sequence[tuple[float, float]]) -> float:
    """MB/s of all silos, from the first one's start to the last one's end."""
    taken = max(end for _, end in spans) - min(start for start, _ in spans)
    return count / taken / 1e6


# ---- tables


def tables(measured: Sequence[tuple[str, Measured]]) -> Iterator[str]:
    from trainer import table

    head = ("model", "silos", "round", "s", *RoundTimes.PARTS, "**control**")
    head += ("less work, merge, checkpoint",)
    rows = []
    for name, one in measured:
        model = f"{name}, {one.parameters / 1e6:.1f} M"
        for times in one.rounds:
            values = [times.round_s, *(getattr(times, part) for part in times.PARTS)]
            values += [times.control, times.less_work]
            cells = [f"{value:.2f}" for value in values]
            rows.append((model, str(one.silos), str(times.number), *cells))
        names = ("round_s", *RoundTimes.PARTS, "control", "less_work")
        cells = [f"**{one.median(part):.2f}**" for part in names]
        rows.append((model, str(one.silos), "median", *cells))
    yield f"## Seconds of a round\n\nMedians leave out the first round.\n\n{table(head, rows)}\n"

    head = ("model", "MB to and from each silo", "MB/s down, all silos", "MB/s up, all silos")
    head += ("store alone, GET", "store alone, PUT")
    rows = []
    for name, one in measured:
        alone = one.store_alone or {}
        rows.append(
            (
                name,
                f"{one.bytes_down / 1e6:,.1f} and {one.bytes_up / 1e6:,.1f}",
                *(f"{one.median(way):,.0f}" for way in ("down_mb_per_s", "up_mb_per_s")),
                *(f"{alone[verb]:,.0f}" if verb in alone else "-" for verb in ("get", "put")),
            )
        )
    yield (
        "## Data\n\nFrom the first silo's start to the last one's end, asking for grants, TLS, "
        "hashes, decoding and encoding included. The store alone: as many clients at once, with "
        f"Photon's transfer, in the clear.\n\n{table(head, rows)}\n"
    )

    for name, one in measured:
        services = sorted({service for _, found in one.memory for service in found})
        rows = [
            (str(number), *(_held(found.get(service)) for service in services))
            for number, found in one.memory
        ]
        rows.append(("growth a round", *(_growth(one, service) for service in services)))
        yield (
            f"## Memory of the aggregator's processes after each round, {name}\n\n"
            "MB resident (and the most so far). Growth: of resident memory from the second round "
            f"to the last.\n\n{table(('round', *services), rows)}\n"
        )


def _held(one: Sample | None) -> str:
    return f"{one.rss_bytes / 1e6:,.0f} ({one.peak_bytes / 1e6:,.0f})" if one else "-"


def _growth(one: Measured, service: str) -> str:
    held = [
        (number, found[service].rss_bytes)
        for number, found in one.memory
        if number > 1 and service in found
    ]
    if len(held) < 2:
        return "-"
    (first, before), (last, after) = held[0], held[-1]
    return f"{(after - before) / (last - first) / 1e6:+,.1f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parameters",
        type=int,
        choices=sorted(PRESETS),
        default=125,
        help="of the model, in millions; 0: only the tiny one",
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tiny-rounds", type=int, default=12, help="of the tiny model before it")
    parser.add_argument("--silos", type=int, default=4)
    parser.add_argument("--text", type=Path, help="a file or folder; made up by default")
    parser.add_argument("--timeout-s", type=float, default=3600, help="of each part")
    parser.add_argument("--quick", action="store_true", help="tiny, 2 silos, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    options = parser.parse_args()
    if options.quick:
        options.parameters, options.silos, options.tiny_rounds = 0, 2, 2
        options.timeout_s = 300
    return options


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    measured: list[tuple[str, Measured]] = []
    # The aggregator's: silos wait while it merges.
    threads = len(os.sched_getaffinity(0))
    names = [("tiny", 300, options.tiny_rounds)]
    if options.parameters:
        names.append((PRESETS[options.parameters], 50_257, options.rounds))
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as scratch:
        for name, vocabulary, rounds in names:
            folder = Path(scratch) / name
            data, silos = prepare_text(
                folder / "corpus", options.silos, vocabulary=vocabulary, text=options.text
            )
            plan = Plan(preset=name, rounds=rounds, silence_s=600, threads=threads)
            found = measure(
                folder,
                data,
                silos,
                plan,
                timeout_s=options.timeout_s,
                probe_bytes=max(3, options.parameters) * 4_000_000 if name == names[-1][0] else 0,
            )
            measured.append((name, found))
            print(
                f"{name}: round {found.median('round_s'):.2f} s, control "
                f"{found.median('control'):.2f} s",
                file=sys.stderr,
            )
    from trainer import machine

    about = __doc__[__doc__.index("A round is told") :].strip()
    parts = [*tables(measured)]
    text = f"# Deployed rounds on loopback, {machine()}\n\n{about}\n\n" + "\n".join(parts)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
