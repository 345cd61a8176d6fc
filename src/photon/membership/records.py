"""What the roster holds: members, invitations, presence, tasks, replies, events."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

#: No figure that a node tells of its training is larger.
MOST_FIGURE = 1e15

Status = Literal["active", "suspended", "expelled"]

#: Names of members are names of folders in the store.
MEMBER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\z")]

SHA256 = re.compile(r"[0-9a-f]{64}")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


_Whole = Annotated[int, Field(ge=0, lt=2**53)]
_Figure = Annotated[float, Field(ge=0, le=MOST_FIGURE, allow_inf_nan=False)]
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def printable(text: str) -> str:
    """Text of strangers for a terminal or log: one line, nothing that moves a cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


@checked_dataclass(frozen=True, config=_STRICT)
class Facts:
    """What a node says about itself when it joins. Another one can't be made.

    Attributes:
        data_sha256: of its data's manifest.
        tokenizer_sha256: of the tokenizer that cut the data.
    """

    data_sha256: Sha256
    tokenizer_sha256: Sha256
    train_tokens: _Whole
    photon_version: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9.+!_-]+\z")]


@dataclass(frozen=True)
class Member:
    """One node that may take part, or may no more.

    Attributes:
        name: the silo's name in runs.
        public_key: PEM text (SubjectPublicKeyInfo).
        fingerprint: of that key, "sha256:" and 64 hexadecimal digits.
        joined_at: seconds since the epoch; of the present key.
    """

    name: str
    public_key: str
    fingerprint: str
    status: Status
    facts: Facts
    joined_at: float


@dataclass(frozen=True)
class Signer:
    """Whose key that is or was; as `Member`. So it stands in the audit log.

    Attributes:
        data_sha256: that the member had registered with that key.
    """

    name: MemberName
    fingerprint: str
    public_key: str
    data_sha256: Sha256 | None = None


@dataclass(frozen=True)
class PendingInvitation:
    """An invitation that can still be redeemed; `expires_at` in seconds since the epoch."""

    name: str
    rotate: bool
    made_at: float
    expires_at: float


@dataclass(frozen=True)
class Presence:
    """What a node says it is doing.

    Attributes:
        state: "idle", "loading", "training", "publishing", "refused" or "stopping".
        run: id of the run.
        step, of: optimizer steps done, and to do.
        task: id of the task that is worked on.
        loss, lr, gradient_norm, tokens_per_s: of the newest step that was reported; None where the
            node said nothing of it.
        boot: random; a node draws it anew each time it starts.
    """

    state: Annotated[str, Field(pattern=r"^[a-z][a-z_-]{0,31}\z")]
    run: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9._-]*\z")] = ""
    round: Annotated[int, Field(ge=0, lt=2**31)] = 0
    step: _Whole = 0
    of: _Whole = 0
    task: Annotated[str, Field(max_length=300, pattern=r"^[A-Za-z0-9._/-]*\z")] = ""
    detail: Annotated[str, Field(max_length=2000), AfterValidator(printable)] = ""
    boot: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9-]*\z")] = ""
    loss: _Figure | None = None
    lr: _Figure | None = None
    gradient_norm: _Figure | None = None
    tokens_per_s: _Figure | None = None

    #: Of what comes from outside: the desk reads it with pydantic.
    __pydantic_config__: ClassVar = _STRICT


@dataclass(frozen=True)
class OpenTask:
    """A question to a silo, and what the silo may read and write to answer it.

    Attributes:
        run: id of the run.
        opened_at, until: seconds since the epoch.
        most_bytes: that may be written, in sum.
        readable: keys of the store, or folders that end in "/".
        writable: keys, for str.format(sha256=...): an object is called by its hash. They may be
            read, too.
    """

    id: str
    run: str
    round: int
    silo: str
    kind: str
    opened_at: float
    until: float
    most_bytes: int
    readable: tuple[str, ...]
    writable: tuple[str, ...]


@dataclass(frozen=True)
class SignedReply:
    """An answer as it came.

    Attributes:
        text: exactly the bytes that were signed.
        signature: base64.
        fingerprint: of the key that signed.
        ask: the text of the Ask that it answers, where the aggregator keeps it.
    """

    task_id: str
    text: bytes
    signature: str
    fingerprint: str
    ask: bytes = b""


@dataclass(frozen=True)
class Event:
    """Something worth knowing; `times` it happened without another event in between."""

    at: float
    actor: str
    what: str
    detail: str
    times: int = 1


def utc(at: float) -> str:
    """A time in seconds since the epoch, to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
