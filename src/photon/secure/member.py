"""A member's side: advertise keys, deal shares, seal an update, unmask; and what it refuses.

All secrets of an attempt at a round come from 32 random bytes in FOLDER/NAME/secure-000012.json,
which also says what the member bound itself to: the cohort that it dealt shares for, those whose
masks its update has, the sha256 of that update, and the survivors that it unmasked. Each is on disk
before the answer that it is about leaves. So a process that was killed gives the same answers, and
another question under the same name is refused.

Invariants: a member's masks cover one update only; it gives one kind of share of each other
member; its update of a round is in one sum that may be opened, at most. They break if a record is
removed while its round may be asked for again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from photon.compression.ring import Ring
from photon.config.children import MOST_INNER_ROUNDS
from photon.errors import CheckpointCorruptError, PolicyError, ProtocolError, some
from photon.secure.documents import Advert, Call, Closing, Cohort, Dealt, Revealed, Sealing, read
from photon.secure.fixed_point import FixedPoint
from photon.secure.graph import holds_together
from photon.secure.masks import Words, add_masks, agreed, boxed, derived, public_of, unboxed
from photon.secure.shares import PRIME, SHARE_BYTES, split
from photon.store.disk import write_json

#: Newest rounds whose records stay: a killed aggregator may ask for them again, a group for all of
#: its task's.
ROUNDS_KEPT = MOST_INNER_ROUNDS + 1


@dataclass(frozen=True)
class _Record:
    """What a member is bound to in an attempt at a round; see the module.

    Attributes:
        closed: cohorts of earlier attempts that it opened nothing of.
        entered: earlier attempts in which its update left: cohort, neighbours, threshold.
    """

    attempt: int
    secret: str
    closed: list[str] = field(default_factory=list)
    entered: list[tuple[str, list[str], int]] = field(default_factory=list)
    cohort: str | None = None
    dealt: list[str] | None = None
    update: str | None = None
    survivors: list[str] | None = None
    around: tuple[list[str], int] | None = None


class Notebook:
    """A member's records on disk.

    Args:
        folder: of what silos keep.
        name: of the member.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder / name, name

    def read(self, number: int) -> _Record | None:
        """What is known of a round.

        Raises:
            PolicyError: it is long over.
            CheckpointCorruptError: the record can't be read.
        """
        path, newest = self._path(number), max(self._rounds(), default=0)
        if not path.exists():
            if number <= newest - ROUNDS_KEPT:
                raise PolicyError(
                    f"{self.name} gives no keys for round {number}: it was in round {newest}, and "
                    "an update enters one sum only",
                    hint="The aggregator went back to an old state: begin another run from it.",
                )
            return None
        try:
            return _Record(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointCorruptError(
                f"can't read {path}: {str(error)[:200]}",
                hint="Leave it there: without it this site can't know what its masks were used "
                "for. It takes part again from the next round on.",
            ) from error

    def write(self, number: int, record: _Record) -> None:
        """On disk when this returns.

        Raises:
            DiskFullError: no room.
        """
        write_json(self._path(number), asdict(record), "what this silo is bound to", mode=0o600)
        for old in self._rounds():
            if old <= number - ROUNDS_KEPT:
                self._path(old).unlink(missing_ok=True)

    def bound(self, cohort: Cohort) -> _Record:
        """The record of an attempt that shares were dealt in.

        Raises:
            ProtocolError: this member dealt none for this cohort.
        """
        found = self.read(cohort.round)
        if found is None or (found.attempt, found.cohort) != (cohort.attempt, cohort.id):
            raise ProtocolError(
                f"{self.name} has dealt no shares for this cohort of round {cohort.round}, attempt "
                f"{cohort.attempt}",
                hint="Another round's, or another cohort: masks hold for one only.",
            )
        return found

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
        closed, entered = list[str](), list[tuple[str, list[str], int]]()
        if found is not None:
            closed, entered = [*found.closed], [*found.entered]
            if found.cohort and found.survivors is None:
                closed.append(found.cohort)
            if found.cohort and found.dealt is not None and found.around:
                entered.append((found.cohort, *found.around))
        found = _Record(call.attempt, secrets.token_hex(32), closed, entered)
        notes.write(call.round, found)
    return _advert(found, call.round)


def share(notes: Notebook, cohort: Cohort) -> Dealt:
    """Shares of this member's secrets, for its neighbours' eyes only.

    Raises:
        ProtocolError: the cohort has not this member's own advert, or is a second one.
        PolicyError: an earlier attempt at the round, with its update, may have been opened.
    """
    number, name, found = cohort.round, notes.name, notes.read(cohort.round)
    own = cohort.by_name.get(name)
    if found is None or own is None or own.advert != _advert(found, number):
        raise ProtocolError(f"the cohort of round {number} has not what {name} advertised for it")
    if found.cohort not in (None, cohort.id):
        raise ProtocolError(
            f"{name} is asked into a second cohort of round {number}, attempt {cohort.attempt}",
            hint="An update enters one sum only: the difference of two would tell of it.",
        )
    near = sorted(cohort.graph[name])
    for earlier, neighbours, threshold in found.entered:
        closed = [
            one for one in neighbours
            if one in cohort.by_name and earlier in cohort.by_name[one].advert.closed
        ]  # fmt: skip
        if len(neighbours) - len(closed) >= threshold:
            raise PolicyError(
                f"{name} has an update of round {number} in an earlier attempt that may have been "
                f"opened: {len(closed)} of its {len(neighbours)} neighbours there say that they "
                f"opened nothing, {len(neighbours) - threshold + 1} are needed",
                hint="Go on from the next round's state, or begin another run from the checkpoint.",
            )
    notes.write(number, replace(found, cohort=cohort.id, around=(near, cohort.threshold)))
    secret = bytes.fromhex(found.secret)
    private, places = _private(secret), _places(cohort)
    boxes, pledges = dict[str, str](), dict[str, tuple[str, str]]()
    both = [
        split(int.from_bytes(one), _coefficients(secret, cohort, kind), [places[n] for n in near])
        for kind, one in (("keys", private["mask"]), ("own", private["own"]))
    ]
    for index, other in enumerate(near):
        pair = [shares[index].to_bytes(SHARE_BYTES) for shares in both]
        words = ("box", cohort.id, name, other)
        key = agreed(private["box"], cohort.by_name[other].advert.box_key, *words)
        boxes[other] = boxed(key, b"".join(pair))
        pledges[other] = (
            pledge(cohort, name, other, "keys", pair[0]),
            pledge(cohort, name, other, "own", pair[1]),
        )
    own_pledge = pledge(cohort, name, name, "own", private["own"])
    return Dealt(cohort=cohort.id, boxes=boxes, pledges=pledges, own=own_pledge)


class Seal:
    """Makes one update whole numbers under masks.

    Args:
        folder, name: see Notebook.
        text: a Sealing.

    Raises:
        ProtocolError: it is for another cohort or company than this member bound itself to.
        PolicyError: too few dealt shares.
    """

    def __init__(self, folder: Path, name: str, text: str) -> None:
        sealing = read(text, Sealing, "the aggregator")
        self._cohort, self._notes = cohort, notes = sealing.cohort, Notebook(folder, name)
        self._found, near = _company(notes, sealing)
        notes.write(cohort.round, self._found)
        private = _private(bytes.fromhex(self._found.secret))
        self._keys = {derived(private["own"], "own mask", sealing.id): 1}
        for other in near:
            theirs = cohort.by_name[other].advert.mask_key
            self._keys[pair_key(private["mask"], theirs, sealing)] = 1 if name < other else -1
        self._weight = cohort.by_name[name].weight
        self._numbers, self._ring = FixedPoint.of(cohort), Ring(bits=cohort.bits)
        self.codec = f"ring(bits={cohort.bits})"

    def encode(self, name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A tensor's parts, masked, and what the sum will have of it, fp32.

        Raises:
            ProtocolError: the cohort has no range for it.
            NonFiniteError: it holds NaN or infinity.
        """
        largest = self._cohort.ranges.get(name)
        if largest is None:
            raise ProtocolError(f"the aggregator gave no range for tensor {name!r}")
        whole = self._numbers.whole(name, tensor, self._weight, largest)
        value = self._numbers.value(whole, self._weight, largest).view(tensor.shape)
        words: Words = whole.numpy().view("<u2")
        add_masks(words, name, self._keys)
        return self._ring.packed(words), value

    def leave(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """The update as a whole leaves; this very one, or none under these masks.

        Raises:
            PolicyError: another left before: the difference of the two would have no mask.
            DiskFullError: it can't be noted.
        """
        digest = hashlib.sha256()
        for tensors in parts:
            for part in tensors.values():
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
    sealing, cohort, name = closing.sealing, closing.sealing.cohort, notes.name
    survivors = set(closing.survivors)
    found, near = _company(notes, sealing)
    if not survivors.issubset(sealing.dealt) or name not in survivors:
        raise ProtocolError(
            f"{name} is asked to unmask a sum that it is not in, or that has strangers in it: "
            f"{some(sorted(survivors - set(sealing.dealt))) or name}"
        )
    if found.survivors not in (None, sorted(survivors)):
        both = set(found.survivors or ()) ^ survivors
        raise ProtocolError(
            f"{name} is asked for both shares of {some(sorted(both))} in round {cohort.round}: "
            "with them an update would lie open",
            hint="It has unmasked other survivors already; whoever asks so may mean harm.",
        )
    if len(survivors) < cohort.floor or not holds_together(cohort.graph, survivors):
        raise PolicyError(
            f"{name} unmasks no sum of {len(survivors)} updates in round {cohort.round}: at least "
            f"{cohort.floor} are to be in it, and their masks are to hold them together"
        )
    notes.write(cohort.round, replace(found, survivors=sorted(survivors)))
    private = _private(bytes.fromhex(found.secret))
    own, keys, unreadable = dict[str, str](), dict[str, str](), []
    for other in [one for one in near if one in closing.boxes]:
        theirs = cohort.by_name[other].advert.box_key
        pair = unboxed(
            agreed(private["box"], theirs, "box", cohort.id, other, name), closing.boxes[other]
        )
        if pair is None or len(pair) != 2 * SHARE_BYTES:
            unreadable.append(other)
        elif other in survivors:
            own[other] = pair[SHARE_BYTES:].hex()
        else:
            keys[other] = pair[:SHARE_BYTES].hex()
    return Revealed(cohort=cohort.id, own=own, keys=keys, unreadable=unreadable)


def pledge(cohort: Cohort, dealer: str, holder: str, kind: str, share: bytes) -> str:
    """Says of a share which it is, and nothing of what it holds."""
    return hashlib.sha256(f"{cohort.id} {dealer} {holder} {kind} ".encode() + share).hexdigest()


def pair_key(private: bytes, public: str, sealing: Sealing) -> bytes:
    """Of two members' common mask."""
    return agreed(private, public, "pair", sealing.id)


def _company(notes: Notebook, sealing: Sealing) -> tuple[_Record, list[str]]:
    """This member's record, bound to those who dealt; and its neighbours among them."""
    cohort, name = sealing.cohort, notes.name
    found, dealt = notes.bound(cohort), set(sealing.dealt)
    if found.dealt not in (None, sorted(dealt)):
        raise ProtocolError(f"{name} sealed round {cohort.round} in another company: {some(dealt)}")
    near = sorted(cohort.graph[name] & dealt)
    if not dealt.issubset(cohort.names) or name not in dealt:
        raise ProtocolError(f"who dealt shares are not all of the cohort, or {name} is not of them")
    if len(dealt) < cohort.floor or len(near) < cohort.threshold:
        raise PolicyError(
            f"{name} seals no update of round {cohort.round}: {len(dealt)} members dealt shares, "
            f"{cohort.floor} are needed, and of its neighbours {len(near)}, of whom "
            f"{cohort.threshold} are"
        )
    return replace(found, dealt=sorted(dealt)), near


def _private(secret: bytes) -> dict[str, bytes]:
    return {kind: derived(secret, kind) for kind in ("mask", "box", "own")}


def _advert(found: _Record, number: int) -> Advert:
    private = _private(bytes.fromhex(found.secret))
    keys = {"mask_key": public_of(private["mask"]), "box_key": public_of(private["box"])}
    return Advert(round=number, attempt=found.attempt, closed=found.closed, **keys)


def _places(cohort: Cohort) -> dict[str, int]:
    return {name: place for place, name in enumerate(cohort.names, 1)}


def _coefficients(secret: bytes, cohort: Cohort, kind: str) -> list[int]:
    """As if drawn: 512 bits modulo PRIME."""
    drawn = (
        derived(secret, kind, cohort.id, index, 0) + derived(secret, kind, cohort.id, index, 1)
        for index in range(cohort.threshold - 1)
    )
    return [int.from_bytes(one) % PRIME for one in drawn]
