"""One fp32 accumulator that follows a mean as tensors stream by."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from photon.aggregation.check import Named, matching, require_shape
from photon.errors import ModelMismatchError, QuorumLostError, RunError


class RunningMean:
    """mean <- mean + (x - mean) share; memory is one model, whatever the number of updates.

    The first update is copied, so one participant's mean is its tensors bit for bit, and equal
    updates merge to themselves bit for bit. With shares s_k that add up to 1 in the end, the order
    of updates moves the result by about K fp32 roundings of the largest magnitude.
    """

    def __init__(self) -> None:
        self._mean: dict[str, torch.Tensor] = {}
        self._empty = True
        self._broken = False

    def add(self, tensors: Named, share: Callable[[str], float]) -> None:
        """Move the mean towards one update.

        Args:
            tensors: named tensors, any order, any floating dtype, on any device.
            share: of a tensor: the update's weight over the weight of all so far, itself included;
                in [0, 1]. Asked once the tensor has come; not for the first update.

        Raises:
            ModelMismatchError: names or shapes differ from the round's first update.
            RunError: an earlier update broke off; `discard` first.
        """
        self._require_whole()
        self._broken = True
        if self._empty:
            self._fill(tensors)
        else:
            for name, tensor in matching(tensors, self._mean):
                mean = self._mean[name]
                mean.lerp_(tensor.detach().to(mean), share(name))
        self._empty = False
        self._broken = False

    @property
    def names(self) -> Collection[str]:
        """Of the tensors that every update has; none before the first."""
        return () if self._empty else self._mean.keys()

    def take(self) -> dict[str, torch.Tensor]:
        """The mean, fp32 on the CPU, valid until the next `add`, which starts a new one.

        Raises:
            QuorumLostError: nothing was added.
            RunError: an `add` broke off; `discard` first.
        """
        self._require_whole()
        if self._empty:
            raise QuorumLostError("no update was merged, so there is no mean")
        self._empty = True
        return dict(self._mean)

    def discard(self) -> None:
        """Forget what was added."""
        self._empty = True
        self._broken = False

    def _fill(self, tensors: Named) -> None:
        old, self._mean = self._mean, {}
        for name, tensor in tensors:
            if name in self._mean:
                raise ModelMismatchError(f"tensor {name!r} comes twice in the update")
            buffer = old.pop(name, None)
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty(tensor.shape, dtype=torch.float32)
            require_shape(name, tensor, buffer)
            self._mean[name] = buffer.copy_(tensor.detach())

    def _require_whole(self) -> None:
        if self._broken:
            raise RunError(
                "an update broke off while it was merged, so this round's mean is lost",
                hint="Discard the round's updates and merge them again.",
            )
