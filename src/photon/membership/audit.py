"""A run's audit log: append-only JSON lines, each holding the sha256 of the one before.

What is in it: who had which key ("member"), what each round merged, with the answers exactly as the
silos signed them ("round"), and where a restart took the run up again ("resumed"). A changed or
removed line breaks the chain for everybody who reads it. Cutting lines off the end does not: that
is what a head noted elsewhere is for (`AuditReport.head`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.errors import AuditError, DiskFullError, MembershipError
from photon.membership.keys import fingerprint_of
from photon.membership.roster import Member, SignedReply, Signer
from photon.membership.signing import RECEIPT, verify_document

#: The log's name in a run folder.
AUDIT_FILE = "audit.jsonl"

MEMBER, ROUND, RESUMED, TORN = "member", "round", "resumed", "torn"

_BEGINNING = "0" * 64
_MOST_LINE_BYTES = 1 << 28
_MOST_PROBLEMS = 100
_HINT = (
    "Compare it with a copy that a silo or a backup holds; do not trust what comes after that line."
)

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class MemberRecord(_Record):
    """A member's key, written before the first round in which it may answer with it."""

    name: _Name
    fingerprint: str
    public_key: str
    data_sha256: _Sha256 | None = None

    @classmethod
    def of(cls, member: Member | Signer) -> MemberRecord:
        facts = member.facts if isinstance(member, Member) else member
        return cls(
            name=member.name,
            fingerprint=member.fingerprint,
            public_key=member.public_key,
            data_sha256=facts.data_sha256,
        )


class MergedUpdate(_Record):
    """One silo's part in a round.

    Attributes:
        reply: exactly the text that was signed.
        fingerprint: of the key that signed.
        update: sha256 of the update's manifest, as the answer's Ref has it; None leaves it to the
            reply.
        tokens: that it was weighed by; None leaves it to the reply.
    """

    silo: _Name
    update: _Sha256 | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    reply: str
    signature: str
    fingerprint: str

    @classmethod
    def of(cls, silo: str, update: str, tokens: int, reply: SignedReply) -> MergedUpdate:
        return cls(
            silo=silo,
            update=update,
            tokens=tokens,
            reply=reply.text.decode(),
            signature=reply.signature,
            fingerprint=reply.fingerprint,
        )


class DroppedSilo(_Record):
    """A silo that was asked and is not part of the round, and why."""

    silo: _Name
    reason: str


class RoundRecord(_Record):
    """A finished round.

    Attributes:
        state_sha256: of the global state after it.
        checkpoint: its files, name -> sha256, as state.json of the checkpoint has them.
    """

    run: str
    round: Annotated[int, Field(ge=1)]
    merged: list[MergedUpdate]
    state_sha256: _Sha256 | None = None
    checkpoint: dict[str, str] | None = None
    dropped: list[DroppedSilo] = []


class ResumedRecord(_Record):
    """The run was taken up after `round`; records of later rounds do not count any more."""

    run: str
    round: Annotated[int, Field(ge=0)]
    state_sha256: _Sha256 | None = None
    checkpoint: dict[str, str] | None = None


@dataclass
class AuditReport:
    """What `verify_audit` found.

    Attributes:
        lines: whole lines.
        rounds: that count, without those that a restart took back.
        updates: merged in those.
        last_round: the newest one; 0 if there is none.
        members: name -> fingerprint of the key recorded last. Silos compare it with their own.
        head: sha256 of the last line: whoever keeps it can tell later that nothing before it
            changed, and that it was not cut off.
        problems: what must not be; empty if all is well. The first hundred.
        remarks: what is worth knowing, and no problem.
    """

    path: Path
    lines: int = 0
    rounds: int = 0
    updates: int = 0
    last_round: int = 0
    members: dict[str, str] = field(default_factory=dict)
    head: str = _BEGINNING
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def require_good(self) -> None:
        """Raises:
        AuditError: there are problems; names the first.
        """
        if self.problems:
            more = len(self.problems) - 1
            others = f" (and {more} more)" if more else ""
            raise AuditError(f"{self.problems[0]}{others}", hint=_HINT)


class AuditLog:
    """The log, to write to it. Several processes may; each line is on disk when `append` returns.

    A last line that is cut short (power was lost while it was written, so nobody was told that it
    is there) is removed; a line of kind "torn" says so.

    Args:
        path: the file; made if missing.

    Raises:
        AuditError: the chain is broken; nothing is ever appended to such a log.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._size = 0
        self._chain = _Chain()
        self._last: dict[str, dict[str, Any]] = {}
        with self._held() as file:
            self._catch_up(file)

    def append(self, kind: str, body: dict[str, Any] | BaseModel) -> None:
        """Write a line.

        Args:
            kind: MEMBER, ROUND, RESUMED or a word of your own.
            body: for those kinds, the record of that name, or a dict like it.

        Raises:
            AuditError: somebody changed the file meanwhile.
            DiskFullError: no room; the log is as it was.
        """
        plain = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
        with self._held() as file:
            self._catch_up(file)
            self._write(file, kind, plain)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The body of the newest line of that kind."""
        with self._held() as file:
            self._catch_up(file)
            return self._last.get(kind)

    @property
    def head(self) -> str:
        """sha256 of the last line."""
        return self._chain.head

    @contextlib.contextmanager
    def _held(self) -> Iterator[BinaryIO]:
        with self._lock:
            try:
                new = not self.path.exists()
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise AuditError(
                    f"can't open the audit log {self.path}: {error.strerror}"
                ) from error
            with os.fdopen(descriptor, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the descriptor
                if new:
                    _sync_folder(self.path.parent)
                yield file

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what is new since the last look: everything, the first time."""
        size = file.seek(0, os.SEEK_END)
        if size < self._size:
            raise AuditError(
                f"{self.path}: {self._size - size} bytes were cut off its end", hint=_HINT
            )
        file.seek(self._size)
        torn = 0
        for raw in _raw_lines(file):
            if not raw.endswith(b"\n"):
                torn = len(raw)
                break
            try:
                record = self._chain.next(raw)
            except ValueError as error:
                raise AuditError(
                    f"{self.path} line {self._chain.lines + 1}: {error}", hint=_HINT
                ) from error
            self._last[record["kind"]] = record["body"]
            self._size += len(raw)
        if torn:
            file.truncate(self._size)
            self._write(file, TORN, {"bytes": torn})

    def _write(self, file: BinaryIO, kind: str, body: dict[str, Any]) -> None:
        line, head = self._chain.line(kind, body, time.time())
        try:
            file.seek(self._size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(self._size)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    f"no room for the next line of {self.path}", hint="Free some disk; then resume."
                ) from error
            raise AuditError(f"can't write {self.path}: {error.strerror}") from error
        self._size += len(line)
        self._chain.advance(head)
        # As it will be read, and not the caller's own object.
        self._last[kind] = json.loads(line)["body"]


def verify_audit(path: str | os.PathLike[str], *, head: str | None = None) -> AuditReport:
    """Check every link, every signature, and that no update counts twice.

    Args:
        path: the log, or a run folder.
        head: sha256 of a line that must be there: the head noted at an earlier time.

    Raises:
        AuditError: there is no log to read. Whatever is wrong inside it is in the report.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    file = path / AUDIT_FILE if folder else path
    report = AuditReport(file)
    story = _Story(report)
    seen_head = head is None
    chain = _Chain()
    try:
        with file.open("rb") as lines:
            for raw in _raw_lines(lines):
                if not raw.endswith(b"\n"):
                    report.remarks.append(
                        f"{file}: the last line is cut short ({len(raw)} bytes); it was never "
                        "acknowledged, and is removed when the run is resumed"
                    )
                    break
                report.lines += 1
                where = f"{file} line {report.lines}"
                try:
                    record = chain.next(raw)
                except ValueError as error:
                    _add(report.problems, f"{where}: {error}")
                    record = chain.skip(raw)
                else:
                    seen_head = seen_head or record["sha256"] == head
                if record is not None:
                    story.tell(where, record)
    except FileNotFoundError:
        raise AuditError(
            f"there is no {file}",
            hint="Name the run folder of a run that `photon serve` made, or its audit.jsonl.",
        ) from None
    except OSError as error:
        raise AuditError(f"can't read {file}: {error.strerror}") from error
    if not seen_head:
        _add(report.problems, f"{file}: no line has the sha256 {head!r}")
    report.head = chain.head if report.lines else _BEGINNING
    story.finish()
    if folder is not None:
        story.compare_with(folder / "checkpoints")
    return report


class _Chain:
    """Where in the chain a reader or writer stands."""

    def __init__(self) -> None:
        self.lines = 0
        self.head = _BEGINNING
        self._broken = False

    def line(self, kind: str, body: dict[str, Any], at: float) -> tuple[bytes, str]:
        """The next line, and its sha256."""
        record = {
            "n": self.lines + 1,
            "at": round(at, 3),
            "previous": self.head,
            "kind": kind,
            "body": body,
        }
        digest = hashlib.sha256(_canonical(record)).hexdigest()
        return _canonical({**record, "sha256": digest}) + b"\n", digest

    def advance(self, head: str) -> None:
        self.lines += 1
        self.head = head

    def next(self, raw: bytes) -> dict[str, Any]:
        """The record on a line, if the line is the next one.

        Raises:
            ValueError: it is not; says what is wrong.
        """
        record = _record(raw)
        digest = record["sha256"]
        bare = {name: value for name, value in record.items() if name != "sha256"}
        if hashlib.sha256(_canonical(bare)).hexdigest() != digest:
            raise ValueError("its sha256 is not that of its content")
        if not self._broken:
            if record["previous"] != self.head:
                raise ValueError("it does not follow the line before: lines were changed or lost")
            if record["n"] != self.lines + 1:
                raise ValueError(f"it says it is line {record['n']}")
        self._broken = False
        self.advance(digest)
        return record

    def skip(self, raw: bytes) -> dict[str, Any] | None:
        """Go on after a line that is wrong, so that what follows is judged by itself.

        Returns what it says, if it says anything.
        """
        try:
            record = _record(raw)
        except ValueError:
            record, self._broken = None, True
        self.advance(record["sha256"] if record is not None else self.head)
        return record


class _Round(NamedTuple):
    state_sha256: str | None
    checkpoint: dict[str, str] | None
    updates: int

    def led_to(self, state_sha256: str | None, checkpoint: dict[str, str] | None) -> bool:
        """Whether that is the state after it, as far as both sides say anything."""
        return all(
            None in pair or pair[0] == pair[1]
            for pair in ((self.state_sha256, state_sha256), (self.checkpoint, checkpoint))
        )


class _Story:
    """What the records say, one after another, and whether it can be true."""

    def __init__(self, report: AuditReport) -> None:
        self._report = report
        self._keys: dict[tuple[str, str], MemberRecord] = {}  # by name and fingerprint
        self._rounds: dict[str, dict[int, _Round]] = {}  # by run and number
        self._after: dict[str, int] = {}  # the round that a run stands after

    def tell(self, where: str, record: dict[str, Any]) -> None:
        kinds = {MEMBER: MemberRecord, ROUND: RoundRecord, RESUMED: ResumedRecord}
        kind = kinds.get(record["kind"])
        if kind is None:
            if record["kind"] == TORN:
                _add(self._report.remarks, f"{where}: a line cut short was removed before it")
            return
        try:
            body = kind.model_validate(record["body"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part)[:60] for part in first["loc"])
            self._problem(where, f"no record of a {record['kind']}: {place}: {first['msg'][:200]}")
            return
        if isinstance(body, MemberRecord):
            self._member(where, body)
        elif isinstance(body, RoundRecord):
            self._round(where, body)
        else:
            self._resumed(where, body)

    def finish(self) -> None:
        for run, rounds in self._rounds.items():
            self._report.rounds += len(rounds)
            self._report.updates += sum(one.updates for one in rounds.values())
            self._report.last_round = max(self._report.last_round, self._after.get(run, 0))

    def compare_with(self, checkpoints: Path) -> None:
        """Hold the log against the checkpoints that are kept.

        A log whose end was cut off is a good chain; the checkpoints tell that there was more.
        """
        report = self._report
        kept = {
            int(entry.name.removeprefix("round-")): entry / "state.json"
            for entry in checkpoints.glob("round-*")
            if entry.name.removeprefix("round-").isdecimal()
        }
        newest = max(kept, default=0)
        if newest > report.last_round:
            _add(
                report.problems,
                f"{report.path} ends at round {report.last_round}, but there is a checkpoint of "
                f"round {newest}",
            )
        for number, path in sorted(kept.items()):
            found = _files_of(path)
            told = [rounds[number] for rounds in self._rounds.values() if number in rounds]
            if told and not any(one.led_to(None, found) for one in told):
                _add(report.problems, f"{path} is not the state that the log tells of")

    def _member(self, where: str, body: MemberRecord) -> None:
        try:
            found = fingerprint_of(body.public_key)
        except MembershipError as error:
            self._problem(where, f"{body.name}: {error.message}")
            return
        if found != body.fingerprint:
            self._problem(where, f"the key of {body.name} has another fingerprint: {found}")
            return
        self._keys[body.name, body.fingerprint] = body
        self._report.members[body.name] = body.fingerprint

    def _round(self, where: str, body: RoundRecord) -> None:
        wanted = self._after.get(body.run, 0) + 1
        if body.round != wanted:
            self._problem(where, f"round {body.round} where round {wanted} must follow")
        rounds = self._rounds.setdefault(body.run, {})
        if body.round in rounds:
            self._problem(where, f"round {body.round} was merged before")
        rounds[body.round] = _Round(body.state_sha256, body.checkpoint, len(body.merged))
        self._after[body.run] = body.round
        silos: set[str] = set()
        for update in body.merged:
            if update.silo in silos:
                self._problem(
                    where, f"an update of {update.silo} counts twice in round {body.round}"
                )
            silos.add(update.silo)
            self._update(where, body, update)
        for dropped in body.dropped:
            if dropped.silo in silos:
                self._problem(where, f"{dropped.silo} is both merged and dropped")

    def _update(self, where: str, body: RoundRecord, update: MergedUpdate) -> None:
        silo = update.silo
        member = self._keys.get((update.silo, update.fingerprint))
        if member is None:
            self._problem(
                where,
                f"no key {update.fingerprint[:80]} of {silo} is recorded before this round",
            )
            return
        try:
            text = update.reply.encode()
            verify_document(member.public_key, RECEIPT, text, update.signature)
            reply = json.loads(text)
            fit = reply["fit"]
            said = {
                "kind": reply["kind"],
                "run": reply["run"],
                "round": reply["round"],
                "silo": reply["silo"],
                "update": fit["update"]["sha256"],
                "tokens": fit["tokens"],
            }
            data = reply.get("data")
        except MembershipError:
            self._problem(where, f"the signature of {silo} does not hold")
            return
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._problem(where, f"the reply of {silo} is no answer to a training task")
            return
        counted = {
            "kind": "fit",
            "run": body.run,
            "round": body.round,
            "silo": update.silo,
            "update": update.update,
            "tokens": update.tokens,
        }
        if not (isinstance(said["update"], str) and isinstance(said["tokens"], int)):
            self._problem(where, f"the reply of {silo} is no answer to a training task")
            return
        for name, value in counted.items():
            if value is None:
                continue
            if said[name] != value or type(said[name]) is not type(value):
                self._problem(
                    where,
                    f"{silo} signed {name} {repr(said[name])[:80]}, but {value!r} is "
                    "what was counted",
                )
        if data is not None and member.data_sha256 not in (None, data):
            self._problem(where, f"{silo} trained on other data than it registered")

    def _resumed(self, where: str, body: ResumedRecord) -> None:
        after = self._after.get(body.run)
        rounds = self._rounds.setdefault(body.run, {})
        if after is not None and body.round > after:
            self._problem(
                where, f"resumed after round {body.round}, but the log ends at round {after}"
            )
        before = rounds.get(body.round)
        if before is not None and not before.led_to(body.state_sha256, body.checkpoint):
            self._problem(
                where, f"resumed from another state than the one after round {body.round}"
            )
        for later in [number for number in rounds if number > body.round]:
            del rounds[later]
            _add(self._report.remarks, f"{where}: round {later} was taken back by a restart")
        self._after[body.run] = body.round

    def _problem(self, where: str, text: str) -> None:
        _add(self._report.problems, f"{where}: {text}")


def _record(raw: bytes) -> dict[str, Any]:
    """A line's content, if it is written as this module writes.

    Raises:
        ValueError: it is not.
    """
    try:
        record = json.loads(raw)
        if not isinstance(record, dict) or _canonical(record) + b"\n" != raw:
            raise ValueError
        if sorted(record) != ["at", "body", "kind", "n", "previous", "sha256"]:
            raise ValueError
        texts = (record["kind"], record["previous"], record["sha256"])
        if not (all(isinstance(text, str) for text in texts) and isinstance(record["body"], dict)):
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError("it is no line of an audit log") from None
    return record


def _files_of(path: Path) -> dict[str, str] | None:
    """Hashes of a checkpoint's files, as its state.json has them; None if it has none."""
    try:
        files = json.loads(path.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return files if isinstance(files, dict) else None


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    while raw := file.readline(_MOST_LINE_BYTES):
        yield raw


def _add(texts: list[str], text: str) -> None:
    if len(texts) < _MOST_PROBLEMS:
        # What a log says may hold anything; it is shown on a terminal.
        texts.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
