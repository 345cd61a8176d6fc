"""Merging rules: many participants' tensors become one, as they arrive."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from photon.aggregation.check import require_same_names, require_shape
from photon.errors import ModelMismatchError, NodeError, QuorumLostError, RunError
from photon.plugins import MERGING_RULES, load_plugin


class MergingRule(ABC):
    """Merges the updates of one round, one participant at a time.

    Call `check_update` first: `add` consumes a stream, and one that breaks off half-way has already
    changed the accumulator. A plugin derives from this class and is built without arguments.
    """

    @abstractmethod
    def add(self, tensors: Iterable[tuple[str, torch.Tensor]], weight: float) -> None:
        """Take one participant's update, tensor by tensor; none is kept.

        Args:
            tensors: named tensors, any order, any floating dtype, on any device.
            weight: the participant's share before normalising, > 0; tokens n_k by default.

        Raises:
            ModelMismatchError: names or shapes differ from the round's first update.
            NodeError: the weight is not a finite number above zero.
            RunError: an earlier `add` of this round broke off; `discard` first.
        """

    @abstractmethod
    def result(self) -> dict[str, torch.Tensor]:
        """The merged tensors, fp32 on the CPU, in the first update's shapes; starts a new round.

        They are the rule's own buffers: change them freely, but copy what must outlive the first
        `add` of the next round.

        Raises:
            QuorumLostError: nothing was added.
            RunError: an `add` broke off; `discard` first.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget what was added since the last result."""


class WeightedMean(MergingRule):
    """sum_k w_k x_k / sum_k w_k as a running mean in fp32; one accumulator, whatever K.

    With W the weight so far: W <- W + w; mean <- mean + (x - mean) w / W. The first update is
    copied, so one participant's mean is its tensors bit for bit, and equal updates merge to
    themselves bit for bit. The order of arrival moves the result by about K fp32 roundings.
    """

    def __init__(self) -> None:
        self._mean: dict[str, torch.Tensor] = {}
        self._weight = 0.0
        self._broken = False

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]], weight: float) -> None:
        if not (math.isfinite(weight) and weight > 0):
            raise NodeError(
                f"an update's weight is {weight}; it must be a finite number above 0",
                hint="With tokens as weights, the node trained on no tokens.",
            )
        self._require_whole()
        self._broken = True
        if self._weight == 0.0:
            self._fill(tensors)
        else:
            self._move(tensors, weight / (self._weight + weight))
        self._weight += weight
        self._broken = False

    def result(self) -> dict[str, torch.Tensor]:
        self._require_whole()
        if self._weight == 0.0:
            raise QuorumLostError("no update was merged, so there is no mean")
        self._weight = 0.0
        return dict(self._mean)

    def discard(self) -> None:
        self._weight = 0.0
        self._broken = False

    def _fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        old, self._mean = self._mean, {}
        for name, tensor in tensors:
            if name in self._mean:
                raise ModelMismatchError(f"tensor {name!r} comes twice in the update")
            buffer = old.pop(name, None)
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty(tensor.shape, dtype=torch.float32)
            require_shape(name, tensor, buffer)
            self._mean[name] = buffer.copy_(tensor.detach())

    def _move(self, tensors: Iterable[tuple[str, torch.Tensor]], share: float) -> None:
        seen: set[str] = set()
        for name, tensor in tensors:
            if name not in self._mean or name in seen:
                require_same_names("the update", [*seen, name], self._mean)
                raise ModelMismatchError(f"tensor {name!r} comes twice in the update")
            seen.add(name)
            mean = self._mean[name]
            require_shape(name, tensor, mean)
            mean.lerp_(tensor.detach().to(mean), share)
        require_same_names("the update", seen, self._mean)

    def _require_whole(self) -> None:
        if self._broken:
            raise RunError(
                "an update broke off while it was merged, so this round's mean is lost",
                hint="Discard the round's updates and merge them again.",
            )


#: Names of `federation.merging_rule` that need no plugin.
BUILTIN_RULES: dict[str, type[MergingRule]] = {"mean": WeightedMean}


def build_merging_rule(name: str) -> MergingRule:
    """The built-in rule of that name, or the plugin's, freshly made.

    Raises:
        PluginError: neither exists, or the plugin can't be loaded.
    """
    kind = BUILTIN_RULES.get(name) or load_plugin(MERGING_RULES, name, MergingRule)
    return kind()
