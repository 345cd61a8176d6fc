"""Codecs: GB/s of fp32 input, each way, and the bytes they leave.

    python benchmarks/link.py [--parameters 125] [--out FILE.md]

All codecs take turns in one process on the same update, with a plain copy of it, which says what
this machine's memory allows at that moment. The update is shaped like a llama's: a token embedding
and layers of seven matrices, each a few directions and noise. Encoding is of the whole update, with
what a codec must know of it first (top-k's threshold) and keeps of the last (PowerSGD's basis).
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
from torch import Tensor

from photon.compression import build_codec
from photon.compression.codec import Memory, Parts, bytes_of
from photon.training.device import cores
from trainer import Spread, machine, table

SPECS = (
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "int4",
    "fp4",
    "sign",
    "fp32+zstd(level=1)",
    "fp32+zstd(level=3)",
    "bf16+zstd(level=1)",
    "bf16+zstd(level=3)",
    "topk(density=0.01)+int8",
    "sparseloco",
    "lowrank",
    "powersgd",
)


def shapes_of(parameters: float) -> list[tuple[int, int]]:
    """Matrices of a llama of about that size: a vocabulary of 50,304 for a width of 768."""
    width = 64 * max(1, round(12 * (parameters / 125e6) ** 0.5))
    vocabulary = 131 * width // 2
    of_layer = [(width, width)] * 4 + [(4 * width, width)] * 2 + [(width, 4 * width)]
    size = sum(rows * columns for rows, columns in of_layer)
    layers = max(1, round((parameters - vocabulary * width) / size))
    return [(vocabulary, width), *of_layer * layers]


def update_of(shapes: list[tuple[int, int]], rank: int = 16) -> list[Tensor]:
    """Tensors that a few directions make up to nine tenths, so that low rank has a point."""
    return [
        (torch.randn(m, rank) @ torch.randn(rank, n) * (3 / rank**0.5) + torch.randn(m, n)) * 1e-4
        for m, n in shapes
    ]


class Contestant:
    """A codec with the update that it encodes in each turn."""

    def __init__(self, spec: str, update: list[Tensor]) -> None:
        self._codec = build_codec(spec)
        self._update = update
        self._memories: list[Memory] = [{} for _ in update]
        self.encoded: list[Parts] = []

    def encode(self) -> None:
        codec = self._codec.fitted(lambda: [("", tensor) for tensor in self._update])
        pairs = zip(self._update, self._memories, strict=True)
        self.encoded = [codec.encode(tensor, memory) for tensor, memory in pairs]

    def decode(self) -> None:
        for parts, tensor in zip(self.encoded, self._update, strict=True):
            self._codec.decode(parts, tensor.shape)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(update: list[Tensor], repeats: int) -> list[tuple[str, ...]]:
    """A row for each codec."""
    size = sum(tensor.nbytes for tensor in update)
    copy = [torch.empty_like(tensor) for tensor in update]

    def plain() -> None:
        for target, source in zip(copy, update, strict=True):
            target.copy_(source)

    codecs = {spec: Contestant(spec, update) for spec in SPECS}
    for codec in codecs.values():
        codec.encode()
    works: dict[tuple[str, str], Callable[[], object]] = {("copy", ""): plain}
    for spec, codec in codecs.items():
        works[spec, "encode"], works[spec, "decode"] = codec.encode, codec.decode
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
    rows = [("plain copy", f"{size / statistics.median(copies) / 1e9:.2f}", "", "", "", "1.0")]
    for spec, codec in codecs.items():
        cells: list[str] = []
        for way in ("encode", "decode"):
            taken = times[spec, way]
            share = Spread.of([one / other for one, other in zip(copies, taken, strict=True)])
            cells += [f"{size / statistics.median(taken) / 1e9:.2f}", str(share)]
        rows.append((spec, *cells, f"{size / sum(map(bytes_of, codec.encoded)):.1f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=125, help="of the update, in millions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="a small update, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    update = update_of(shapes_of(1e5 if options.quick else options.parameters * 1e6))
    count = sum(tensor.numel() for tensor in update)
    rows = compare(update, 2 if options.quick else options.repeats)
    head = ("codec", "encode GB/s", "of a copy", "decode GB/s", "of a copy", "times smaller")
    text = (
        f"# Codecs, {count / 1e6:.4g} M values in {len(update)} matrices, {options.threads} "
        f"threads, {machine()}\n\n"
        f"GB/s of fp32; of a copy: median (quartiles) of alternated turns.\n\n{table(head, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
