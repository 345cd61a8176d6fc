"""A run's audit log: append-only JSON lines, each holding the sha256 of the one before.

What is in it: with which key the aggregator signs the lines ("aggregator"), who had which key
("member"), what each round merged, with the answers exactly as the silos signed them ("round"), and
where a restart took the run up again ("resumed"). A changed or removed line breaks the chain for
everybody who reads it. Cutting lines off the end does not: that is what a head noted elsewhere is
for. Silos are told the head with each task and sign it; so a line that was the last when they were
asked can't be taken back (`photon.membership.verification`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

from photon.errors import AuditError, DiskFullError
from photon.membership.chain import Chain, raw_lines
from photon.membership.keys import NodeKey
from photon.membership.records import MemberName, Sha256, Signer
from photon.store.disk import sync_to_disk

#: The log's name in a run folder.
AUDIT_FILE = "audit.jsonl"

AGGREGATOR = "aggregator"
MEMBER, ROUND, LOST, RESUMED, TORN = "member", "round", "lost", "resumed", "torn"
#: Of a federation inside another: its parent has a task, and the next round starts from its state.
ASKED = "asked"
#: What is predicted of the cards of the run, and who takes no part for it.
VERDICT = "verdict"

#: What to do about a log that can't be true.
DAMAGE_HINT = (
    "Compare it with a copy that a silo or a backup holds; do not trust what comes after that line."
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class AggregatorRecord(_Record):
    """The key that signs this line and those after it."""

    fingerprint: str
    public_key: str


class MergedUpdate(_Record):
    """One silo's part in a round.

    Attributes:
        begun: round of the task that it answers, where that is an earlier one: it came late.
        reply: exactly the text that was signed.
        fingerprint: of the key that signed.
        update: sha256 of the update's manifest, as the answer's Ref has it; None leaves it to the
            reply.
        tokens: that it was weighed by; None leaves it to the reply.
    """

    silo: MemberName
    begun: Annotated[int, Field(ge=1)] | None = None
    update: Sha256 | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    reply: str
    signature: str
    fingerprint: str


class DroppedSilo(_Record):
    """A silo that was asked and is not part of the round, and why."""

    silo: MemberName
    reason: str


class RoundRecord(_Record):
    """A finished round.

    Attributes:
        state_sha256: of the global state after it: the one that the next round starts from.
        weights_sha256: of its weights alone, by their names in the model: what a release must have.
        checkpoint: its files, name -> sha256, as state.json of the checkpoint has them.
    """

    run: str
    round: Annotated[int, Field(ge=1)]
    merged: list[MergedUpdate]
    state_sha256: Sha256 | None = None
    weights_sha256: Sha256 | None = None
    checkpoint: dict[str, str] | None = None
    dropped: list[DroppedSilo] = []


class LostRecord(_Record):
    """An attempt at a round that had too few good updates; nothing of it was merged.

    Attributes:
        attempt: counts from 1; the next one has another draw.
        asked: silos that had the task.
        dropped: those of them without a good update, and why.
    """

    run: str
    round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)]
    asked: list[MemberName]
    dropped: list[DroppedSilo] = []


class ResumedRecord(_Record):
    """The run was taken up after `round`; records of later rounds do not count any more."""

    run: str
    round: Annotated[int, Field(ge=0)]
    state_sha256: Sha256 | None = None
    checkpoint: dict[str, str] | None = None


class AuditLog:
    """The log, to write to it. Several processes may; each line is on disk when `append` returns.

    A last line that is cut short (power was lost while it was written, so nobody was told that it
    is there) is removed; a line of kind "torn" says so.

    Args:
        path: the file; made if missing.
        key: the aggregator's: signs each line, and stands in the log before the first of them.

    Raises:
        AuditError: the chain is broken; nothing is ever appended to such a log.
    """

    def __init__(self, path: str | os.PathLike[str], key: NodeKey | None = None) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._size = 0
        self._chain = Chain(key)
        self._signer: dict[str, Any] | None = None
        with self._held() as file:
            self._catch_up(file)
            if key is not None:
                its = {"fingerprint": key.fingerprint, "public_key": key.public_pem}
                if self._signer != its:
                    self._write(file, AGGREGATOR, its)

    def append(self, kind: str, body: dict[str, Any] | BaseModel | Signer) -> None:
        """Write a line.

        Args:
            kind: MEMBER, ROUND, RESUMED or a word of your own.
            body: for those kinds, a Signer and the record of that name, or a dict like it.

        Raises:
            AuditError: somebody changed the file meanwhile.
            DiskFullError: no room; the log is as it was.
        """
        with self._held() as file:
            self._catch_up(file)
            self._write(file, kind, to_jsonable_python(body))

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
                    sync_to_disk(self.path.parent)
                yield file

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what is new since the last look: everything, the first time."""
        size = file.seek(0, os.SEEK_END)
        if size < self._size:
            raise AuditError(
                f"{self.path}: {self._size - size} bytes were cut off its end", hint=DAMAGE_HINT
            )
        file.seek(self._size)
        torn = 0
        for raw in raw_lines(file):
            if not raw.endswith(b"\n"):
                torn = len(raw)
                break
            try:
                record = self._chain.next(raw)
            except ValueError as error:
                raise AuditError(
                    f"{self.path} line {self._chain.lines + 1}: {error}", hint=DAMAGE_HINT
                ) from error
            if record["kind"] == AGGREGATOR:
                self._signer = record["body"]
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
        self._chain.advance(head, line)
