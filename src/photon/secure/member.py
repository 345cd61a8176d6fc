"""A member's side: advertise keys, deal shares, seal an update, unmask; and what it refuses.

All secrets of an attempt at a round come from 32 random bytes in FOLDER/NAME/secure-000012.json,
which also says what the member bound itself to, on disk before the answer that it is about leaves:
a process that was killed gives the same answers, and no others under the same name.

Invariants: masks cover one update only; each other member's one kind of share is given; in a round
an update leaves once. They break if a record goes while its round may be asked for again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from photon.compression.ring import Ring
from photon.config.children import MOST_INNER_ROUNDS
from photon.errors import CheckpointCorruptError, PolicyError, ProtocolError, some
from photon.secure.documents import Advert, Call, Closing, Cohort, Dealt, Revealed, read
from photon.secure.fixed_point import FixedPoint
from photon.secure.graph import holds_together
from photon.secure.masks import Masks, agreed, boxed, derived, public_of
from photon.secure.shares import PRIME, SHARE_BYTES, split
from photon.store.disk import write_json

#: Newest rounds whose records stay: whoever was killed asks again, a group for all of its task's.
ROUNDS_KEPT = MOST_INNER_ROUNDS + 1
#: What shares are dealt of: the key of masks, and the secret of the own mask.
SHARED = ("mask", "own")
#: The stream of masks over what members say of their clip; no tensor is called so.
COUNT = "count"
_AGGREGATOR = "the aggregator"


@dataclass(frozen=True)
class Record:
    """What a member is bound to in an attempt at a round.

    Attributes:
        cohort: for which shares are dealt.
        update: sha256 of its masked update, once that leaves.
        survivors: that it unmasked.
    """

    attempt: int
    secret: str
    cohort: str = ""
    update: str = ""
    survivors: list[str] | None = None

    def derived(self, *words: object, size: int = 32) -> bytes:
        return derived(bytes.fromhex(self.secret), *words, size=size)

    def advert(self, number: int) -> Advert:
        keys = {f"{kind}_key": public_of(self.derived(kind)) for kind in ("mask", "box")}
        return Advert(round=number, attempt=self.attempt, **keys)

    def shares(self, kind: str, cohort: Cohort, places: list[int]) -> list[int]:
        """Of a polynomial as if drawn: 512 bits modulo PRIME for each coefficient."""
        wide = [self.derived(kind, cohort.id, i, size=64) for i in range(1, cohort.threshold)]
        coefficients = [int.from_bytes(one) % PRIME for one in wide]
        return split(int.from_bytes(self.derived(kind)), coefficients, places)

    def box_key(self, other: str, kind: str, cohort: Cohort, dealer: str, holder: str) -> bytes:
        """Of one share's box: `other` is the holder or the dealer, this member the other one."""
        theirs = cohort.by_name[other].advert.box_key
        return agreed(self.derived("box"), theirs, kind, cohort.id, dealer, holder)


class Party:
    """A member, with its records beside what the silo keeps.

    Raises (whatever reads or writes them):
        PolicyError: a round is long over.
        CheckpointCorruptError: a record can't be read.
        DiskFullError: no room; what is there is as it was.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder / name, name

    def answer(self, phase: str, text: str) -> str:
        """To the aggregator's document of a phase; asked again, the same.

        Args:
            phase: "advertise", "share" or "unmask".

        Raises:
            ProtocolError, PolicyError: what is asked makes no sense, or would tell too much.
        """
        if phase == "advertise":
            return self._advertise(read(text, Call, _AGGREGATOR)).text
        if phase == "share":
            return self._share(read(text, Cohort, _AGGREGATOR)).text
        return self._unmask(read(text, Closing, _AGGREGATOR)).text

    def _advertise(self, call: Call) -> Advert:
        """Fresh keys for this attempt. Secrets of an earlier one are forgotten."""
        number, found = call.round, self.read(call.round)
        if found is not None and call.attempt < found.attempt:
            raise ProtocolError(
                f"{self.name} is asked for attempt {call.attempt} at round {number} after attempt "
                f"{found.attempt}"
            )
        if found is None or call.attempt > found.attempt:
            if found is not None and found.update:
                raise PolicyError(
                    f"an update of {self.name} has left in attempt {found.attempt} at round "
                    f"{number}, and is in one sum at most",
                    hint="The aggregator passes over such a round, and goes on with the next.",
                )
            found = Record(call.attempt, secrets.token_hex(32))
            self.write(number, found)
        return found.advert(number)

    def _share(self, cohort: Cohort) -> Dealt:
        """Shares of this member's secrets, each for one holder's eyes only."""
        number, name, found = cohort.round, self.name, self.read(cohort.round)
        told = cohort.by_name.get(name)
        if found is None or told is None or told.advert != found.advert(number):
            raise ProtocolError(
                f"the cohort of round {number} has not what {name} advertised for it"
            )
        if found.cohort not in ("", cohort.id):
            raise ProtocolError(
                f"{name} is asked into a second cohort of round {number}, attempt {cohort.attempt}"
            )
        self.write(number, replace(found, cohort=cohort.id))
        holders = sorted(cohort.holders[name])
        places = [cohort.place(one) for one in holders]
        dealt = [found.shares(kind, cohort, places) for kind in SHARED]
        boxes = dict[str, tuple[str, str]]()
        for other, pair in zip(holders, zip(*dealt, strict=True), strict=True):
            key, own = (
                boxed(found.box_key(other, kind, cohort, name, other), share.to_bytes(SHARE_BYTES))
                for kind, share in zip(SHARED, pair, strict=True)
            )
            boxes[other] = key, own
        own = hashlib.sha256(found.derived("own")).hexdigest()
        return Dealt(cohort=cohort.id, boxes=boxes, own=own)

    def bound(self, cohort: Cohort) -> Record:
        """Of an attempt; raises ProtocolError where this member dealt no shares for its cohort."""
        found = self.read(cohort.round)
        if found is None or found.cohort != cohort.id:
            raise ProtocolError(
                f"{self.name} has dealt no shares for this cohort of round {cohort.round}, attempt "
                f"{cohort.attempt}"
            )
        return found

    def _unmask(self, closing: Closing) -> Revealed:
        """Keys to shares that take off survivors' own masks, and those of who dropped out."""
        cohort, name, survivors = closing.cohort, self.name, set(closing.survivors)
        found = self.bound(cohort)
        if not {name} <= survivors <= set(cohort.names):
            raise ProtocolError(
                f"{name} is asked to unmask a sum without it, or with strangers in it"
            )
        if found.survivors not in (None, sorted(survivors)):
            both = set(found.survivors or ()) ^ survivors
            raise ProtocolError(
                f"{name} is asked for both shares of {some(sorted(both))} in round {cohort.round}: "
                "with them an update would lie open"
            )
        if len(survivors) < cohort.floor or not holds_together(cohort.masks, survivors):
            raise PolicyError(
                f"{name} unmasks no sum of {len(survivors)} updates in round {cohort.round}: at "
                f"least {cohort.floor} are to be in it, and their masks are to hold them together"
            )
        self.write(cohort.round, replace(found, survivors=sorted(survivors)))
        keys = {
            other: found.box_key(other, SHARED[other in survivors], cohort, other, name).hex()
            for other in sorted(cohort.holders[name])
        }
        return Revealed(cohort=cohort.id, keys=keys)

    def read(self, number: int) -> Record | None:
        path, newest = self._path(number), max(self._rounds(), default=0)
        if number <= newest - ROUNDS_KEPT:
            raise PolicyError(
                f"{self.name} gives no keys for round {number}: it was in round {newest}, and an "
                "update enters one sum only",
                hint="The aggregator went back to an old state: begin another run from it.",
            )
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointCorruptError(
                f"can't read {path}: {str(error)[:200]}",
                hint="Leave it there: it said what this site's masks were used for. The site takes "
                "part again from the next round on.",
            ) from error

    def write(self, number: int, record: Record) -> None:
        write_json(self._path(number), asdict(record), "what this silo is bound to", mode=0o600)
        for old in self._rounds():
            if old <= number - ROUNDS_KEPT:
                self._path(old).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"secure-{number:06d}.json"

    def _rounds(self) -> list[int]:
        return [int(path.stem[7:]) for path in self._folder.glob("secure-*.json")]


class Seal:
    """Makes one update whole numbers under masks.

    Args:
        folder, name: see Party.
        text: the Cohort that it is masked for.

    Attributes:
        clip: of the Cohort.

    Raises:
        ProtocolError, PolicyError: see Party.bound.
    """

    def __init__(self, folder: Path, name: str, text: str) -> None:
        self._party, self._cohort = Party(folder, name), read(text, Cohort, _AGGREGATOR)
        self._found, cohort = self._party.bound(self._cohort), self._cohort
        keys = {derived(self._found.derived("own"), "own mask", cohort.id): 1}
        mine = self._found.derived("mask")
        self._masks = Masks(keys | pair_keys(mine, name, cohort.masks[name], cohort))
        self._weight, self._numbers = cohort.by_name[name].weight, FixedPoint.of(cohort)
        self._ring, self._counted = Ring(bits=cohort.bits), b""
        self.clip = cohort.clip
        self.codec = f"ring(bits={cohort.bits})"

    def encode(self, name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A tensor's parts, masked, and what the sum will have of it, fp32.

        Raises:
            ProtocolError: the cohort has no range for it.
            NonFiniteError: it holds NaN or infinity.
        """
        if (largest := self._cohort.ranges.get(name)) is None:
            raise ProtocolError(f"the aggregator gave no range for tensor {name!r}")
        clipped = self.clip is not None
        whole, said = self._numbers.whole(tensor, self._weight, largest, to_zero=clipped)
        words = whole.numpy().view("<u2")
        self._masks.add(words, name)
        return self._ring.packed(words), said.view(tensor.shape)

    def count(self, *, within: bool) -> int | None:
        """1 or -1 under masks: whether the update was within the clip; None where nobody asks."""
        if not self._cohort.counted:
            return None
        word = np.array([1 if within else -1], np.int16).view(np.uint16)
        self._masks.add(word, COUNT)
        word &= (1 << self._cohort.bits) - 1
        self._counted = word.tobytes()
        return int(word[0])

    def leave(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """The update as a whole leaves; this very one, or none under these masks.

        Raises:
            PolicyError: another left before: the difference of the two would have no mask.
            DiskFullError: it can't be noted.
        """
        digest = hashlib.sha256(self._counted)
        for part in (part for tensors in parts for part in tensors.values()):
            digest.update(part.numpy().data)
        if self._found.update not in ("", found := digest.hexdigest()):
            raise PolicyError(
                f"{self._party.name} came to another update of round {self._cohort.round} than the "
                "one that left under these masks; the difference would tell of both",
                hint="Other data, hardware or ranks than before. It takes part again next round.",
            )
        self._party.write(self._cohort.round, replace(self._found, update=found))


def pair_keys(private: bytes, name: str, near: Iterable[str], cohort: Cohort) -> dict[bytes, int]:
    """Of the masks that a member has in common with others, with their signs in its update."""
    keys = {one: cohort.by_name[one].advert.mask_key for one in near}
    return {
        agreed(private, key, "pair", cohort.id, *sorted([name, one])): 1 if name < one else -1
        for one, key in keys.items()
    }
