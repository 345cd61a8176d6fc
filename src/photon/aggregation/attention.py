"""Key layers, merged by how alike their updates are (WorldLM, arXiv 2405.14446).

The paper's formulas could not be had, so this is our reconstruction. With D_j what constituent j
moved a layer by, from the anchor that all of them are held against, n_j its weight, P a random
projection and t a temperature,

    s_j = <P D_q, P D_j> / (|P D_q| |P D_j|),    alpha_j = n_j exp(s_j / t) / sum_i n_i exp(s_i / t)

and the layer moves by sum_j alpha_j D_j. The query D_q is the mean of the updates going up, and the
participant's own going down. Deltas are compared, as raw weights from one initialisation have a
cosine of about 1. With a very high temperature it is the weighted mean; with a very low one, going
down, each keeps its own layers.

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
    """

    def __init__(self, parts: PartsConfig, folder: Path | None = None) -> None:
        self._parts = parts
        self._spool = Spool(folder)
        self._weights: list[float] = []
        self._rows: list[dict[str, Tensor]] = []
        self._shares: dict[str, list[float]] = {}

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
        rows, weights = self._rows, self._weights
        shares = {}
        for module in rows[0] if rows else ():
            found = [row[module] for row in rows]
            if self._parts.key_rule == "fedatt":
                shares[module] = _softmax([math.sqrt(float(one)) for one in found])
            else:
                total = math.fsum(weights)
                query = sum((n / total * one for n, one in zip(weights, found, strict=True)))
                shares[module] = attention(query, found, weights, self._parts.key_temperature)  # pyright: ignore[reportArgumentType]

        def across(name: str, values: list[Tensor]) -> Tensor:
            merged = torch.zeros_like(values[0])
            for share, one in zip(shares[module_of(name)], values, strict=True):
                merged.add_(one, alpha=share)
            return merged

        merged = self._spool.reduce(across)
        self.discard()
        self._shares = shares
        return merged

    def shares(self) -> dict[str, list[float]]:
        return self._shares

    def discard(self) -> None:
        self._spool.discard()
        self._weights, self._rows, self._shares = [], [], {}


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
            rows: list[dict[str, Tensor]] = [{}, {}]
            for row, deltas in zip(rows, both, strict=True):
                for name, delta in deltas.items():
                    _measure(row, name, delta, parts)
            (mine,), (theirs,) = (row.values() for row in rows)
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
    scores = []
    for row, weight in zip(rows, weights, strict=True):
        norms = float(query.norm() * row.norm())
        cosine = float(query @ row) / norms if norms > 0 else 0.0
        scores.append(math.log(weight) + cosine / temperature)
    return _softmax(scores)


def _softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    return [power / math.fsum(powers) for power in powers]


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
