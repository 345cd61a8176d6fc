"""The streaming aggregator: memory and speed of merging N updates of a model.

    python benchmarks/aggregator.py [--parameters 125] [--updates 2 8 32] [--out FILE.md]

A process of its own for each N holds a global state, reads N parcels from a folder, verifies,
decodes, checks and merges them, as the aggregator of a run does; its peak memory is the kernel's
(VmHWM). In the same process, afterwards, PyTorch takes the plain mean of as many updates that lie
in memory; both in turns, with the better of the turns of each taken.

The updates are four different ones, over and over: their bytes are read, hashed, decoded and merged
N times, but the disk holds four.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from photon.aggregation import WeightedMean, check_update
from photon.compression import build_codec
from photon.config.codecs import parse_codec
from photon.freed_memory import return_freed_memory
from photon.link import Entry, Expected, FolderStore, Header, Parcel, Ref, Transfer, write_parcel

DISTINCT = 4


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Of a GPT-like model with so many million parameters: the shapes of 125M, fewer layers."""
    found: dict[str, tuple[int, ...]] = {}
    width = 768 if parameters >= 20 else 128
    left = round(parameters * 1e6)
    rows = min(50304, left // (3 * width))
    found["embedding"] = (rows, width)
    left -= rows * width
    layer = 0
    while left > 12 * width * width:
        for name in ("q", "k", "v", "o"):
            found[f"layers.{layer}.{name}"] = (width, width)
        found[f"layers.{layer}.up"] = (4 * width, width)
        found[f"layers.{layer}.down"] = (width, 4 * width)
        found[f"layers.{layer}.norm"] = (width,)
        left -= 12 * width * width + width
        layer += 1
    found["rest"] = (max(1, left),)
    return found


def header(number: int) -> Header:
    return Header(kind="update", run="bench", round=1, silo=f"silo-{number}", model="bench")


def values(sized: dict[str, tuple[int, ...]], number: int) -> Iterator[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(number)
    for name, shape in sized.items():
        yield name, torch.randn(shape, generator=draw) * 1e-3


def written(folder: Path, sized: dict[str, tuple[int, ...]], codec: str) -> list[Ref]:
    """Some different updates, in a store."""
    carrier, encoder, spec = _carrier(folder), build_codec(codec), str(parse_codec(codec))
    return [
        write_parcel(
            carrier,
            codec.replace("(", "-").replace(")", ""),
            header(number),
            (
                Entry(name, tensor.shape, spec, encoder.encode(tensor))
                for name, tensor in values(sized, number)
            ),
        )
        for number in range(DISTINCT)
    ]


def _carrier(folder: Path) -> Transfer:
    return Transfer(FolderStore(folder, durable=False), streams=2)


def merge(folder: Path, refs: list[Ref], codec: str, state: dict[str, Tensor]) -> dict:
    """What a round's merging does, and how long it took."""
    rule, carrier = WeightedMean(), _carrier(folder)
    sized = {name: tensor.shape for name, tensor in state.items()}
    codecs = frozenset({str(parse_codec(codec))})
    started = time.perf_counter()
    for number, ref in enumerate(refs):
        parcel = Parcel(carrier, ref, Expected(header(number % DISTINCT), sized, codecs))
        norm = check_update(parcel.tensors(), state)
        rule.add(parcel.tensors(), 1.0, norm)
    rule.result()
    return {"seconds": time.perf_counter() - started}


def plain_mean(updates: list[dict[str, Tensor]]) -> float:
    """Seconds of a mean of updates that are in memory already."""
    started = time.perf_counter()
    for name in updates[0]:
        torch.stack([update[name] for update in updates]).mean(dim=0)
    return time.perf_counter() - started


def peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1.024e-3


def work(options: argparse.Namespace) -> None:
    """The process of one N: its JSON goes to stdout."""
    return_freed_memory()
    torch.set_num_threads(options.threads)
    sized = shapes(options.parameters)
    refs = [Ref(*ref) for ref in json.loads(options.refs)]
    many = [refs[number % DISTINCT] for number in range(options.count)]
    imports_mb = peak_mb()
    state = {name: torch.full(shape, 0.5) for name, shape in sized.items()}
    taken = [merge(options.folder, many, options.codec, state)["seconds"]]
    peak = peak_mb()
    distinct = [dict(values(sized, number)) for number in range(min(DISTINCT, options.count))]
    updates = [distinct[number % len(distinct)] for number in range(options.count)]
    plain = []
    for turn in range(options.repeats):
        plain.append(plain_mean(updates))
        if turn:
            taken.append(merge(options.folder, many, options.codec, state)["seconds"])
    values_bytes = 4 * sum(tensor.numel() for tensor in state.values()) * options.count
    print(
        json.dumps(
            {
                "peak_mb": peak,
                "imports_mb": imports_mb,
                "gb_per_s": values_bytes / min(taken) / 1e9,
                "plain_gb_per_s": values_bytes / min(plain) / 1e9,
                "model_mb": values_bytes / options.count / 1e6,
                "wire_mb": sum(ref.wire_bytes for ref in many) / 1e6,
            }
        )
    )


def measured(folder: Path, refs: list[Ref], codec: str, count: int, options) -> dict:
    given = json.dumps([[ref.key, ref.bytes, ref.sha256, ref.payload_bytes] for ref in refs])
    command = [sys.executable, __file__, "--work", "--folder", str(folder), "--refs", given]
    command += ["--codec", codec, "--count", str(count), "--parameters", str(options.parameters)]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(told.stderr)
    return json.loads(told.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=125, help="of the model, in millions")
    parser.add_argument("--updates", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--codec", action="append", help="fp32, int8 and sparseloco by default")
    parser.add_argument("--repeats", type=int, default=3)
    # Not asked of photon.training: this process is to be no larger than an aggregator's.
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    for internal in ("--work", "--folder", "--refs", "--count"):
        kind = {"action": "store_true"} if internal == "--work" else {}
        parser.add_argument(internal, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    if options.work:
        options.folder, options.count = Path(options.folder), int(options.count)
        options.codec = options.codec[0]
        work(options)
        return
    from trainer import machine, table

    if options.quick:
        options.parameters, options.updates, options.repeats = 2, [2, 4], 1
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for codec in options.codec or ["fp32", "int8", "sparseloco"]:
            refs = written(Path(scratch), shapes(options.parameters), codec)
            for count in options.updates:
                found = measured(Path(scratch), refs, codec, count, options)
                print(f"{codec}, {count} updates: {found}", file=sys.stderr)
                bound = 2 * found["model_mb"] + 300
                rows.append(
                    (
                        codec,
                        str(count),
                        f"{found['wire_mb']:,.0f}",
                        f"{found['peak_mb']:,.0f} of {bound:,.0f}",
                        f"{found['gb_per_s']:.2f}",
                        f"{found['plain_gb_per_s']:.2f}",
                        f"{found['gb_per_s'] / found['plain_gb_per_s']:.2f}",
                    )
                )
    head = ("codec", "updates", "MB read", "peak MB, of model x 2 + 300", "GB/s of fp32")
    head += ("plain mean in memory", "ratio")
    text = (
        f"# Streaming aggregator, {options.parameters:g} M parameters, {options.threads} threads, "
        f"{machine()}\n\n{table(head, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
