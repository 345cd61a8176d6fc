"""The way to a site's trainer: a Unix socket, one question and one answer a connection.

A frame is its length in 4 bytes, big-endian, and a JSON object of so many bytes:

    question  {"ask": base64 of a sealed Ask's bytes, as they came}
    answer    {"reply": base64 of the Reply's bytes, "signature": base64, "fingerprint": "sha256:."}
    or, to {"figures": true}, {"presence": fields of Presence, "heard_at": ..., "bytes_up": ...}
    or        {"error": {"code": of a PhotonError, "message": ..., "hint": ...}}

The connection stays open while the trainer works, which may take days. If it ends without an
answer, the trainer is gone; a new one answers the same question the same way.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from photon.errors import PhotonError, ProtocolError, WorkerLostError
from photon.membership.desk_documents import Failure, error_record
from photon.membership.records import SignedReply

#: The trainer's socket, in the node's home.
SOCKET_FILE = "trainer.sock"

#: No frame is longer: an Ask of the greatest size fits, in base64.
MOST_FRAME_BYTES = 2 << 20

_LENGTH = struct.Struct(">I")

#: Pauses between attempts to reach a trainer that is gone.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 1.0

#: A wait is begun anew so often, at least: a timeout of years overflows the system's clock.
_LONGEST_WAIT_S = 86_400.0

#: The system takes no longer address of a Unix socket (108 bytes on Linux, 104 elsewhere).
_MOST_ADDRESS_BYTES = 103


def ask_trainer(path: str | os.PathLike[str], ask: bytes, *, within_s: float) -> SignedReply:
    """Put a question to the trainer and wait for its answer, over as many restarts as it takes.

    Args:
        path: of the socket.
        ask: an Ask's bytes, as they came.
        within_s: nobody waits longer for the answer.

    Returns:
        The answer; its task_id is empty, as this side does not read the question.

    Raises:
        WorkerLostError: no answer by then; says why the last attempt failed.
        ProtocolError: the trainer can't make sense of the question, or this side of the answer.
        PhotonError: another reason why there is not even a refusal that is signed.
    """
    question = frame({"ask": base64.b64encode(ask).decode()})
    pause_s, problem = _FIRST_PAUSE_S, "it was never reached"
    until = time.monotonic() + within_s
    while (left_s := until - time.monotonic()) > 0:
        reached = False
        try:
            with connected(Path(path)) as trainer:
                reached = True
                trainer.settimeout(min(left_s, _LONGEST_WAIT_S))
                trainer.sendall(question)
                answer = _read(trainer)
            if answer is not None:
                return reply_of(answer)
            problem = "it ended without an answer"
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        # One that answered the call was there a moment ago, and is on its way back.
        pause_s = _FIRST_PAUSE_S if reached else min(_LONGEST_PAUSE_S, 2 * pause_s)
        time.sleep(max(0.0, min(pause_s, until - time.monotonic())))
    raise WorkerLostError(
        f"the trainer at {path} gave no answer in time; the last attempt: {problem}",
        hint="See the trainer's log on that node.",
    )


def ask_figures(path: Path, *, within_s: float = 2.0) -> dict[str, Any] | None:
    """What the trainer does just now; None where none answers.

    Returns:
        presence (fields of Presence), heard_at (seconds since the epoch when the aggregator
        answered last, or None), bytes_up and bytes_down (since the trainer's start).
    """
    try:
        with connected(path) as trainer:
            trainer.settimeout(within_s)
            trainer.sendall(frame({"figures": True}))
            return _read(trainer)
    except OSError:
        return None


def frame(record: Mapping[str, Any]) -> bytes:
    """A record as it is sent.

    Raises:
        ProtocolError: it is too long.
    """
    data = json.dumps(record, separators=(",", ":")).encode()
    if len(data) > MOST_FRAME_BYTES:
        raise ProtocolError(
            f"a message of {len(data)} bytes to or from a trainer; none has more than "
            f"{MOST_FRAME_BYTES}"
        )
    return _LENGTH.pack(len(data)) + data


def unframe(received: bytes | bytearray) -> dict[str, Any] | None:
    """The record in what was received; None while it is not all there.

    Raises:
        ProtocolError: it is none, or too long; said as soon as it can be known.
    """
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > MOST_FRAME_BYTES:
        raise ProtocolError(
            f"a message of {length} bytes is announced on a trainer's socket; none has more than "
            f"{MOST_FRAME_BYTES}"
        )
    if len(received) < _LENGTH.size + length:
        return None
    try:
        record = json.loads(received[_LENGTH.size : _LENGTH.size + length])
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no JSON on a trainer's socket: {str(error)[:200]}") from error
    if not isinstance(record, dict):
        raise ProtocolError(f"a JSON {type(record).__name__} on a trainer's socket, not an object")
    return record


def bytes_of(record: Mapping[str, Any], key: str) -> bytes:
    """What a record has in base64: the Ask's bytes in a question, or the Reply's in an answer.

    Raises:
        ProtocolError: it has none.
    """
    text = record.get(key)
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except ValueError:
        pass
    raise ProtocolError(f"a message on a trainer's socket without {key!r} in base64")


def answer_of(reply: SignedReply) -> dict[str, Any]:
    """An answer, as a record to be framed."""
    return {
        "reply": base64.b64encode(reply.text).decode(),
        "signature": reply.signature,
        "fingerprint": reply.fingerprint,
    }


def refusal_of(error: PhotonError) -> dict[str, Any]:
    """An answer where none can be signed, as a record to be framed."""
    return {"error": error_record(error)}


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A connection to a socket.

    Raises:
        OSError: nobody listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        with short_address(path) as address:
            one.connect(address)
        yield one


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """How the system is told of a socket's path, which may be longer than it takes.

    Raises:
        OSError: the folder does not exist.
    """
    if len(os.fsencode(path)) <= _MOST_ADDRESS_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _read(trainer: socket.socket) -> dict[str, Any] | None:
    """The answer; None if the connection ends before it is whole."""
    received = bytearray()
    while (record := unframe(received)) is None:
        some = trainer.recv(1 << 16)
        if not some:
            return None
        received += some
    return record


def error_in(record: Mapping[str, Any]) -> PhotonError | None:
    """What `refusal_of` made a record of; None if it is another."""
    try:
        return Failure.model_validate(record).error.raised()
    except ValidationError:
        return PhotonError(str(record["error"])[:2000]) if "error" in record else None


def reply_of(record: Mapping[str, Any]) -> SignedReply:
    if (error := error_in(record)) is not None:
        raise error
    signature, fingerprint = record.get("signature"), record.get("fingerprint")
    if not isinstance(signature, str) or not isinstance(fingerprint, str):
        raise ProtocolError("a trainer's answer without a signature and a fingerprint")
    return SignedReply("", bytes_of(record, "reply"), signature, fingerprint)
