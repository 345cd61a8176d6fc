"""The streaming aggregator: memory and speed of merging N updates of a model.

    python benchmarks/aggregator.py [--parameters 125] [--updates 2 8 32] [--key-rule attention]
        [--out FILE.md]

A process of its own for each N reads N parcels from a folder, verifies, decodes, checks and merges
them, as the aggregator of a run does; its peak memory is the kernel's (VmHWM), Python and PyTorch
included (250 MB). With --state it holds a global state beside them, as in a run.

Another process, with PyTorch's and glibc's defaults, takes the plain mean of updates that lie in
its memory: torch.stack(updates).mean(0) for each tensor, and the fastest way there is, a running
sum. Neither reads, hashes, decodes or checks a byte. The medians of their turns are compared. The
process also takes the SHA-256 of the same memory with every thread, and does nothing else: whoever
verifies fp32 updates can't be faster than that.

With --key-rule the last 30% of the parameters are merged by that rule, as [parts] would have it.
With --turns N each of several such rules takes N turns, one after another, each time in a process
of its own; the seconds of turns of one number, wall and process, are held against the first rule's.

The updates are four different ones, over and over: their bytes are read, hashed, decoded and merged
N times, but disk and memory hold four.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from photon.compression import build_codec
from photon.config import FederationConfig
from photon.config.codecs import parse_codec
from photon.config.parts import PartsConfig
from photon.federation.merging import Merging
from photon.federation.tasks import WEIGHTS, Receipt, Update
from photon.freed_memory import share_freed_memory
from photon.link import Entry, Expected, Header, Parcel, Ref, write_parcel
from photon.store.contract import FolderStore
from photon.store.memory import ReusedMemory
from photon.store.transfer import Transfer

DISTINCT = 4
#: As an engine's.
MEMORY = ReusedMemory()


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
    return {WEIGHTS + name: shape for name, shape in found.items()}


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
    return Transfer(FolderStore(folder, durable=False, memory=MEMORY), streams=4)


def tensors(carrier: Transfer, ref: Ref, expected: Expected) -> Iterator[tuple[str, Tensor]]:
    yield from Parcel(carrier, ref, expected, MEMORY).tensors()


def merge(
    merging: Merging, folder: Path, refs: list[Ref], codec: str, state: dict[str, Tensor]
) -> float:
    """Seconds of what a round's merging does."""
    carrier = _carrier(folder)
    sized = {name: tensor.shape for name, tensor in state.items()}
    codecs = frozenset({str(parse_codec(codec))})
    started = time.perf_counter()
    for number, ref in enumerate(refs):
        expected = Expected(header(number % DISTINCT), sized, codecs)
        update = Update(
            Receipt(1, f"silo-{number}"),
            partial(tensors, carrier, ref, expected),
            wire_bytes=ref.payload_bytes,
        )
        assert merging.offer(update, state, 1.0).refused is None
    merging.result(state)
    return time.perf_counter() - started


def stacked_mean(updates: list[dict[str, Tensor]]) -> None:
    for name in updates[0]:
        torch.stack([update[name] for update in updates]).mean(dim=0)


def running_sum(updates: list[dict[str, Tensor]]) -> None:
    total = {name: tensor.clone() for name, tensor in updates[0].items()}
    for update in updates[1:]:
        for name, tensor in total.items():
            tensor.add_(update[name])
    for tensor in total.values():
        tensor.div_(len(updates))


def hashed(updates: list[dict[str, Tensor]]) -> None:
    todo = [tensor.numpy() for update in updates for tensor in update.values()]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(sha256, sorted(todo, key=lambda array: -array.nbytes)):
            pass


def peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1.024e-3


def work(options: argparse.Namespace) -> None:
    """One process of one N: its JSON goes to stdout."""
    torch.set_num_threads(options.threads)
    sized = shapes(options.parameters)
    values_bytes = 4 * sum(math.prod(shape) for shape in sized.values()) * options.count
    found: dict[str, float] = {"model_mb": values_bytes / options.count / 1e6}
    if options.work == "merge":
        share_freed_memory()
        refs = [Ref(*ref) for ref in json.loads(options.refs)]
        many = [refs[number % DISTINCT] for number in range(options.count)]
        device = "cpu" if options.state else "meta"
        state = {name: torch.full(shape, 0.5, device=device) for name, shape in sized.items()}
        parts, key = None, []
        if options.key_rule:
            parts = PartsConfig(key=["*"], key_rule=options.key_rule[0])
            total = sum(one.numel() for one in state.values())
            before = itertools.accumulate(one.numel() for one in state.values())
            late = [name for name, end in zip(state, before, strict=True) if end > 0.7 * total]
            key = [name.removeprefix(WEIGHTS) for name in late]
        # As a run's: from round to round.
        merging = Merging(FederationConfig(), options.folder, parts, key)
        began_s = time.process_time()
        times = [
            merge(merging, options.folder, many, options.codec, state)
            for _ in range(options.repeats)
        ]
        found |= {"cpu_s": (time.process_time() - began_s) / options.repeats}
        found |= {"gb_per_s": values_bytes / statistics.median(times) / 1e9}
        found |= {"seconds": statistics.median(times)}
        found |= {"peak_mb": peak_mb(), "wire_mb": sum(ref.wire_bytes for ref in many) / 1e6}
    else:
        distinct = [dict(values(sized, number)) for number in range(min(DISTINCT, options.count))]
        updates = [distinct[number % len(distinct)] for number in range(options.count)]
        for name, turn in (("stacked", stacked_mean), ("running", running_sum), ("hashed", hashed)):
            times = []
            for _ in range(options.repeats):
                started = time.perf_counter()
                turn(updates)
                times.append(time.perf_counter() - started)
            found[name] = values_bytes / statistics.median(times) / 1e9
    print(json.dumps(found))


def measured(
    work: str, folder: Path, refs: list[Ref], codec: str, count: int, options, rule: str | None
) -> dict:
    given = json.dumps([[ref.key, ref.bytes, ref.sha256, ref.payload_bytes] for ref in refs])
    command = [sys.executable, __file__, "--work", work, "--folder", str(folder), "--refs", given]
    command += ["--codec", codec, "--count", str(count), "--parameters", str(options.parameters)]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    command += ["--state"] if options.state else []
    command += ["--key-rule", rule] if rule else []
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(told.stderr)
    return json.loads(told.stdout)


def in_turns(folder: Path, refs: list[Ref], codec: str, count: int, options) -> list[list[str]]:
    """Rows: each rule's seconds, and how many times the first's, with the least and the most."""
    found: dict[str, list[dict]] = {rule: [] for rule in options.key_rule}
    for turn, rule in itertools.product(range(options.turns), found):
        found[rule].append(measured("merge", folder, refs, codec, count, options, rule))
        print(f"{codec}, {rule}, turn {turn + 1}: {found[rule][-1]}", file=sys.stderr)
    rows = []
    for rule, turns in found.items():
        spread = []
        for name in ("seconds", "cpu_s"):
            mine, its = (
                [one[name] for one in some] for some in (turns, found[options.key_rule[0]])
            )
            ratios = [a / b for a, b in zip(mine, its, strict=True)]
            spread += [
                f"{statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f})"
                for some in (mine, ratios)
            ]
        peak_mb = max(one["peak_mb"] for one in turns)
        rows.append([codec, rule, str(count), *spread, f"{peak_mb:,.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=125, help="of the model, in millions")
    parser.add_argument("--updates", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--codec", action="append", help="fp32, int8 and sparseloco by default")
    parser.add_argument("--key-rule", action="append", help="of the last 30%%; none by default")
    parser.add_argument("--turns", type=int, default=0, help="of each --key-rule, and nothing else")
    parser.add_argument("--repeats", type=int, default=3)
    # Not asked of photon.training: this process is to be no larger than an aggregator's.
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--state", action="store_true", help="hold a global state beside them")
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    for internal in ("--work", "--folder", "--refs", "--count"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
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
            if options.turns:
                for count in options.updates:
                    rows += in_turns(Path(scratch), refs, codec, count, options)
                continue
            turns = itertools.product(options.updates, [None, *(options.key_rule or [])])
            for count, rule in turns:
                found: dict[str, float] = {}
                for process in ("merge", "plain"):
                    found |= measured(process, Path(scratch), refs, codec, count, options, rule)
                print(f"{codec}, {rule}, {count} updates: {found}", file=sys.stderr)
                bound = 2 * found["model_mb"] + 300
                rows.append(
                    (
                        codec,
                        rule or "as the rest",
                        str(count),
                        f"{found['wire_mb']:,.0f}",
                        f"{found['peak_mb']:,.0f} of {bound:,.0f}",
                        f"{found['gb_per_s']:.2f}",
                        f"{found['stacked']:.2f}",
                        f"{found['gb_per_s'] / found['stacked']:.2f}",
                        f"{found['running']:.2f}",
                        f"{found['hashed']:.2f}",
                    )
                )
    head = (
        "codec",
        "key layers",
        "updates",
        "MB read",
        "peak MB, of model x 2 + 300",
        "GB/s of fp32",
    )
    head += ("stack and mean in memory", "ratio", "running sum in memory", "SHA-256 in memory")
    if options.turns:
        head = (*head[:3], "wall, s", "times the first", "CPU, s", "times the first", "peak MB")
    text = (
        f"# Streaming aggregator, {options.parameters:g} M parameters, {options.threads} threads, "
        f"{machine()}\n\n{table(head, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
