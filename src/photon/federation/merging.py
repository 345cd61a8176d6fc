"""Which updates are merged: each is checked, refused by name or given to the merging rule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from photon.aggregation import MergingRule, build_key_rule, build_merging_rule, check_update
from photon.aggregation.attention import AttentionMean
from photon.aggregation.check import Named, require_weight, square_sum
from photon.aggregation.keyed import KeyedRule
from photon.config import FederationConfig
from photon.config.parts import PartsConfig
from photon.errors import (
    AccessRefusedError,
    MachineError,
    ModelMismatchError,
    PhotonError,
    RunError,
    StoreUnavailableError,
    TransferStalledError,
)
from photon.federation.norm_bound import NormBound
from photon.federation.tasks import OPTIMIZER, WEIGHTS, GlobalState, Update
from photon.torch_threads import torch_threads

#: Where reading an update raises one of these, it is this side's trouble, and ends the round.
OURS = (
    AccessRefusedError,
    MachineError,
    RunError,
    StoreUnavailableError,
    TransferStalledError,
)
#: Anything else that it raises is the update's own fault.
FAULTS = (PhotonError, ValueError, LookupError, ArithmeticError, RuntimeError, TypeError)

#: Ends of the names of averaged second moments, which are no means of squares below 0.
_SECOND_MOMENTS = (".exp_avg_sq", ".max_exp_avg_sq", ".row_moment")

#: A median of vectors within a bound, coordinate by coordinate, lies within sqrt(2) of it.
_OF_A_MEDIAN = 1.415


@dataclass(frozen=True)
class Verdict:
    """On one update: how far its weights lie from the global ones, and why it was refused.

    Attributes:
        refused: None: it is merged.
        share: what it was multiplied with; 1 but for the unusually large.
    """

    norm: float = math.nan
    refused: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Merged:
    """A round's updates as one.

    Attributes:
        norm: how far its weights lie from the global ones.
        norms: the same of each update merged.
    """

    tensors: dict[str, Tensor]
    norm: float
    norms: list[float]


class Merging:
    """A round's updates, one after another, through the run's rule.

    An update is read twice, first to check it, so that nothing of a bad one is ever added, and
    what others sent is never read again for it. Its norm is how far its weights lie from the
    global ones: that of the delta it is, or of the one that adopted weights make.

    Args:
        config: the [federation] table.
        folder: where updates wait, if the rule must see all of them together.
        parts: the [parts] table, with the rule for key tensors.
        key: names of those, without a prefix.
    """

    def __init__(
        self,
        config: FederationConfig,
        folder: Path | None = None,
        parts: PartsConfig | None = None,
        key: Collection[str] = (),
    ) -> None:
        self.rule: MergingRule = build_merging_rule(config, folder)
        self.attention: AttentionMean | None = None
        if key:
            key_rule = build_key_rule(parts or PartsConfig(), config, folder)
            self.attention = key_rule if isinstance(key_rule, AttentionMean) else None
            self.rule = KeyedRule(self.rule, key_rule, [WEIGHTS + name for name in key])
        self._adopts = config.merge == "adopt"
        self._norms: list[float] = []
        self._steps: list[tuple[float, float]] = []

    def offer(
        self,
        update: Update,
        reference: GlobalState,
        weight: float,
        bound: NormBound | None = None,
        scale: float = 1.0,
    ) -> Verdict:
        """Merge an update, or say why not.

        Args:
            reference: the global state; names and shapes that the update must have.
            weight: its share before normalising.
            bound: on norms; none by default.
            scale: what the update is multiplied with before anything else: tau over the steps it
                took, where updates are normalised.
        """
        with torch_threads(_threads(update, reference)):
            try:
                require_weight(weight)
                norm, inner = self._measure(update.tensors(), reference)
                norm *= scale
            except OURS:
                raise
            except FAULTS as error:
                words = error.message if isinstance(error, PhotonError) else repr(error)[:300]
                return Verdict(refused=words)
            bound = bound or NormBound()
            refused = bound.refuse(norm, inner) or self.rule.refuse(norm)
            if refused is not None:
                return Verdict(norm, refused)
            # Adopted weights are no deltas: they are merged as they are, or refused.
            share = 1.0 if self._adopts else bound.share(norm)
            self.rule.add(_scaled(update.tensors(), share * scale), weight, norm * share)
            self._steps.append((weight, weight / scale))
            self._norms.append(norm * share)
            return Verdict(norm, None, share)

    def result(self, reference: GlobalState, bound: NormBound | None = None) -> Merged:
        """What the round came to; see MergingRule.result.

        Raises:
            RunError: it is not finite, or lies beyond the bound of each of its updates.
        """
        tensors = self.rule.result()
        norms, self._norms = self._norms, []
        steps, self._steps = self._steps, []
        weight = math.fsum(one for one, _ in steps)
        if (effective := math.fsum(one for _, one in steps)) != weight:
            # FedNova (arXiv 2007.07481), equation 6: tau_eff, the mean of the steps, over tau.
            for name, tensor in tensors.items():
                if not name.startswith(OPTIMIZER):
                    tensor.mul_(effective / weight)
        try:
            norm, _ = self._measure(tensors.items(), reference)
            most = (bound or NormBound()).norm * _OF_A_MEDIAN
            refused = None if norm <= most else f"its norm {norm:.4g} exceeds {most:.4g}"
        except PhotonError as error:
            norm, refused = math.nan, error.message
        if refused is not None:
            raise RunError(
                f"what the updates were merged into is not used: {refused}",
                hint="The global state is as it was. Look at update_norm in events.jsonl, and at "
                "the merging rule where it is a plugin's.",
            )
        return Merged(tensors, norm, norms)

    def discard(self) -> None:
        """Forget the round's updates."""
        self._norms, self._steps = [], []
        self.rule.discard()

    def _measure(self, tensors: Named, reference: GlobalState) -> tuple[float, float]:
        """The norms of an update's weights, as a delta, and of its inner-optimizer state."""
        inner = 0.0

        def measured(name: str, tensor: Tensor) -> Tensor | None:
            nonlocal inner
            if not name.startswith(OPTIMIZER):
                return reference[name] - tensor if self._adopts else tensor
            if name.endswith(_SECOND_MOMENTS) and bool((tensor < 0).any()):
                raise ModelMismatchError(f"tensor {name!r} holds second moments below 0")
            inner += square_sum(name, tensor)
            return None

        norm = check_update(tensors, reference, measured)
        return norm, math.sqrt(inner)


def _scaled(tensors: Named, share: float) -> Named:
    """An update's weights times a number; averaged inner state is left alone."""
    if share == 1.0:
        return tensors
    return ((name, one if name.startswith(OPTIMIZER) else share * one) for name, one in tensors)


def _threads(update: Update, reference: GlobalState) -> int:
    """PyTorch's share of this process's threads; the others' cores are left to those that hash.

    A thread of PyTorch's without work does not sleep, it spins, and takes from those that have
    some. Hashing a byte takes a core about twice as long as decoding and adding one of fp32.
    """
    fp32_bytes = sum(4 * tensor.numel() for tensor in reference.values())
    share = fp32_bytes / max(1, fp32_bytes + 2 * update.wire_bytes)
    return max(1, round(torch.get_num_threads() * share))
