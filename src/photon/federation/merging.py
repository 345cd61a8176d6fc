"""Which updates are merged: each is checked, refused by name or given to the merging rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.aggregation import Checked, MergingRule, build_merging_rule, check_update
from photon.config import FederationConfig
from photon.errors import (
    ChunkCorruptError,
    ManifestError,
    ModelMismatchError,
    NonFiniteError,
    ObjectMissingError,
)
from photon.federation.tasks import GlobalState, Update
from photon.torch_threads import torch_threads

#: What is the update's own fault. Anything else ends the round.
_FAULTS = (
    NonFiniteError,
    ModelMismatchError,
    ManifestError,
    ChunkCorruptError,
    ObjectMissingError,
)


@dataclass(frozen=True)
class Verdict:
    """On one update: its L2 norm, and why it was refused (None: it is merged)."""

    norm: float = math.nan
    refused: str | None = None


class Merging:
    """A round's updates, one after another, through the run's rule.

    An update is read twice, first to check it, so that nothing of a bad one is ever added. Where
    updates last and the rule has no use for their norms, it is read once, checked as it is added;
    if it turns out bad, all is discarded and the good ones are added again, which gives the bits
    that never having seen it would give. That costs a second reading only where somebody sends
    something bad.

    Args:
        config: the [federation] table.
    """

    def __init__(self, config: FederationConfig) -> None:
        self._rule: MergingRule = build_merging_rule(config)
        self._max_norm = config.max_update_norm
        #: To be added once more after a bad one: update, weight, PyTorch's threads.
        self._again: list[tuple[Update, float, int]] = []

    def offer(self, update: Update, reference: GlobalState, weight: float) -> Verdict:
        """Merge an update, or say why not.

        Args:
            reference: names and shapes that it must have.
            weight: its share before normalising.
        """
        with torch_threads(_threads(update, reference)):
            if update.lasting and not self._rule.needs_norm:
                return self._in_one_pass(update, reference, weight)
            return self._in_two_passes(update, reference, weight)

    def result(self) -> dict[str, Tensor]:
        """The merged tensors; see MergingRule.result."""
        self._again.clear()
        return self._rule.result()

    def discard(self) -> None:
        """Forget the round's updates."""
        self._again.clear()
        self._rule.discard()

    def state_tensors(self) -> Mapping[str, Tensor]:
        """What the rule keeps from round to round."""
        return self._rule.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave."""
        self._rule.load_state_tensors(tensors)

    def _in_two_passes(self, update: Update, reference: GlobalState, weight: float) -> Verdict:
        try:
            norm = check_update(update.tensors(), reference)
        except _FAULTS as error:
            return Verdict(refused=error.message)
        refused = self._too_large(norm) or self._rule.refuse(norm)
        if refused is None:
            self._rule.add(update.tensors(), weight, norm)
        return Verdict(norm, refused)

    def _in_one_pass(self, update: Update, reference: GlobalState, weight: float) -> Verdict:
        checked = Checked(update.tensors(), reference)
        try:
            self._rule.add(checked, weight, math.nan)
        except _FAULTS as error:
            verdict = Verdict(refused=error.message)
        else:
            verdict = Verdict(checked.norm, self._too_large(checked.norm))
        if verdict.refused is None:
            self._again.append((update, weight, torch.get_num_threads()))
            return verdict
        self._rule.discard()
        for earlier, its_weight, threads in self._again:
            with torch_threads(threads):
                self._rule.add(earlier.tensors(), its_weight, math.nan)
        return verdict

    def _too_large(self, norm: float) -> str | None:
        if self._max_norm is not None and norm > self._max_norm:
            return f"its norm {norm:.4g} exceeds federation.max_update_norm = {self._max_norm:g}"
        return None


def _threads(update: Update, reference: GlobalState) -> int:
    """PyTorch's share of this process's threads; the others' cores are left to those that hash.

    A thread of PyTorch's without work does not sleep, it spins, and takes from those that have
    some. Hashing a byte takes a core about twice as long as decoding and adding one of fp32.
    """
    fp32_bytes = sum(4 * tensor.numel() for tensor in reference.values())
    share = fp32_bytes / max(1, fp32_bytes + 2 * update.wire_bytes)
    return max(1, round(torch.get_num_threads() * share))
