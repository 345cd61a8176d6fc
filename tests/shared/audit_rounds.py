"""Records of rounds for an audit log, and what its check finds."""

from __future__ import annotations

import json

from photon.membership.audit import RoundRecord
from photon.membership.verification import verify_audit

RUN = "a" * 32
STATE = "5" * 64
UPDATE = "f" * 64


def finished(round, *merged, run=RUN, state=STATE, dropped=()):
    return RoundRecord(
        run=run, round=round, state_sha256=state, merged=list(merged), dropped=list(dropped)
    )


def problems(path):
    return [text.partition(": ")[2] for text in verify_audit(path).problems]


def canonical(record):
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
