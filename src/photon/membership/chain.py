"""The chain of an audit log's lines: each holds the sha256 of the one before, and is signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from photon.membership.keys import NodeKey
from photon.membership.signing import LOG, sign_document

#: What the first line follows.
BEGINNING = "0" * 64

_MOST_LINE_BYTES = 1 << 28

#: Of a line, what its sha256 covers.
_COVERED = ("at", "body", "kind", "n", "previous")


class Chain:
    """Where in the chain a reader or writer stands.

    Args:
        key: signs what is written: the sha256 of each line.
    """

    def __init__(self, key: NodeKey | None = None) -> None:
        self._key = key
        self.lines = 0
        self.head = BEGINNING
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
        record["sha256"] = digest
        if self._key is not None:
            record["signature"] = sign_document(self._key, LOG, digest.encode())
        return _canonical(record) + b"\n", digest

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
        bare = {name: record[name] for name in _COVERED}
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


def _record(raw: bytes) -> dict[str, Any]:
    """A line's content, if it is written as this module writes.

    Raises:
        ValueError: it is not.
    """
    try:
        record = json.loads(raw)
        if not isinstance(record, dict) or _canonical(record) + b"\n" != raw:
            raise ValueError
        if record.keys() - {"signature"} != {*_COVERED, "sha256"}:
            raise ValueError
        texts = [record[name] for name in ("kind", "previous", "sha256")]
        texts.append(record.get("signature", ""))
        if not (all(isinstance(text, str) for text in texts) and isinstance(record["body"], dict)):
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError("it is no line of an audit log") from None
    return record


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """Each line as it is, its newline included; the last one may lack it."""
    while raw := file.readline(_MOST_LINE_BYTES):
        yield raw
