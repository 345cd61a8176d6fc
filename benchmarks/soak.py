"""A small federation for hours, with churn: do memory, file descriptors and disk stay flat?

    python benchmarks/soak.py [--hours 4] [--out FILE.md]     # and FILE.csv beside it
    python benchmarks/soak.py --report FILE.csv               # the table of what was measured

A real `photon serve` and some `photon join` on loopback train the tiny model without end. About
once a minute a silo's `photon join`, drawn at random, is killed with -9 or stopped, and started
again some seconds later; now and then the federation's loop is killed. One silo is
left alone, so that what its processes hold can be followed all the way. Every minute the memory and
open files of every process, and the disk of every folder, go into the CSV file, a line at a time.

The table compares medians: the last quarter against the first.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deployment.federation import EventFile, Federation, Plan, prepare_text
from deployment.processes import disk_bytes, sample

#: In the names of columns: what is measured, and its unit.
RSS, FILES, DISK = "rss_mb", "files", "disk_mb"
#: Growth from the first quarter to the last that counts as flat: a share, and an absolute part.
FLAT = {RSS: (0.05, 8.0), FILES: (0.05, 3.0), DISK: (0.10, 8.0)}
#: What is written for each round or event and kept on purpose: it can't be flat.
RECORDS = frozenset({"events.jsonl", "audit.jsonl"})
#: Bounded by rotation, but slow to reach the bound.
LOGS = "logs"
COUNTERS = ("hours", "rounds", "dropped", "killed", "stopped", "loops_killed", "fell")


@dataclass
class Churn:
    """Ends silos and starts them again, and counts.

    Attributes:
        killed, stopped: of silos' nodes: by kill -9, or asked to end.
        loops_killed: of the loop.
        fell: `photon serve` or `photon join` that ended by themselves, and were started again.
    """

    federation: Federation
    draw: random.Random
    loop_every: int
    killed: int = 0
    stopped: int = 0
    loops_killed: int = 0
    fell: int = 0
    _away: dict[str, float] = field(default_factory=dict)

    def strike(self, *, turn: int) -> None:
        """End something. Raises SystemExit where it did not end."""
        if turn % self.loop_every == 0:
            loop = self.federation.pid("loop")
            if loop is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(loop, signal.SIGKILL)
                    self.loops_killed += 1
            return
        here = [one for one in self.federation.silos[1:] if one not in self._away]
        if not here:
            return
        silo = self.draw.choice(here)
        if self.killed <= self.stopped:
            self.federation.kill(silo)
            self.killed += 1
        else:
            self.federation.stop(silo)
            self.stopped += 1
        self._away[silo] = time.monotonic() + self.draw.uniform(1.0, 15.0)

    def mend(self) -> None:
        """Start again what has been away for its time, and what has ended by itself."""
        for silo, until in list(self._away.items()):
            if time.monotonic() > until:
                del self._away[silo]
                self.federation.join(silo)
        for silo, process in list(self.federation.joined.items()):
            if process.poll() is not None:
                self._say_fell(silo, process.returncode)
                self.federation.join(silo)
        serving = self.federation.serving
        if serving is not None and serving.poll() is not None:
            self._say_fell("serve", serving.returncode)
            self.federation.serve()

    def _say_fell(self, name: str, code: int) -> None:
        self.fell += 1
        log = (self.federation.folder / f"{name}.log").read_text(errors="replace")
        print(f"{name} ended by itself with exit code {code}:\n{log[-2000:]}", file=sys.stderr)


@dataclass
class Progress:
    """Rounds that were finished, and updates left out of them, from the events."""

    events: EventFile
    rounds: int = 0
    dropped: int = 0

    def look(self) -> None:
        for event in self.events.new():
            if event["event"] == "round_finished":
                self.rounds = event["round"]
            elif event["event"] == "update_dropped":
                self.dropped += 1


def measure(federation: Federation) -> dict[str, float]:
    """Everything now, always the same names; NaN for what does not run at this moment."""
    found: dict[str, float] = {}

    def note(name: str, pid: int | None) -> None:
        one = sample(pid)
        found[f"{name} {RSS}"] = one.rss_bytes / 1e6 if one else math.nan
        found[f"{name} {FILES}"] = one.descriptors if one else math.nan

    for name, pid in federation.services().items():
        note(name, pid)
    for name, pid in federation.node_services(federation.silos[0]).items():
        note(f"node {name}", pid)
    home, run, nodes = federation.home, federation.run, federation.folder / "nodes"
    folders = {
        "store": disk_bytes(home / "store", leave_out=frozenset({LOGS})),
        "roster": sum(_size(one) for one in home.glob("*.sqlite*")),
        "serve.home": disk_bytes(home),
        "run folder": disk_bytes(run, leave_out=RECORDS),
        "run's records": sum(_size(run / one) for one in RECORDS),
        "nodes": disk_bytes(nodes, leave_out=frozenset({LOGS})),
        "logs": disk_bytes(home / LOGS)
        + sum(disk_bytes(nodes / silo / LOGS) for silo in federation.silos),
    }
    return found | {f"{name} {DISK}": size / 1e6 for name, size in folders.items()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


class Table:
    """The CSV file: a line for each look, on disk at once."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._columns: list[str] = []
        self.rows: list[dict[str, float]] = []

    def add(self, row: dict[str, float]) -> None:
        # As it is written: a table made of the file later is the same.
        row = {name: float(f"{value:.7g}") for name, value in row.items()}
        self.rows.append(row)
        if not self._columns:
            self._columns = list(row)
            csv.writer(self._file).writerow(self._columns)
        csv.writer(self._file).writerow(
            "" if math.isnan(row[name]) else f"{row[name]:.7g}" for name in self._columns
        )
        self._file.flush()
        os.fsync(self._file.fileno())


def read_table(path: Path) -> list[dict[str, float]]:
    """What a soak wrote; a line that was cut off is left out."""
    with path.open(encoding="utf-8", newline="") as file:
        found = csv.DictReader(file)
        return [
            {name: float(cell) if cell else math.nan for name, cell in row.items()}
            for row in found
            if None not in row.values()
        ]


def verdicts(rows: Sequence[dict[str, float]]) -> list[tuple[str, ...]]:
    """A line of the table for each thing measured."""
    found = []
    for name in (name for name in rows[0] if name not in COUNTERS):
        seen = [(row["hours"], row[name]) for row in rows if not math.isnan(row[name])]
        if len(seen) < 4:
            continue
        quarter = len(seen) // 4
        first, last = (
            statistics.median(value for _, value in part)
            for part in (seen[:quarter], seen[-quarter:])
        )
        span_h = statistics.median(at for at, _ in seen[-quarter:]) - statistics.median(
            at for at, _ in seen[:quarter]
        )
        slope = (last - first) / span_h if span_h > 0 else math.nan
        thing, _, kind = name.rpartition(" ")
        most = max(value for _, value in seen)
        cells = [f"{value:,.1f}" for value in (first, last, most)]
        found.append(
            (thing, _UNITS[kind], *cells, f"{slope:+,.2f}", _verdict(thing, kind, first, last))
        )
    return found


_UNITS = {RSS: "memory, MB", FILES: "open files", DISK: "disk, MB"}
#: Not held to be flat, and why.
_EXEMPT = {
    "run's records": "grows with rounds: what happened, kept for good",
    "logs": "bounded by rotation, 16 MiB each",
    "serve.home": "all of it, its logs too",
}


def _verdict(thing: str, kind: str, first: float, last: float) -> str:
    if thing in _EXEMPT:
        return _EXEMPT[thing]
    share, absolute = FLAT[kind]
    return "flat" if last - first <= max(share * first, absolute) else "**GROWS**"


def report(rows: Sequence[dict[str, float]]) -> str:
    """The whole result."""
    from trainer import machine, table

    if not rows:
        return f"# Soak, {machine()}\n\nNothing was measured yet.\n"
    last, late = rows[-1], rows[-1 - len(rows) // 4]
    head = ("what", "", "first quarter", "last quarter", "most", "an hour", "verdict")
    allowed = "; ".join(
        f"{_UNITS[kind]}: {share:.0%} or {absolute:g}" for kind, (share, absolute) in FLAT.items()
    )
    lines = verdicts(rows)
    growing = [f"{line[0]} ({line[1]})" for line in lines if "GROWS" in line[-1]]
    late_rounds = last["rounds"] - late["rounds"]
    if late_rounds <= 0:
        verdict = "No round was finished in the last quarter: this says nothing."
    elif growing:
        verdict = f"Grows: {', '.join(growing)}."
    else:
        verdict = "Everything is flat."
    return (
        f"# Soak of {last['hours']:.2f} hours, {machine()}\n\n"
        f"**{verdict}** {last['rounds']:.0f} rounds, {late_rounds:.0f} in the last quarter; "
        f"{last['dropped']:.0f} updates were left out. Of silos' nodes, {last['killed']:.0f} were "
        f"killed with -9 and {last['stopped']:.0f} stopped, and started again; the loop was "
        f"killed {last['loops_killed']:.0f} times; serve or a node ended by itself "
        f'{last["fell"]:.0f} times. {len(rows)} looks. "node" is a process of the silo that was '
        "left alone. Medians of the first and of the last quarter. Flat is a growth of at most, "
        f"{allowed}; whichever is more.\n\n{table(head, lines)}\n"
    )


def soak(options: argparse.Namespace, table: Table, on_row: Callable[[], None]) -> None:
    """Until the time is over. Raises SystemExit where something ends that should not."""
    with contextlib.ExitStack() as ends:
        scratch = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="photon-soak-")))
        data, silos = prepare_text(
            scratch / "corpus", options.silos, vocabulary=300, text=options.text
        )
        plan = Plan(preset="tiny", rounds=10**6, steps=options.steps, optimizer="adamw")
        federation = ends.enter_context(Federation(scratch / "soak", data, silos, plan))
        federation.begin()
        progress = Progress(EventFile(federation.run))

        def began() -> bool:
            progress.look()
            return progress.rounds > 0

        federation.wait("the first round is over", began, within_s=600)
        churn = Churn(federation, random.Random(options.seed), options.loop_every)
        started = time.monotonic()
        over = started + 3600 * options.hours
        next_look, next_strike, turn = started, started + options.churn_s / 2, 0
        while (now := time.monotonic()) < over:
            churn.mend()
            if now >= next_strike:
                turn += 1
                next_strike = max(now, next_strike + options.churn_s)
                churn.strike(turn=turn)
            if now >= next_look:
                next_look += options.look_s
                progress.look()
                counted = (
                    *((now - started) / 3600, progress.rounds, progress.dropped),
                    *(churn.killed, churn.stopped, churn.loops_killed, churn.fell),
                )
                table.add(dict(zip(COUNTERS, counted, strict=True)) | measure(federation))
                on_row()
            time.sleep(0.5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, help="4 by default; of --quick, a minute")
    parser.add_argument("--silos", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="local ones of a round")
    parser.add_argument("--churn-s", type=float, default=60, help="from one blow to the next")
    parser.add_argument("--look-s", type=float, default=60, help="from one look to the next")
    parser.add_argument(
        "--loop-every", type=int, default=20, help="every so manieth blow hits the loop"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is killed")
    parser.add_argument("--text", type=Path, help="a file or folder; made up by default")
    parser.add_argument("--report", type=Path, metavar="CSV", help="only the table of a soak")
    parser.add_argument("--quick", action="store_true", help="2 silos, a minute, more of each")
    parser.add_argument("--out", type=Path, help="write the table here too, and a CSV beside it")
    options = parser.parse_args()
    if options.quick:
        options.silos, options.churn_s, options.look_s, options.loop_every = 2, 15, 2, 3
    if options.hours is None:
        options.hours = 1 / 60 if options.quick else 4.0
    return options


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    failure: SystemExit | None = None
    if options.report:
        rows = read_table(options.report)
    else:
        with contextlib.ExitStack() as ends:
            if options.out:
                path = options.out.with_suffix(".csv")
                file = ends.enter_context(path.open("w", encoding="utf-8", newline=""))
            else:
                file = ends.enter_context(tempfile.TemporaryFile("w", encoding="utf-8"))
            table = Table(file)
            rows = table.rows

            def told() -> None:
                at = f"{rows[-1]['hours']:.3f} h, round {rows[-1]['rounds']:.0f}"
                print(at, file=sys.stderr)

            # However it ends, what was measured counts.
            try:
                soak(options, table, told)
            except KeyboardInterrupt:
                print("stopped; the table is of what was measured", file=sys.stderr)
            except SystemExit as error:
                failure = error
    text = report(rows)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    main()
