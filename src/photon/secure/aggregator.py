"""The aggregator's side: who can be in a sum, the sum of sealed updates, and its opening."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from photon.errors import ProtocolError, QuorumLostError, some
from photon.secure.documents import Advert, Call, Cohort, Dealt, Revealed
from photon.secure.fixed_point import FixedPoint
from photon.secure.masks import Masks, Words, agreed, derived, public_of, unboxed
from photon.secure.member import COUNT, pair_keys
from photon.secure.shares import SHARE_BYTES, joined

#: Values of an update that tell it from any other.
_TOLD_BY = 1 << 10


def require_advert(call: Call, name: str, advert: Advert) -> None:
    """Raise ProtocolError for another attempt's advert, or keys with which everybody agrees."""
    if (advert.round, advert.attempt) != (call.round, call.attempt):
        raise ProtocolError(
            f"{name} advertised for round {advert.round}, attempt {advert.attempt}; asked for was "
            f"round {call.round}, attempt {call.attempt}"
        )
    for key in (advert.mask_key, advert.box_key):
        agreed(secrets.token_bytes(32), key)


def require_dealt(cohort: Cohort, name: str, dealt: Dealt) -> None:
    """Raise ProtocolError for shares of another cohort, or for others than who is to hold them."""
    if dealt.cohort != cohort.id or dealt.boxes.keys() != cohort.holders[name]:
        raise ProtocolError(f"{name} dealt no shares for its holders in round {cohort.round}")


@dataclass
class SecureSum:
    """The sum of sealed updates; nothing of one of them is kept.

    Memory: two bytes for each value of the model, and as many of the update that is being added,
    however many members.

    Attributes:
        shapes: of the tensors that each update has.
        survivors: whose updates are in it.
        suspects: where it was opened and is not used: one of them has spoiled it.
    """

    cohort: Cohort
    shapes: Mapping[str, tuple[int, ...]]
    survivors: list[str] = field(default_factory=list)
    suspects: tuple[str, ...] = ()
    _words: dict[str, Words] = field(default_factory=dict)
    _told_by: dict[bytes, str] = field(default_factory=dict)

    def add(
        self, name: str, tensors: Iterable[tuple[str, Tensor]], count: int | None = None
    ) -> str | None:
        """Take a member's update, its words as fp32; or nothing of it, and say why.

        Args:
            count: see Seal.count.
        """
        if name in self.survivors:
            return "its update is in the sum already"
        words, most = dict[str, Words](), 1 << self.cohort.bits
        for one, tensor in tensors:
            if one in words or tuple(tensor.shape) != self.shapes.get(one):
                return f"its tensor {one!r} is none of the model's, or of another shape"
            if tensor.numel() and not bool(((tensor >= 0) & (tensor < most)).all()):
                return f"its tensor {one!r} is no masked one: values are from 0 to {most - 1}"
            words[one] = tensor.flatten().int().numpy().astype(np.uint16)
        if missing := self.shapes.keys() - words:
            return f"its update lacks {some(sorted(missing))}"
        if (count is not None) != self.cohort.counted or not 0 <= (count or 0) < most:
            return "it does not say, under masks, whether it kept within the clip"
        if count is not None:
            words[COUNT] = np.array([count], np.uint16)
        first = b"".join(words[one][:_TOLD_BY].tobytes() for one in sorted(words))
        if (other := self._told_by.setdefault(first, name)) != name:
            return f"it sent the masked update of {other} once more"
        for one, added in words.items():
            into = self._words.setdefault(one, np.zeros_like(added))
            into += added
        self.survivors.append(name)
        return None

    def open(
        self,
        dealt: Mapping[str, Dealt],
        revealed: Mapping[str, Revealed],
        tell: Callable[[str], None],
        noise: Callable[[str, int], Words] | None = None,
    ) -> None:
        """Take the masks off.

        Args:
            tell: told, in words, of shares that are not used, and whose they are.
            noise: words to add to those of a tensor, or COUNT, of this length. They go in before
                anything is read: a sum at the edge of the ring, where a member can take it, says
                much about one word of others.

        Raises:
            QuorumLostError: too few shares of some secret, or some that do not give it; or the sum
                is beyond what honest updates come to.
        """
        cohort, survivors, keys = self.cohort, set(self.survivors), dict[bytes, int]()
        for name in cohort.names:
            near = sorted(cohort.masks[name] & survivors)
            if name not in survivors and not near:
                continue
            secret = self._secret(name, dealt, revealed, tell)
            if name in survivors:
                good = hashlib.sha256(secret).hexdigest() == dealt[name].own
                keys[derived(secret, "own mask", cohort.id)] = -1
            else:  # what it would have sent cancels what its neighbours did
                good = public_of(secret) == cohort.by_name[name].advert.mask_key
                keys |= pair_keys(secret, name, near, cohort)
            if not good:
                self.suspects = (name,)
                raise QuorumLostError(f"{name} dealt shares that do not give its secret")
        numbers, masks = FixedPoint.of(cohort), Masks(keys)
        most = sum(numbers.bound(cohort.by_name[one].weight) for one in survivors)
        for name, words in self._words.items():
            masks.add(words, name)
            if noise is not None:
                words += noise(name, len(words))
                continue  # any number is as good as another
            signed = numbers.signed(words)
            if signed.size and (signed.max() > most or signed.min() < -most):
                self.suspects = tuple(sorted(survivors))
                raise QuorumLostError(
                    f"tensor {name!r} is beyond what {len(survivors)} honest updates come to"
                )

    def mean(self) -> Iterator[tuple[str, Tensor]]:
        """Of the survivors' updates, by their weights, once it is open."""
        numbers, weight = FixedPoint.of(self.cohort), sum(self.weights)
        for name, shape in self.shapes.items():
            mean = numbers.mean(self._words[name], weight, self.cohort.ranges[name])
            yield name, mean.view(shape)

    @property
    def weights(self) -> list[int]:
        """Of the survivors."""
        return [self.cohort.by_name[one].weight for one in self.survivors]

    def within(self) -> int:
        """How many survivors said that they kept within the clip, less those who did not, as noise
        leaves it."""
        most, told = len(self.survivors), FixedPoint.of(self.cohort).signed(self._words[COUNT])
        return max(-most, min(most, int(told[0])))

    def _secret(
        self,
        name: str,
        dealt: Mapping[str, Dealt],
        revealed: Mapping[str, Revealed],
        tell: Callable[[str], None],
    ) -> bytes:
        """Of a survivor its own mask's, of another its key."""
        cohort, found, own = self.cohort, dict[int, int](), name in self.survivors
        bad = list[str]()
        for holder in sorted(cohort.holders[name] & revealed.keys()):
            key = revealed[holder].keys.get(name, "0" * 64)
            share = unboxed(bytes.fromhex(key), dealt[name].boxes[holder][own])
            if share is None or len(share) != SHARE_BYTES:
                if name in revealed[holder].keys:  # one of the two gave a bad one
                    bad += [holder]
                tell(
                    f"{holder} gave no key to its share of what {name} dealt, or {name} dealt none"
                )
                continue
            found[cohort.place(holder)] = int.from_bytes(share)
            if len(found) == cohort.threshold:
                # Of shares that are no polynomial's any number, of which 32 bytes are looked at.
                return joined(found).to_bytes(SHARE_BYTES)[1:]
        self.suspects = (name, *bad) if bad else ()
        raise QuorumLostError(
            f"it stays closed: {len(found)} shares of {name}'s {'mask' if own else 'key'} came, "
            f"{cohort.threshold} are needed"
        )
