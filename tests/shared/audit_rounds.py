"""Records of rounds for an audit log, and what its check finds."""

from __future__ import annotations

import json

from photon.membership.audit import MergedUpdate, RoundRecord
from photon.membership.verification import verify_audit

RUN = "a" * 32
STATE = "5" * 64
UPDATE = "f" * 64


def finished(round, *merged, run=RUN, state=STATE, dropped=()):
    return RoundRecord(
        run=run, round=round, state_sha256=state, merged=list(merged), dropped=list(dropped)
    )


def merged_update(silo, update, tokens, reply):
    """As logs of earlier versions have it: what was counted stands beside the reply."""
    return MergedUpdate(
        silo=silo,
        update=update,
        tokens=tokens,
        reply=reply.text.decode(),
        signature=reply.signature,
        fingerprint=reply.fingerprint,
    )


def last(log, kind):
    """The body of the newest line of a kind in an AuditLog's file."""
    records = [json.loads(line) for line in log.path.read_bytes().splitlines()]
    return ([None] + [one["body"] for one in records if one["kind"] == kind])[-1]


def problems(path):
    return [text.partition(": ")[2] for text in verify_audit(path).problems]


def canonical(record):
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
