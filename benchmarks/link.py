"""Codecs: GB/s of fp32 input, each way, and the bytes they leave.

    python benchmarks/link.py [--parameters 125] [--out FILE.md]

All codecs take turns in one process on the same tensor, with a plain copy of it, which says what
this machine's memory allows at that moment.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from photon.compression import CODECS, bytes_of
from photon.training.device import cores
from trainer import Spread, machine, table


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(count: int, repeats: int) -> list[tuple[str, ...]]:
    """A row for each codec."""
    values = torch.randn(count) * 1e-3
    copy = torch.empty_like(values)
    codecs = {name: make() for name, make in CODECS.items()}
    encoded = {name: codec.encode(values) for name, codec in codecs.items()}
    works: dict[tuple[str, str], Callable[[], object]] = {("copy", ""): lambda: copy.copy_(values)}
    for name, codec in codecs.items():
        works[name, "encode"] = lambda codec=codec: codec.encode(values)
        works[name, "decode"] = lambda codec=codec, name=name: codec.decode(encoded[name], (count,))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    shuffle = random.Random(0)
    for repeat in range(repeats + 1):
        keys = list(works)
        shuffle.shuffle(keys)
        for key in keys:
            taken = seconds_of(works[key])
            if repeat:  # the first warms up
                times[key].append(taken)
        print(f"round {repeat} of {repeats}", file=sys.stderr)
    copies = times["copy", ""]
    rows = [("plain copy", f"{4 * count / statistics.median(copies) / 1e9:.2f}", "", "", "", "1.0")]
    for name in codecs:
        cells: list[str] = []
        for way in ("encode", "decode"):
            taken = times[name, way]
            share = Spread.of([one / other for one, other in zip(copies, taken, strict=True)])
            cells += [f"{4 * count / statistics.median(taken) / 1e9:.2f}", str(share)]
        rows.append((name, *cells, f"{4 * count / bytes_of(encoded[name]):.1f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=125, help="of the tensor, in millions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="a small tensor, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = 100_000 if options.quick else round(options.parameters * 1e6)
    rows = compare(count, 2 if options.quick else options.repeats)
    head = ("codec", "encode GB/s", "of a copy", "decode GB/s", "of a copy", "times smaller")
    text = (
        f"# Codecs, {count / 1e6:g} M values, {options.threads} threads, {machine()}\n\n"
        f"GB/s of fp32; of a copy: median (quartiles) of alternated turns.\n\n{table(head, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
