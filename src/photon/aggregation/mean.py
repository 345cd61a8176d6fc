"""Weighted means of updates: as they are, or clipped to a norm first."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from photon.aggregation.check import Named, require_weight
from photon.aggregation.rule import MergingRule
from photon.aggregation.running_mean import RunningMean
from photon.errors import IncompatibleConfigError


class WeightedMean(MergingRule):
    """sum_k w_k x_k / sum_k w_k as a running mean in fp32; one accumulator, whatever K.

    With W the weight so far: W <- W + w; mean <- mean + (x - mean) w / W. The first update is
    copied, so one participant's mean is its tensors bit for bit, and equal updates merge to
    themselves bit for bit. The order of arrival moves the result by about K fp32 roundings.
    """

    def __init__(self) -> None:
        self._mean = RunningMean()
        self._weight = 0.0

    def add(self, tensors: Named, weight: float, norm: float = 0.0) -> None:
        require_weight(weight)
        share = weight / (self._weight + weight)
        self._mean.add(tensors, lambda _: share)
        self._weight += weight

    def result(self) -> dict[str, torch.Tensor]:
        mean = self._mean.take()
        self._weight = 0.0
        return mean

    def discard(self) -> None:
        self._mean.discard()
        self._weight = 0.0


class ClippedMean(WeightedMean):
    """sum_k w_k x_k min(1, c / |x_k|) / sum_k w_k, with |x_k| the L2 norm of the whole update.

    The norm clipping of Sun et al. 2019 (arXiv 1911.07963): whatever a participant sends, its part
    of the result is at most c w_k / sum w, and that of the result itself at most c (both within
    fp32 rounding). Updates of norm c or less are merged bit for bit as by `WeightedMean`; the order
    of arrival moves the result by about K fp32 roundings of the largest clipped magnitude.

    Args:
        bound: c, `federation.clip_update_norm`, > 0; in the units of the update.

    Raises:
        IncompatibleConfigError: there is no bound.
    """

    def __init__(self, bound: float | None) -> None:
        super().__init__()
        if bound is None:
            raise IncompatibleConfigError(
                'federation.merging_rule = "clipped_mean" needs federation.clip_update_norm'
            )
        self._bound = bound

    def add(self, tensors: Named, weight: float, norm: float = 0.0) -> None:
        if norm > self._bound:
            tensors = _scaled(tensors, self._bound / norm)
        super().add(tensors, weight)


def _scaled(tensors: Named, factor: float) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        # Integers pass as they are: to be refused by name, which a product in fp32 would hide.
        whole = tensor.detach()
        yield name, whole.float() * factor if whole.is_floating_point() else whole
