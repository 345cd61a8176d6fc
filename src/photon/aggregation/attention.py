"""Key layers, merged by how alike their updates are (WorldLM, arXiv 2405.14446).

The paper's formulas could not be had, so this is our reconstruction. With D_j what constituent j
moved a layer by, from the anchor that all of them are held against, n_j its weight, P a random
projection and t a temperature,

    s_j = <P D_q, P D_j> / (|P D_q| |P D_j|),    alpha_j = n_j exp(s_j / t) / sum_i n_i exp(s_i / t)

and the layer moves by sum_j alpha_j D_j. The query D_q is the mean of the updates going up, and the
participant's own going down. Deltas are compared, as raw weights from one initialisation have a
cosine of about 1. With a very high temperature it is the weighted mean; with a very low one, going
down, each keeps its own layers.

A residual from elsewhere is one more constituent, with the members' mean weight, as federations
weigh in units of their own. The query is without it, and it counts as no longer than the longest.

FedAtt (Ji et al. 2019, arXiv 1812.07108) goes by distance: s_j = |D_j|, t = 1, no weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from photon.aggregation.check import Named, require_weight
from photon.aggregation.edit import module_of
from photon.aggregation.rule import MergingRule
from photon.aggregation.spool import Spool
from photon.config.parts import PartsConfig


class AttentionMean(MergingRule):
    """Each layer's updates weighted by how alike they are to their mean, or by FedAtt's distances.

    Memory: a projection of each update's layers; updates themselves wait on disk, see `Spool`. The
    order of arrival moves the result by some fp32 roundings.

    Args:
        parts: the [parts] table: key_rule, key_temperature, key_projection.
        folder: where updates wait.

    Attributes:
        shares: of the newest result, alpha of each update by layer, in their order.
        guests: residuals to merge too, by origin: tensors of some layers. Their shares come last.
        least: rho; a misfit gets less than so many times what its weight alone would give it.
        misfits: of the newest result, tensors by layer and number of the update.
        rows: of the newest result, each update's and guest's projections by layer.
    """

    def __init__(self, parts: PartsConfig, folder: Path | None = None) -> None:
        self._parts = parts
        self._spool = Spool(folder)
        self._weights: list[float] = []
        self._rows: list[dict[str, Tensor]] = []
        self.shares: dict[str, list[float]] = {}
        self.guests: Mapping[str, Mapping[str, Tensor]] = {}
        self.least = 0.0
        self.misfits: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.rows: list[dict[str, Tensor]] = []

    def add(self, tensors: Named, weight: float, norm: float) -> None:
        require_weight(weight)
        row: dict[str, Tensor] = {}

        def measured() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                _measure(row, name, tensor, self._parts)
                yield name, tensor

        self._spool.add(measured())
        self._rows.append(row)
        self._weights.append(weight)

    def result(self) -> dict[str, Tensor]:
        rows, weights, total = self._rows, self._weights, math.fsum(self._weights)
        for tensors in self.guests.values():
            row = projections(tensors, self._parts)
            longest = {name: max(own[name].norm() for own in self._rows) for name in row}
            lengths = {
                name: min(1.0, float(longest[name] / one.norm())) for name, one in row.items()
            }
            lent = {name: lengths[module_of(name)] * one for name, one in tensors.items()}
            shapes, rows = self._spool.shapes.items(), [*rows, row]
            self._spool.add((name, lent.get(name, torch.zeros(of.shape))) for name, of in shapes)
        shares = {}
        for module in rows[0] if rows else ():
            found = [row[module] for row in rows if module in row]
            if self._parts.key_rule == "fedatt":
                shares[module] = _softmax([math.sqrt(float(one)) for one in found])
                continue
            query = sum((n / total * one for n, one in zip(weights, found, strict=False)))
            every = weights + [total / len(weights)] * (len(found) - len(weights))
            given = iter(attention(query, found, every, self._parts.key_temperature))  # pyright: ignore[reportArgumentType]
            shares[module] = [next(given) if module in row else 0.0 for row in rows]
        misfits: dict[tuple[str, int], dict[str, list[Tensor]]] = {}

        def across(name: str, values: list[Tensor]) -> Tensor:
            merged, module = torch.zeros_like(values[0]), module_of(name)
            usual = self.least * math.fsum(shares[module][: len(weights)]) / total
            for place, (share, one) in enumerate(zip(shares[module], values, strict=True)):
                merged.add_(one, alpha=share)
                if place < len(weights) and share < usual * weights[place]:
                    cut = misfits.setdefault((module, place), {}).setdefault(name, [])
                    cut.append(one.clone())
            return merged

        merged = self._spool.reduce(across)
        self.discard()
        self.shares, self.rows = shares, rows
        self.misfits = {
            which: {name: torch.cat(cut).view_as(merged[name]) for name, cut in of.items()}
            for which, of in misfits.items()
        }
        return merged

    def discard(self) -> None:
        self._spool.discard()
        self._weights, self._rows = [], []
        self.shares, self.misfits, self.rows = {}, {}, []


def taken_up(
    parts: PartsConfig,
    anchor: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    above: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Key tensors with which a participant goes on, when a version comes from above.

    Args:
        parts: key_down says how; see there. "best" is as "attention" for who has no text.
        anchor: its key tensors before its newest task.
        own: after it.
        above: of the version.
    """
    if parts.key_down == "keep":
        return dict(own)
    moved: dict[str, list[dict[str, Tensor]]] = {}
    for name in own:
        mine, theirs = moved.setdefault(module_of(name), [{}, {}])
        mine[name], theirs[name] = own[name] - anchor[name], above[name] - anchor[name]
    taken = {}
    for both in moved.values():
        shares = [0.5, 0.5]
        if parts.key_down != "mean":
            (mine,), (theirs,) = (projections(deltas, parts).values() for deltas in both)
            shares = attention(mine, [mine, theirs], [1.0, 1.0], parts.key_temperature)
        for name in both[0]:
            taken[name] = anchor[name] + shares[0] * both[0][name] + shares[1] * both[1][name]
    return taken


def attention(
    query: Tensor, rows: list[Tensor], weights: list[float], temperature: float
) -> list[float]:
    """alpha_j, as above; they add up to 1. An update of nothing is alike to none: its cosine is 0.

    Args:
        query: (projection,) fp64, as all rows.
        weights: n_j > 0.
    """
    every = zip(rows, weights, strict=True)
    return _softmax([math.log(weight) + cosine(query, row) / temperature for row, weight in every])


def _softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def projections(tensors: Mapping[str, Tensor], parts: PartsConfig) -> dict[str, Tensor]:
    """P D (projection,) fp64 of each layer's update."""
    row: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        _measure(row, name, tensor, parts)
    return row


def cosine(one: Tensor, two: Tensor) -> float:
    """Of projections; of nothing to anything 0."""
    norms = float(one.norm() * two.norm())
    return float(one @ two) / norms if norms > 0 else 0.0


def _measure(row: dict[str, Tensor], name: str, tensor: Tensor, parts: PartsConfig) -> None:
    """Add a tensor to its module's projection, or square sum for FedAtt."""
    module, values = module_of(name), tensor.detach().reshape(-1).to("cpu", torch.float64)
    if parts.key_rule == "fedatt":
        found = values @ values
    else:
        found = _projected(name, values, parts.key_projection)
    row[module] = row[module] + found if module in row else found


def _projected(name: str, values: Tensor, size: int) -> Tensor:
    """A sketch (size,) whose inner products are, on average, those of the vectors.

    Signs are drawn by the tensor's name, so that all parties draw the same.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.rpartition("/")[2].encode()))
    signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8)
    padded = torch.zeros(-(-len(values) // size) * size, dtype=torch.float64)
    torch.mul(values, 2 * signs - 1, out=padded[: len(values)])
    return padded.view(-1, size).sum(0)
