"""The loss by rows of logits against the plain one and torch's own: forward and backward.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/head_loss.py [--device cuda] [--out FILE.md]

They take turns in one process, in shuffled order. Rows at a time are tried around what
photon.models.rows_at_once chooses, which is marked.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from photon.models import rows_at_once
from photon.models.head_loss import head_loss
from photon.training.device import cores
from trainer import Spread, machine, table

#: Positions, width and vocabulary: the trainer benchmark's tiny and 30m, GPT-2's, Llama 3's.
SHAPES = {
    "cpu": [(1024, 128, 4096), (1024, 512, 4096), (1024, 256, 50257)],
    "cuda": [(16384, 768, 50257), (16384, 2048, 50257), (8192, 2048, 128256)],
}
QUICK = [(64, 16, 128)]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets)


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, by rows too, as many as it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden, weight, targets, options=options)


def by_rows(rows: int) -> Loss:
    return lambda hidden, weight, targets: head_loss(hidden, weight, targets, rows=rows)[0]


def seconds_of(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, bf16: bool) -> float:
    """Forward and backward, once."""
    hidden.grad = weight.grad = None
    kind = hidden.device.type
    if kind == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast(kind, torch.bfloat16, enabled=bf16):
        value = loss(hidden, weight, targets)
    value.backward()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(
    shape: tuple[int, int, int], device: str, repeats: int, shuffle: random.Random
) -> list[tuple[str, ...]]:
    """A row of the table for each number of rows at a time."""
    count, width, vocabulary = shape
    chosen = min(count, rows_at_once(vocabulary, device))
    hidden = torch.randn(count, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,), device=device)
    ways: dict[str, Loss] = {"plain": plain_loss, "torch's own": torch_loss}
    sizes = sorted({max(1, chosen // 4), chosen, min(count, 4 * chosen)})
    rows_of = {f"{rows} rows": rows for rows in sizes}
    ways |= {name: by_rows(rows) for name, rows in rows_of.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        names = list(ways)
        shuffle.shuffle(names)
        for name in names:
            gc.collect()
            taken = seconds_of(ways[name], hidden, weight, targets, bf16=device == "cuda")
            if repeat:  # the first warms up
                times[name].append(taken)
    rows: list[tuple[str, ...]] = []
    for name, taken in times.items():
        ratio = Spread.of([one / other for one, other in zip(times["plain"], taken, strict=True)])
        held = count if name == "plain" else rows_of.get(name)
        rows.append(
            (
                f"{count} x {width} x {vocabulary}",
                f"{name} (chosen)" if rows_of.get(name) == chosen else name,
                f"{1e3 * statistics.median(taken):.1f}",
                str(ratio),
                f"{4 * held * vocabulary / 2**20:,.0f}" if held else "",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shuffle = random.Random(0)
    rows: list[tuple[str, ...]] = []
    for shape in QUICK if options.quick else SHAPES[options.device]:
        print(f"{' x '.join(map(str, shape))}...", file=sys.stderr)
        repeats = 3 if options.quick else options.repeats
        rows += compare(shape, options.device, repeats, shuffle)
    head = ("positions x width x vocabulary", "way", "ms", "plain's time over it", "MiB of logits")
    text = f"# Loss by rows, {machine()}\n\n{table(head, rows)}\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
