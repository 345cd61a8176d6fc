"""One line of a log, proved to somebody who doesn't have the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from photon.errors import AuditError, MembershipError
from photon.membership.audit import AGGREGATOR
from photon.membership.chain import read_line
from photon.membership.keys import fingerprint_of
from photon.membership.merkle import inclusion_path, leaf_hash, root_by_path
from photon.membership.signing import LOG, verify_document


def prove_line(log: Path, number: int) -> dict[str, Any]:
    """For JSON: a line (from 1), the last one, the way to it, the key; AuditError if none."""
    lines = log.read_bytes().splitlines(keepends=True)
    if not 1 <= number <= len(lines):
        raise AuditError(f"{log} has no line {number}: it has {len(lines)}")
    signers = [one["body"] for one in map(read_line, lines) if one["kind"] == AGGREGATOR]
    leaves = [leaf_hash(line) for line in lines[:-1]]
    path = inclusion_path(leaves, number - 1) if number < len(lines) else []
    texts = {"line": lines[number - 1].decode(), "head": lines[-1].decode()}
    return {**texts, "path": path, "aggregator": signers[-1]["public_key"]}


def check_proof(document: bytes) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The line that is proved, the head, and the fingerprint of the key that signed the head.

    Raises:
        AuditError: it proves nothing.
    """
    try:
        told = json.loads(document)
        raw, last = str(told["line"]).encode(), str(told["head"]).encode()
        line, head = read_line(raw), read_line(last)
        verify_document(told["aggregator"], LOG, head["sha256"].encode(), head["signature"])
        if raw != last:
            index, size = int(line["n"]) - 1, int(head["n"]) - 1
            root = root_by_path(leaf_hash(raw), index, size, told["path"])
            if root.hex() != head["root"]:
                raise ValueError("its path leads to another root")
        return line, head, fingerprint_of(told["aggregator"])
    except (ValueError, LookupError, TypeError, RecursionError, MembershipError) as error:
        raise AuditError(f"this proves no line of a log: {str(error)[:200]}") from error
