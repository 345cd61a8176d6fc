"""Two checkouts against each other: the benchmarks of each in turns, and ratios of what they say.

    git worktree add ../before COMMIT && make -C ../before install
    python benchmarks/against.py --before ../before --data DIR [--suite trainer ...] [--turns 3]

Each checkout runs its own scripts with its own .venv, so a change of either side's interface is no
matter; only the tables' labels have to agree. The one that goes first alternates. A ratio is the
median over turns of this checkout over the other, turned so that above 1 is better here; figures
that are ratios to a neighbour of the same minute (a bare loop, a copy, iperf3) drift least.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer import machine, table

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Suite:
    """One of the benchmarks.

    Attributes:
        command: words after python; {data} is --data.
        rows: of its tables, by a pattern over the whole line.
        columns: of these rows, each with whether more of it is better.
    """

    command: Sequence[str]
    rows: str
    columns: dict[str, bool]


SUITES = {
    "trainer": Suite(
        ("trainer.py", "--data", "{data}", "--worker-repeats", "0", "--repeats", "5"),
        r"tokens/s",
        {"ratio: median (quartiles)": True},
    ),
    "aggregator": Suite(
        ("aggregator.py", "--parameters", "60", "--updates", "8", "--codec", "{codec}"),
        r"^\| (fp32|int8)",
        {"GB/s of fp32": True},
    ),
    "link": Suite(
        ("link.py", "--parameters", "20", "--repeats", "5"),
        r"^\| (fp32|bf16|int8|int4|sparseloco|powersgd) \|",
        {"of a copy": True},
    ),
    "transfer": Suite(
        ("transfer.py", "--cells", "1000/0/0,200/100/0", "--seconds", "4", "--repeats", "2"),
        r"^\| \d+ \| \d+ \| [\d.]+ \|",
        {"of iperf3": True},
    ),
    "deployed": Suite(
        ("deployed.py", "--parameters", "0", "--rounds", "8"),
        r"\*\*",
        {"s": False, "**control**": False},
    ),
}


def figures(text: str, suite: Suite) -> Iterator[tuple[str, float]]:
    """What a suite's tables say: label and number."""
    head: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif re.search(suite.rows, line):
            seen: dict[str, int] = {}
            for name, cell in zip(head, cells, strict=False):
                seen[name] = seen.get(name, 0) + 1
                number = re.match(r"[*]*([\d,]+\.?\d*)", cell)
                if name in suite.columns and number:
                    twin = f" {seen[name]}" if seen[name] > 1 else ""
                    yield f"{cells[0]}, {name}{twin}", float(number[1].replace(",", ""))


def run(checkout: Path, suite: Suite, options: argparse.Namespace) -> dict[str, float]:
    found: dict[str, float] = {}
    for codec in ("fp32", "int8") if "{codec}" in suite.command else ("",):
        script, *words = (word.format(data=options.data, codec=codec) for word in suite.command)
        command = [checkout / ".venv" / "bin" / "python", checkout / "benchmarks" / script, *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stderr[-3000:]}")
        found |= dict(figures(done.stdout, suite))
    return found


def compare(options: argparse.Namespace) -> Iterator[list[str]]:
    for name in options.suite:
        suite, turns = SUITES[name], []
        for turn in range(options.turns):
            sides = {"here": HERE, "before": options.before}
            order = sides if turn % 2 else dict(reversed(sides.items()))
            told = {side: run(checkout, suite, options) for side, checkout in order.items()}
            turns.append(told)
            print(f"{name}, turn {turn + 1}: {told}", file=sys.stderr)
        for label in turns[0]["here"]:
            pairs = [(one["here"][label], one["before"][label]) for one in turns]
            better = next(up for column, up in suite.columns.items() if f", {column}" in label)
            ratios = [here / before if better else before / here for here, before in pairs]
            yield [
                name,
                label,
                *(f"{statistics.median(side):,.3g}" for side in zip(*pairs, strict=True)),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, installed")
    parser.add_argument("--data", type=Path, help="prepared, for the trainer")
    parser.add_argument("--suite", action="append", choices=SUITES, help="all by default")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    options.suite = options.suite or list(SUITES)
    if "trainer" in options.suite and options.data is None:
        parser.error("the trainer needs --data")
    rows = list(compare(options))
    commit = subprocess.run(
        ["git", "-C", options.before, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    head = ["benchmark", "figure", "here", "before", "ratio: median (least to most)"]
    text = f"# Against {commit}, {options.turns} turns each, {machine()}\n\n{table(head, rows)}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
