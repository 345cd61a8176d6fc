"""A member's side: advertise keys, deal shares, seal an update, unmask; and what it refuses.

All secrets of an attempt at a round come from 32 random bytes in FOLDER/NAME/secure-000012.json,
which also says what the member bound itself to, on disk before the answer that it is about leaves:
a process that was killed gives the same answers, and no others under the same name.

Invariants: masks cover one update only; each other member's one kind of share is given; an update
is in one sum that may be opened, at most. They break if a record goes while its round may be asked
for again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from photon.compression.ring import Ring
from photon.config.children import MOST_INNER_ROUNDS
from photon.errors import CheckpointCorruptError, PolicyError, ProtocolError, some
from photon.secure.documents import Advert, Call, Closing, Cohort, Dealt, Revealed, Sealing, read
from photon.secure.fixed_point import FixedPoint
from photon.secure.graph import holds_together
from photon.secure.masks import Masks, agreed, boxed, derived, public_of, unboxed
from photon.secure.shares import PRIME, SHARE_BYTES, split
from photon.store.disk import write_json

#: Newest rounds whose records stay: whoever was killed asks again, a group for all of its task's.
ROUNDS_KEPT = MOST_INNER_ROUNDS + 1

#: Of a sum that an update is in: the cohort, who holds its silo's shares, how many of them open it.
_Entered = tuple[str, list[str], int]


@dataclass(frozen=True)
class _Record:
    """What a member is bound to in an attempt at a round.

    Attributes:
        closed: cohorts of earlier attempts that it opened nothing of.
        entered: earlier attempts in which its update left.
        entering: this one, once shares are dealt for a cohort.
        dealt: whose masks are in its update.
        update: sha256 of that.
        survivors: that it unmasked.
    """

    attempt: int
    secret: str
    closed: list[str] = field(default_factory=list)
    entered: list[_Entered] = field(default_factory=list)
    entering: _Entered | None = None
    dealt: list[str] | None = None
    update: str | None = None
    survivors: list[str] | None = None

    def private(self) -> dict[str, bytes]:
        secret = bytes.fromhex(self.secret)
        return {kind: derived(secret, kind) for kind in ("mask", "box", "own")}

    def advert(self, number: int) -> Advert:
        private = self.private()
        keys = {"mask_key": public_of(private["mask"]), "box_key": public_of(private["box"])}
        return Advert(round=number, attempt=self.attempt, closed=self.closed, **keys)

    def coefficients(self, kind: str, cohort: Cohort) -> list[int]:
        """As if drawn: 512 bits modulo PRIME, threshold - 1 times."""
        secret, halves = bytes.fromhex(self.secret), (0, 1)
        return [
            int.from_bytes(b"".join(derived(secret, kind, cohort.id, i, j) for j in halves)) % PRIME
            for i in range(cohort.threshold - 1)
        ]


class Notebook:
    """A member's records on disk, beside what the silo keeps.

    Raises (all that read or write):
        PolicyError: a round is long over.
        CheckpointCorruptError: a record can't be read.
        DiskFullError: no room; what is there is as it was.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder / name, name

    def read(self, number: int) -> _Record | None:
        path, newest = self._path(number), max(self._rounds(), default=0)
        if number <= newest - ROUNDS_KEPT:
            raise PolicyError(
                f"{self.name} gives no keys for round {number}: it was in round {newest}, and an "
                "update enters one sum only",
                hint="The aggregator went back to an old state: begin another run from it.",
            )
        try:
            return _Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointCorruptError(
                f"can't read {path}: {str(error)[:200]}",
                hint="Leave it there: it said what this site's masks were used for. The site takes "
                "part again from the next round on.",
            ) from error

    def write(self, number: int, record: _Record) -> None:
        write_json(self._path(number), asdict(record), "what this silo is bound to", mode=0o600)
        for old in self._rounds():
            if old <= number - ROUNDS_KEPT:
                self._path(old).unlink(missing_ok=True)

    def bound(self, sealing: Sealing) -> _Record:
        """The record of an attempt, bound to those who dealt.

        Raises:
            ProtocolError: this member dealt nothing for this cohort, or for other company.
            PolicyError: too few dealt.
        """
        cohort, name, dealt = sealing.cohort, self.name, sorted(set(sealing.dealt))
        found = self.read(cohort.round)
        if found is None or found.entering is None or found.entering[0] != cohort.id:
            raise ProtocolError(
                f"{name} has dealt no shares for this cohort of round {cohort.round}, attempt "
                f"{cohort.attempt}",
                hint="Another round's, or another cohort: masks hold for one only.",
            )
        if found.dealt not in (None, dealt) or not {name} <= set(dealt) <= set(cohort.names):
            raise ProtocolError(f"{name} is asked to seal in another company: {some(dealt)}")
        holders = cohort.holders[name].intersection(dealt)
        if len(dealt) < cohort.floor or len(holders) < cohort.threshold:
            raise PolicyError(
                f"{name} seals no update of round {cohort.round}: {len(dealt)} members dealt "
                f"shares, {cohort.floor} are needed; {len(holders)} of those who hold its own did, "
                f"{cohort.threshold} are needed"
            )
        return replace(found, dealt=dealt)

    def _path(self, number: int) -> Path:
        return self._folder / f"secure-{number:06d}.json"

    def _rounds(self) -> list[int]:
        return [int(path.stem[7:]) for path in self._folder.glob("secure-*.json")]


def answer(folder: Path, name: str, phase: str, text: str) -> str:
    """A member's answer to the aggregator's document of a phase; asked again, the same.

    Args:
        folder: of what silos keep.
        phase: "advertise", "share" or "unmask".

    Raises:
        ProtocolError, PolicyError: what is asked makes no sense, or would tell too much.
        DiskFullError, CheckpointCorruptError: see Notebook.
    """
    notes, who = Notebook(folder, name), "the aggregator"
    if phase == "advertise":
        return advertise(notes, read(text, Call, who)).text
    if phase == "share":
        return share(notes, read(text, Cohort, who)).text
    return unmask(notes, read(text, Closing, who)).text


def advertise(notes: Notebook, call: Call) -> Advert:
    """Fresh keys for this attempt. Secrets of an earlier one are forgotten, opened or not."""
    found = notes.read(call.round)
    if found is not None and call.attempt < found.attempt:
        raise ProtocolError(
            f"{notes.name} is asked for attempt {call.attempt} at round {call.round} after "
            f"attempt {found.attempt}"
        )
    if found is None or call.attempt > found.attempt:
        old = found or _Record(0, "")
        before = [old.entering] if old.entering else []
        found = _Record(
            call.attempt,
            secrets.token_hex(32),
            [*old.closed, *(one[0] for one in before if old.survivors is None)],
            [*old.entered, *(before if old.dealt is not None else [])],
        )
        notes.write(call.round, found)
    return found.advert(call.round)


def share(notes: Notebook, cohort: Cohort) -> Dealt:
    """Shares of this member's secrets, each for one holder's eyes only.

    Raises:
        ProtocolError: the cohort has not this member's own advert, or is a second one.
        PolicyError: an earlier attempt at the round, with its update, may have been opened.
    """
    number, name, found = cohort.round, notes.name, notes.read(cohort.round)
    told = cohort.by_name.get(name)
    if found is None or told is None or told.advert != found.advert(number):
        raise ProtocolError(f"the cohort of round {number} has not what {name} advertised for it")
    if found.entering is not None and found.entering[0] != cohort.id:
        raise ProtocolError(
            f"{name} is asked into a second cohort of round {number}, attempt {cohort.attempt}",
            hint="An update enters one sum only: the difference of two would tell of it.",
        )
    for earlier, holders, threshold in found.entered:
        there = [cohort.by_name[one] for one in holders if one in cohort.by_name]
        closed = sum(earlier in one.advert.closed for one in there)
        if len(holders) - closed >= threshold:
            raise PolicyError(
                f"{name} has an update of round {number} in an earlier attempt that may have been "
                f"opened: {closed} of {len(holders)} who hold its shares there say that they "
                f"opened nothing, {len(holders) - threshold + 1} are needed",
                hint="Begin another run from the last checkpoint.",
            )
    holders = sorted(cohort.holders[name])
    notes.write(number, replace(found, entering=(cohort.id, holders, cohort.threshold)))
    private, places = found.private(), [1 + cohort.names.index(one) for one in holders]
    pairs = zip(
        *(
            split(int.from_bytes(private[kind]), found.coefficients(kind, cohort), places)
            for kind in ("mask", "own")
        ),
        strict=True,
    )
    boxes, pledges = dict[str, str](), dict[str, tuple[str, str]]()
    for other, pair in zip(holders, pairs, strict=True):
        both = [one.to_bytes(SHARE_BYTES) for one in pair]
        theirs = cohort.by_name[other].advert.box_key
        key = agreed(private["box"], theirs, "box", cohort.id, name, other)
        boxes[other] = boxed(key, b"".join(both))
        pledges[other] = (
            pledge(cohort, name, other, both[0]),
            pledge(cohort, name, other, both[1]),
        )
    own_pledge = pledge(cohort, name, name, private["own"])
    return Dealt(cohort=cohort.id, boxes=boxes, pledges=pledges, own=own_pledge)


class Seal:
    """Makes one update whole numbers under masks.

    Args:
        folder, name: see Notebook.
        text: a Sealing.

    Raises:
        ProtocolError, PolicyError: see Notebook.bound.
    """

    def __init__(self, folder: Path, name: str, text: str) -> None:
        sealing, self._notes = read(text, Sealing, "the aggregator"), Notebook(folder, name)
        self._cohort = cohort = sealing.cohort
        self._found = self._notes.bound(sealing)
        self._notes.write(cohort.round, self._found)
        private = self._found.private()
        keys = {derived(private["own"], "own mask", sealing.id): 1}
        near = cohort.masks[name].intersection(sealing.dealt)
        self._masks = Masks(keys | pair_keys(private["mask"], name, near, sealing))
        self._weight, self._numbers = cohort.by_name[name].weight, FixedPoint.of(cohort)
        self._ring = Ring(bits=cohort.bits)
        self.codec = f"ring(bits={cohort.bits})"

    def encode(self, name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A tensor's parts, masked, and what the sum will have of it, fp32.

        Raises:
            ProtocolError: the cohort has no range for it.
            NonFiniteError: it holds NaN or infinity.
        """
        if (largest := self._cohort.ranges.get(name)) is None:
            raise ProtocolError(f"the aggregator gave no range for tensor {name!r}")
        whole, said = self._numbers.whole(tensor, self._weight, largest)
        words = whole.numpy().view("<u2")
        self._masks.add(words, name)
        return self._ring.packed(words), said.view(tensor.shape)

    def leave(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """The update as a whole leaves; this very one, or none under these masks.

        Raises:
            PolicyError: another left before: the difference of the two would have no mask.
            DiskFullError: it can't be noted.
        """
        digest = hashlib.sha256()
        for part in (part for tensors in parts for part in tensors.values()):
            digest.update(part.numpy().data)
        if self._found.update not in (None, found := digest.hexdigest()):
            raise PolicyError(
                f"{self._notes.name} came to another update of round {self._cohort.round} than the "
                "one that left under these masks; the difference would tell of both",
                hint="Other data, hardware or ranks than before. It takes part again next round.",
            )
        self._notes.write(self._cohort.round, replace(self._found, update=found))


def unmask(notes: Notebook, closing: Closing) -> Revealed:
    """Shares that take the survivors' own masks off, and those of members that dropped out.

    Raises:
        ProtocolError: the sum has not this member's update, or another set of survivors was
            unmasked before: both shares of one member would lay its update open.
        PolicyError: too few survivors, or they fall apart into several sums.
    """
    cohort, name, survivors = closing.sealing.cohort, notes.name, set(closing.survivors)
    found = notes.bound(closing.sealing)
    if not {name} <= survivors <= set(closing.sealing.dealt):
        raise ProtocolError(f"{name} is asked to unmask a sum without it, or with strangers in it")
    if found.survivors not in (None, sorted(survivors)):
        both = set(found.survivors or ()) ^ survivors
        raise ProtocolError(
            f"{name} is asked for both shares of {some(sorted(both))} in round {cohort.round}: "
            "with them an update would lie open",
            hint="It has unmasked other survivors already; whoever asks so may mean harm.",
        )
    if len(survivors) < cohort.floor or not holds_together(cohort.masks, survivors):
        raise PolicyError(
            f"{name} unmasks no sum of {len(survivors)} updates in round {cohort.round}: at least "
            f"{cohort.floor} are to be in it, and their masks are to hold them together"
        )
    notes.write(cohort.round, replace(found, survivors=sorted(survivors)))
    box_key, shares, unreadable = found.private()["box"], dict[str, str](), list[str]()
    for other in sorted(cohort.holders[name].intersection(found.dealt or (), closing.boxes)):
        theirs = cohort.by_name[other].advert.box_key
        key = agreed(box_key, theirs, "box", cohort.id, other, name)
        pair = unboxed(key, closing.boxes[other])
        if pair is None or len(pair) != 2 * SHARE_BYTES:
            unreadable.append(other)
        else:
            shares[other] = (pair[SHARE_BYTES:] if other in survivors else pair[:SHARE_BYTES]).hex()
    return Revealed(cohort=cohort.id, shares=shares, unreadable=unreadable)


def pledge(cohort: Cohort, dealer: str, holder: str, share: bytes) -> str:
    """Says of a share which it is, and nothing of what it holds."""
    return hashlib.sha256(f"{cohort.id} {dealer} {holder} ".encode() + share).hexdigest()


def pair_keys(private: bytes, name: str, near: Iterable[str], sealing: Sealing) -> dict[bytes, int]:
    """Of the masks that a member has in common with others, with their signs in its update."""
    keys = {one: sealing.cohort.by_name[one].advert.mask_key for one in near}
    return {
        agreed(private, key, "pair", sealing.id): 1 if name < one else -1
        for one, key in keys.items()
    }
