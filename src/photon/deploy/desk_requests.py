"""How often silos may ask the desk, and which grants they get. Nothing in here knows HTTP."""

from __future__ import annotations

import ipaddress
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from photon.errors import (
    AccessRefusedError,
    LinkError,
    PhotonError,
    SignatureError,
    StoreUnavailableError,
)
from photon.membership.desk_documents import GrantsBody, Want, error_record
from photon.membership.records import Member, OpenTask, printable
from photon.membership.roster import Roster
from photon.store.contract import require_key
from photon.store.presign import Presigner

#: Where the front door asks whether the holder of a certificate is an active member; and how it
#: says whose certificate came. From outside neither is reached.
ADMISSION_PATH = "/door/member"
CERTIFICATE_HEADER = "photon-certificate"

#: No object that a silo writes is longer: photon.link.manifest's largest chunk.
MOST_OBJECT_BYTES = 64 << 20

#: Not in any store: that it isn't there is an answer.
PROBE_KEY = "photon-probe/none"
#: For how long leave to ask for it is valid.
_PROBE_S = 60

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class DeskLimits:
    """How much one caller may ask.

    Attributes:
        joins_per_minute: attempts to join that fail, from one address, for one invitation; all that
            name no invitation count as one. Nothing counts for others, so that no flood keeps an
            invitee out.
        strangers_per_minute: requests without a member's signature, from one address, that are
            answered in words and noted; those beyond are turned away unnoted.
        requests_per_minute: of one member. (RequestVerifier remembers 20 000 within four minutes.)
        notes_per_minute: refusals noted in the roster's events for one name or address; how many
            more there were is noted once.
        body_s: for a request's body to arrive.
        poll_s: that a silo waits for a question, before it asks again; longer where many wait.
        polls_each: of one member, that wait at once.
        most_connections: at once, besides those of members.
        most_objects: that one task may write.
        grant_s: for how long a presigned URL is valid, unless its task ends before.
        here_s: a silo that was silent for longer counts as gone.
    """

    joins_per_minute: int = 10
    strangers_per_minute: int = 60
    requests_per_minute: int = 3000
    notes_per_minute: int = 30
    body_s: float = 20.0
    poll_s: float = 20.0
    polls_each: int = 2
    most_connections: int = 256
    most_objects: int = 65_536
    grant_s: int = 300
    here_s: float = 60.0


def require_same_key(claimed: str, shown: str | None) -> None:
    """Refuse a request signed with another key than its certificate is for.

    Args:
        claimed: fingerprint of the key that signed.
        shown: the certificate's subject, as the front door says it; None: no door is between.

    Raises:
        SignatureError: they differ.
    """
    if shown not in (None, claimed.replace("sha256:", "CN=", 1)):
        raise SignatureError(
            "the request is signed with another key than its certificate is for",
            hint="Only a node of Photon's own can ask for this.",
        )


# --- how often ------------------------------------------------------------------------------------


class Allowance:
    """So many a minute for each name, in bursts of at most that many.

    Args:
        per_minute: for one name.
        most_names: remembered; the one that asked longest ago is forgotten first.
    """

    def __init__(self, per_minute: int, *, most_names: int = 4096) -> None:
        self._per_minute = per_minute
        self._most_names = most_names
        #: name -> how many are left, and when that was so.
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str = "", *, now: float | None = None, spend: bool = True) -> bool:
        """Whether one more is allowed; it counts if so.

        Args:
            now: seconds of a clock that never goes back.
            spend: False only asks.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            left, at = self._left.pop(name, (float(self._per_minute), now))
            left = min(self._per_minute, left + (now - at) * self._per_minute / 60)
            allowed = left >= 1
            self._left[name] = (left - 1 if allowed and spend else left, now)
            if len(self._left) > self._most_names:
                self._left.popitem(last=False)
        return allowed


class Counters:
    """Who may ask how often, and whose refusals are written down."""

    def __init__(self, limits: DeskLimits) -> None:
        self.failed_joins = Allowance(limits.joins_per_minute)
        self.forged = Allowance(limits.strangers_per_minute)
        self.strangers = Allowance(limits.strangers_per_minute)
        self.requests = Allowance(limits.requests_per_minute)
        self._notes = Allowance(limits.notes_per_minute)
        self._all_notes = Allowance(10 * limits.notes_per_minute)
        self._unnoted = 0
        self._lock = threading.Lock()

    def noting(self, actor: str) -> int | None:
        """How many refusals were not noted before this one, which is; None if it is not either."""
        noted = self._notes.take(actor) and self._all_notes.take()
        with self._lock:
            if not noted:
                self._unnoted += 1
                return None
            unnoted, self._unnoted = self._unnoted, 0
            return unnoted


def caller_address(peer: str | None, forwarded_for: str | None) -> str:
    """Who is counted: the address that the front door saw, one name for a whole IPv6 network.

    Args:
        peer: of the connection, which is the front door on this machine.
        forwarded_for: X-Forwarded-For; its last entry is the door's own, others are claims.
    """
    found = (forwarded_for or "").rpartition(",")[2].strip() or peer or ""
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


# --- grants ---------------------------------------------------------------------------------------


class Granting:
    """Decides who may read and write what, and remembers what was granted.

    The sum of what a task may write is kept here: an object that is asked for again (a node that
    was killed, a URL that ran out) must not count again. When its task is opened again, or the desk
    restarts, counting starts anew, so that a silo that sends its update once more is not refused.

    Args:
        roster: has the open tasks.
        presigner: of the store; keys are relative to it.
        limits: most_objects and grant_s are used.
    """

    def __init__(self, roster: Roster, presigner: Presigner, limits: DeskLimits) -> None:
        self._roster = roster
        self._presigner = presigner
        self._limits = limits
        self._lock = threading.Lock()
        self._written: dict[str, _Written] = {}

    def task(self, member: Member, task_id: str, *, now: float) -> OpenTask:
        """The member's own open task of that name.

        Raises:
            AccessRefusedError: there is none; the words are the same for what is another's, what
                is closed and what never was.
        """
        found = [one for one in self._roster.tasks.open_for(member.name) if one.id == task_id]
        if not found:
            raise AccessRefusedError(
                f"{member.name} has no open task {printable(task_id)[:200]!r}",
                hint="It was answered, or its round is over. Nothing more is read or written for "
                "it; wait for the next task.",
            )
        if found[0].until <= now:
            raise AccessRefusedError(
                f"the time for task {printable(task_id)[:200]!r} of {member.name} is up",
                hint="Its round goes on without this update; wait for the next task.",
            )
        return found[0]

    def answers(
        self, member: Member, body: GrantsBody, *, now: float
    ) -> tuple[list[dict[str, Any]], list[PhotonError]]:
        """One answer for each want, in order: a grant, or words; and the errors among them.

        Raises:
            AccessRefusedError: the task is not the member's own open one.
        """
        task = self.task(member, body.task_id, now=now)
        valid_s = max(1, int(min(self._limits.grant_s, task.until - now)))
        answers: list[dict[str, Any]] = []
        errors: list[PhotonError] = []
        for want in body.wants:
            try:
                if want.verb == "PUT":
                    self._count(task, want)
                self._key(task, want)
                answers.append(self._signed(want, valid_s))
            except PhotonError as error:
                errors.append(error)
                answers.append({"error": error_record(error)})
        return answers, errors

    def written_bytes(self, task: OpenTask) -> int:
        """What a task was given leave to write, in sum, since it was opened or the desk started."""
        with self._lock:
            found = self._written.get(task.id)
            return found.bytes if found is not None and found.opened_at == task.opened_at else 0

    def probe(self) -> dict[str, Any]:
        """Leave to ask the store for an object that nobody ever writes: whether it is reached."""
        return self._signed(Want(verb="HEAD", key=PROBE_KEY), _PROBE_S)

    def _signed(self, want: Want, valid_s: int) -> dict[str, Any]:
        try:
            grant = self._presigner.grant(want.verb, want.key, valid_s, want.bytes, want.sha256)
        except PhotonError:
            raise
        except Exception as error:
            # Google's and Azure's signers ask a server; their errors may quote what was signed.
            raise StoreUnavailableError(
                f"no leave can be signed just now ({type(error).__name__})",
                hint="See the aggregator's log: its credentials for the store may have expired.",
            ) from None
        return {
            "verb": grant.verb,
            "key": want.key,
            "url": grant.url,
            "headers": dict(grant.headers),
            "expires_at": grant.expires_at,
        }

    def _key(self, task: OpenTask, want: Want) -> str:
        shown = printable(want.key)[:200]
        try:
            require_key(want.key)
        except LinkError as error:
            raise AccessRefusedError(
                f"{shown!r} can't name an object in a store", hint=error.hint
            ) from None
        own = {each.format(sha256=want.sha256 or "") for each in task.writable}
        if not (want.key in own or (want.verb != "PUT" and _readable(task, want.key))):
            raise AccessRefusedError(
                f"{want.verb} {shown} is not part of task {task.id}",
                hint="A task reads its state, and writes its own update under the hashes of what "
                "it writes.",
            )
        return want.key

    def _count(self, task: OpenTask, want: Want) -> None:
        """Count an object that is to be written, unless it was counted before."""
        shown, size, sha256 = printable(want.key)[:200], want.bytes, want.sha256
        # The store holds the silo to both.
        if size is None or not 1 <= size <= MOST_OBJECT_BYTES:
            raise AccessRefusedError(
                f"PUT {shown}: bytes must be 1 to {MOST_OBJECT_BYTES}, found {size}"
            )
        if sha256 is None or not _SHA256.fullmatch(sha256):
            raise AccessRefusedError(f"PUT {shown}: sha256 must be 64 hexadecimal digits")
        key = self._key(task, want)
        with self._lock:
            written = self._written.get(task.id)
            if written is None or written.opened_at != task.opened_at:
                self._forget_closed(task.silo)
                written = self._written[task.id] = _Written(task.silo, task.opened_at)
            if (key, sha256, size) in written.objects:
                return
            if written.bytes + size > task.most_bytes:
                raise AccessRefusedError(
                    f"PUT {key}: with these {size} bytes task {task.id} would write "
                    f"{written.bytes + size}; {task.most_bytes} are allowed",
                    hint="The update is larger than the run's codec makes it.",
                )
            if len(written.objects) >= self._limits.most_objects:
                raise AccessRefusedError(
                    f"PUT {key}: task {task.id} writes {len(written.objects)} objects already, no "
                    "more are allowed",
                    hint="Larger chunks make fewer objects.",
                )
            written.objects.add((key, sha256, size))
            written.bytes += size

    def _forget_closed(self, silo: str) -> None:
        """What other tasks of the silo wrote, once they are closed."""
        still = {one.id for one in self._roster.tasks.open_for(silo)}
        for task_id in [
            task_id
            for task_id, written in self._written.items()
            if written.silo == silo and task_id not in still
        ]:
            del self._written[task_id]


@dataclass
class _Written:
    """What one task was given leave to write: key, sha256 and bytes of each object."""

    silo: str
    opened_at: float
    bytes: int = 0
    objects: set[tuple[str, str, int]] = field(default_factory=set)


def _readable(task: OpenTask, key: str) -> bool:
    """Whether a key is named, lies in a folder ("a/b/") that is, or may be the task's to write."""
    return any(
        key.startswith(one) if one.endswith("/") else key == one for one in task.readable
    ) or any(key.startswith(one.partition("{")[0]) for one in task.writable)
