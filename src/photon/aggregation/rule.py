"""What a merging rule is: many participants' tensors become one, as they arrive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from photon.aggregation.check import Named, require_same_names


class MergingRule(ABC):
    """Merges the updates of one round, one participant at a time.

    For each update the federation calls `check_update`, `refuse`, then `add`; at the end of the
    round `result`, or `discard` if the round is given up. `add` consumes a stream, and one that
    breaks off half-way has already changed what the rule holds, so all that can be refused is
    refused before. A plugin derives from this class and is built without arguments.
    """

    def refuse(self, norm: float) -> str | None:
        """Why an update of this norm must not be merged, in words with figures; None if it may.

        An answer may depend on earlier rounds, never on earlier updates of this one: the order of
        arrival must not decide who takes part.

        Args:
            norm: L2 norm of the whole update, from `check_update`.
        """
        return None

    @abstractmethod
    def add(self, tensors: Named, weight: float, norm: float) -> None:
        """Take one participant's update, tensor by tensor; none is kept in memory.

        Args:
            tensors: named tensors, any order, any floating dtype, on any device.
            weight: the participant's share before normalising, > 0; tokens n_k by default.
            norm: L2 norm of the whole update, from `check_update`.

        Raises:
            ModelMismatchError: names or shapes differ from the round's first update.
            NodeError: the weight is not a finite number above zero.
            RunError: an earlier `add` of this round broke off; `discard` first.
        """

    @abstractmethod
    def result(self) -> dict[str, torch.Tensor]:
        """The merged tensors, fp32 on the CPU, in the first update's shapes; starts a new round.

        A rule that learns from round to round takes up this round's figures now, and only now.
        The tensors are the rule's own buffers: change them freely, but copy what must outlive the
        first `add` of the next round.

        Raises:
            QuorumLostError: nothing was added.
            RunError: an `add` broke off; `discard` first.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget what was added since the last result."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What the rule keeps from round to round, for the checkpoint; empty if it keeps nothing.

        Asked between rounds only.
        """
        return {}

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave (copied); empty starts afresh.

        Raises:
            ModelMismatchError: the tensors are not the state of this kind of rule. The old state
                is kept.
        """
        require_same_names(f"state of merging rule {type(self).__name__}", tensors, ())
