"""What the roster holds: members, invitations, presence, tasks, replies, events."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from photon.errors import ProtocolError

#: No figure that a node tells of its training is larger.
MOST_FIGURE = 1e15

Status = Literal["active", "suspended", "expelled"]

#: Names of members are names of folders in the store.
MEMBER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Facts:
    """What a node says about itself when it joins.

    Attributes:
        data_sha256: of its data's manifest.
        tokenizer_sha256: of the tokenizer that cut the data.
    """

    data_sha256: str
    tokenizer_sha256: str
    train_tokens: int
    photon_version: str


@dataclass(frozen=True)
class Member:
    """One node that may take part, or may no more.

    Attributes:
        name: the silo's name in runs.
        public_key: PEM text (SubjectPublicKeyInfo).
        fingerprint: of that key, "sha256:" and 64 hexadecimal digits.
        joined_at: seconds since the epoch; of the present key.
        flower_node_id: Flower's number for the node; None until its key is registered there.
    """

    name: str
    public_key: str
    fingerprint: str
    status: Status
    facts: Facts
    joined_at: float
    flower_node_id: int | None


@dataclass(frozen=True)
class Signer:
    """Whose key that is or was; as `Member`.

    Attributes:
        data_sha256: that the member had registered with that key.
    """

    name: str
    fingerprint: str
    public_key: str
    data_sha256: str


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

    state: str
    run: str = ""
    round: int = 0
    step: int = 0
    of: int = 0
    task: str = ""
    detail: str = ""
    boot: str = ""
    loss: float | None = None
    lr: float | None = None
    gradient_norm: float | None = None
    tokens_per_s: float | None = None


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


def require_sensible(facts: Facts) -> None:
    """Refuse facts that can't be true: they come from outside, and are shown to the operator.

    Raises:
        ProtocolError: names the first one.
    """
    for name in ("data_sha256", "tokenizer_sha256"):
        value = getattr(facts, name)
        if not (isinstance(value, str) and SHA256.fullmatch(value)):
            raise ProtocolError(f"facts.{name} {str(value)[:80]!r} is no sha256 in hexadecimal")
    tokens = facts.train_tokens
    if not (isinstance(tokens, int) and 0 <= tokens < 2**53):
        raise ProtocolError(f"facts.train_tokens {str(tokens)[:40]!r} is no number of tokens")
    version = facts.photon_version
    if not (isinstance(version, str) and 0 < len(version) <= 100 and version.isprintable()):
        raise ProtocolError(f"facts.photon_version {str(version)[:100]!r} is no version")


def utc(at: float) -> str:
    """A time in seconds since the epoch, to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def printable(text: str) -> str:
    """Text of strangers for a terminal or log: one line, nothing that moves a cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
