"""The aggregator's side: who can be in a sum, the sum of sealed updates, and its opening."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from photon.errors import ProtocolError, QuorumLostError, RunError, some
from photon.secure.documents import Advert, Call, Closing, Cohort, Dealt, Revealed, Sealing
from photon.secure.fixed_point import FixedPoint
from photon.secure.masks import Masks, Words, derived, public_of
from photon.secure.member import pair_keys, pledge
from photon.secure.shares import SHARE_BYTES, joined

#: Values, and bytes, of an update that tell it from any other.
_TOLD_BY = 1 << 12
_WAY_OUT = (
    "A member sent what no honest one does. docs/secure-aggregation.md says how members can find "
    "it, by their consent, and how the run goes on."
)


def require_advert(call: Call, name: str, advert: Advert) -> None:
    """Raise ProtocolError for another attempt's advert."""
    if (advert.round, advert.attempt) != (call.round, call.attempt):
        raise ProtocolError(
            f"{name} advertised for round {advert.round}, attempt {advert.attempt}; asked for was "
            f"round {call.round}, attempt {call.attempt}"
        )


def require_dealt(cohort: Cohort, name: str, dealt: Dealt) -> None:
    """Raise ProtocolError for shares of another cohort, or for others than who is to hold them."""
    holders = cohort.holders[name]
    if dealt.cohort != cohort.id or not dealt.boxes.keys() == dealt.pledges.keys() == holders:
        raise ProtocolError(f"{name} dealt no shares to those who hold them in {cohort.round}")


def able(cohort: Cohort, dealt: Iterable[str]) -> list[str]:
    """Those of the members who dealt whose shares enough who did hold.

    Raises:
        QuorumLostError: they are fewer than the cohort's floor.
    """
    left = set(dealt)
    while few := {one for one in left if len(cohort.holders[one] & left) < cohort.threshold}:
        left -= few
    if len(left) < cohort.floor:
        raise QuorumLostError(
            f"of the {len(cohort.names)} members of round {cohort.round} {len(left)} dealt shares "
            f"to enough who did ({cohort.threshold}); {cohort.floor} are needed"
        )
    return sorted(left)


def closing_for(
    sealing: Sealing, name: str, survivors: Iterable[str], dealt: Mapping[str, Dealt]
) -> Closing:
    """What a member is asked, with the boxes that are for it."""
    holds = sorted(sealing.cohort.holders[name].intersection(sealing.dealt))
    boxes = {one: dealt[one].boxes[name] for one in holds}
    return Closing(sealing=sealing, survivors=sorted(survivors), boxes=boxes)


@dataclass
class SecureSum:
    """The sum of sealed updates; nothing of one of them is kept.

    Memory: two bytes for each value of the model, however many members.

    Attributes:
        shapes: of the tensors that each update has.
        survivors: whose updates are in it.
    """

    sealing: Sealing
    shapes: Mapping[str, tuple[int, ...]]
    survivors: list[str] = field(default_factory=list)
    _words: dict[str, Words] = field(default_factory=dict)
    _told_by: dict[bytes, str] = field(default_factory=dict)
    _broken: bool = False

    def add(self, name: str, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> str | None:
        """Take a member's update, or say why not; then nothing of it was taken.

        Args:
            tensors: its words, as fp32; walked twice.
        """
        if name in self.survivors:
            return "its update is in the sum already"
        if name not in self.sealing.dealt:
            return f"it dealt no shares for round {self.sealing.cohort.round}"
        first = self._checked(tensors())
        if isinstance(first, str):
            return first
        if (other := self._told_by.setdefault(first, name)) != name:
            return f"it sent the masked update of {other} once more"
        self._broken = True
        for tensor_name, tensor in tensors():
            words = tensor.flatten().int().numpy().astype(np.uint16)
            into = self._words.setdefault(tensor_name, np.zeros(len(words), np.uint16))
            into += words
        self.survivors.append(name)
        self._broken = False
        return None

    def _checked(self, tensors: Iterable[tuple[str, Tensor]]) -> str | bytes:
        """What is wrong with an update, or its first words."""
        missing, first, most = dict(self.shapes), b"", 1 << self.sealing.cohort.bits
        for name, tensor in tensors:
            if tuple(tensor.shape) != missing.pop(name, None):
                return f"its tensor {name!r} is none of the model's, or of another shape"
            if tensor.numel() and not bool(((tensor >= 0) & (tensor < most)).all()):
                return f"its tensor {name!r} is no masked one: values are from 0 to {most - 1}"
            first += tensor.flatten()[: max(0, _TOLD_BY - len(first))].numpy().tobytes()
        return f"its update lacks {some(missing)}" if missing else first

    def open(
        self,
        dealt: Mapping[str, Dealt],
        revealed: Mapping[str, Revealed],
        tell: Callable[[str], None],
    ) -> None:
        """Take the masks off.

        Args:
            revealed: by member, its shares.
            tell: told, in words, of shares that are wrong, and whose they are.

        Raises:
            QuorumLostError: too few shares of some secret, or one that does not give it; or the
                sum is beyond what honest updates come to.
        """
        cohort, survivors, keys = self.sealing.cohort, set(self.survivors), dict[bytes, int]()
        if self._broken:
            raise RunError(f"an update of round {cohort.round} broke off while it was added")
        for name in self.sealing.dealt:
            near = sorted(cohort.masks[name] & survivors)
            if name not in survivors and not near:
                continue
            secret = self._secret(name, dealt, revealed, tell)
            if name in survivors:
                good = pledge(cohort, name, name, secret) == dealt[name].own
                keys[derived(secret, "own mask", self.sealing.id)] = -1
            else:  # what it would have sent cancels what its neighbours did
                good = public_of(secret) == cohort.by_name[name].advert.mask_key
                keys |= pair_keys(secret, name, near, self.sealing)
            if not good:
                raise QuorumLostError(
                    f"{name} dealt shares in round {cohort.round} that do not give its secret; the "
                    "sum is not used",
                    hint=_WAY_OUT,
                )
        numbers, masks = FixedPoint.of(cohort), Masks(keys)
        most = sum(numbers.bound(cohort.by_name[one].weight) for one in survivors)
        for name, words in self._words.items():
            masks.add(words, name)
            signed = numbers.signed(words)
            if signed.size and (signed.max() > most or signed.min() < -most):
                raise QuorumLostError(
                    f"the sum of round {cohort.round} is not used: tensor {name!r} is beyond what "
                    f"{len(survivors)} honest updates come to",
                    hint=_WAY_OUT,
                )

    def mean(self) -> Iterator[tuple[str, Tensor]]:
        """Of the survivors' updates, by their weights, once it is open."""
        cohort = self.sealing.cohort
        weight = sum(cohort.by_name[one].weight for one in self.survivors)
        for name, words in self._words.items():
            mean = FixedPoint.of(cohort).mean(words, weight, cohort.ranges[name])
            yield name, mean.view(self.shapes[name])

    def _secret(
        self,
        name: str,
        dealt: Mapping[str, Dealt],
        revealed: Mapping[str, Revealed],
        tell: Callable[[str], None],
    ) -> bytes:
        """Of a survivor its own mask's, of another its key."""
        cohort, found, own = self.sealing.cohort, dict[int, int](), name in self.survivors
        for holder in sorted(cohort.holders[name] & revealed.keys()):
            if name in revealed[holder].unreadable:
                tell(f"{holder} could not open the box that {name} dealt it")
            if (text := revealed[holder].shares.get(name)) is None:
                continue
            share = bytes.fromhex(text)
            if pledge(cohort, name, holder, share) != dealt[name].pledges[holder][own]:
                tell(f"{holder} gave a wrong share of what {name} dealt; it is not used")
                continue
            found[1 + cohort.names.index(holder)] = int.from_bytes(share)
            if len(found) == cohort.threshold:
                # Of shares that are no polynomial's any number, of which 32 bytes are looked at.
                return joined(found).to_bytes(SHARE_BYTES)[1:]
        raise QuorumLostError(
            f"the sum of round {cohort.round} stays closed: {len(found)} shares of {name}'s "
            f"{'mask' if own else 'key'} came, {cohort.threshold} are needed",
            hint="More members dropped out than shares allow for; see docs/secure-aggregation.md.",
        )
