"""Rules that look at one coordinate of all updates together: median and trimmed mean.

Yin et al. 2018 (arXiv 1803.01498): with fewer than half (median), or a share of at most the
trimmed one (trimmed mean), of updates arbitrary, each coordinate of the result stays within the
range of the honest ones. All updates count alike; weights are checked and not used.

Values are sorted before they are summed, so the order of arrival does not change a bit. -0 counts
as 0 for the same reason. Memory is flat in K: updates wait on disk, see `Spool`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path

import torch

from photon.aggregation.check import Named, require_weight
from photon.aggregation.rule import MergingRule
from photon.aggregation.sorting_network import sort_across
from photon.aggregation.spool import Spool


class _Coordinatewise(MergingRule):
    """The mean, in each coordinate, of what is left when the largest and smallest are dropped."""

    def __init__(self, folder: Path | None = None) -> None:
        self._spool = Spool(folder)

    @abstractmethod
    def dropped(self, updates: int) -> int:
        """How many of so many updates are dropped at each end; less than half of them."""

    def add(self, tensors: Named, weight: float, norm: float) -> None:
        """As `MergingRule.add`, and:

        Raises:
            DiskFullError: no room for the update where updates wait.
        """
        require_weight(weight)
        self._spool.add(tensors)

    def result(self) -> dict[str, torch.Tensor]:
        return self._spool.reduce(self._middle)

    def discard(self) -> None:
        self._spool.discard()

    def _middle(self, name: str, rows: list[torch.Tensor]) -> torch.Tensor:
        # x + 0 turns -0 into 0: both compare equal, so arrival would decide which one is taken.
        ranked = sort_across([row.add_(0.0) for row in rows])
        dropped = self.dropped(len(ranked))
        kept = ranked[dropped : len(ranked) - dropped]
        total = kept[0].double()
        for row in kept[1:]:
            total.add_(row)
        return total.div_(len(kept))


class Median(_Coordinatewise):
    """The coordinate-wise median; of an even number, the mean of the two middle values."""

    def dropped(self, updates: int) -> int:
        return (updates - 1) // 2


class TrimmedMean(_Coordinatewise):
    """The coordinate-wise mean without the floor(trim K) largest and smallest of K values.

    With K < 1 / trim nothing is dropped, and it is the plain mean, open to any single update.

    Args:
        trim: `federation.trim`, in [0, 0.5).
        folder: where updates wait.
    """

    def __init__(self, trim: float, folder: Path | None = None) -> None:
        super().__init__(folder)
        self._trim = trim

    def dropped(self, updates: int) -> int:
        # 0.29 x 100 is 28.999999999999996 in fp64, and 29 is meant.
        return min(math.floor(self._trim * updates + 1e-9), (updates - 1) // 2)
