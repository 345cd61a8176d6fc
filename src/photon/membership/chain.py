"""An audit log's lines, each with the hash of the last, the Merkle root of all, a signature."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from photon.membership.keys import NodeKey
from photon.membership.merkle import Tree, leaf_hash
from photon.membership.signing import LOG, sign_document

#: What the first line follows.
BEGINNING = "0" * 64

_MOST_LINE_BYTES = 1 << 28

#: Of a line, what its sha256 covers; and "root", which earlier versions did not write.
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
        self._tree: Tree | None = Tree()

    @property
    def root(self) -> str | None:
        """Merkle root of all lines; None once one was wrong."""
        return self._tree and self._tree.root.hex()

    def line(self, kind: str, body: dict[str, Any], at: float) -> tuple[bytes, str]:
        """The next line, and its sha256."""
        record = {
            "n": self.lines + 1,
            "at": round(at, 3),
            "previous": self.head,
            "root": self.root,
            "kind": kind,
            "body": body,
        }
        digest = hashlib.sha256(_canonical(record)).hexdigest()
        record["sha256"] = digest
        if self._key is not None:
            record["signature"] = sign_document(self._key, LOG, digest.encode())
        return _canonical(record) + b"\n", digest

    def advance(self, head: str, raw: bytes) -> None:
        self.lines += 1
        self.head = head
        if self._tree is not None:
            self._tree.add(leaf_hash(raw))

    def next(self, raw: bytes) -> dict[str, Any]:
        """The record on a line, if the line is the next one.

        Raises:
            ValueError: it is not; says what is wrong.
        """
        record = read_line(raw)
        if not self._broken:
            if record["previous"] != self.head:
                raise ValueError("it does not follow the line before: lines were changed or lost")
            if record["n"] != self.lines + 1:
                raise ValueError(f"it says it is line {record['n']}")
            if self._tree is not None and record.get("root", self.root) != self.root:
                raise ValueError("its Merkle root is not that of the lines before it")
        self._broken = False
        self.advance(record["sha256"], raw)
        return record

    def skip(self, raw: bytes) -> dict[str, Any] | None:
        """Go on after a line that is wrong, so that what follows is judged by itself.

        Returns what it says, if it says anything.
        """
        self._tree = None
        try:
            record = _record(raw)
        except ValueError:
            record, self._broken = None, True
        self.advance(record["sha256"] if record is not None else self.head, raw)
        return record


def read_line(raw: bytes) -> dict[str, Any]:
    """A line's content, whatever it follows; ValueError if it is none, or was changed."""
    record = _record(raw)
    bare = {name: record[name] for name in (*_COVERED, "root") if name in record}
    if hashlib.sha256(_canonical(bare)).hexdigest() != record["sha256"]:
        raise ValueError("its sha256 is not that of its content")
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
        if record.keys() - {"signature", "root"} != {*_COVERED, "sha256"}:
            raise ValueError
        texts = [record[name] for name in ("kind", "previous", "sha256")]
        texts += [record.get("signature", ""), record.get("root", "")]
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
