"""Real keys and real roster files."""

from __future__ import annotations

import json

import pytest
from audit_rounds import UPDATE, finished, merged_update

from photon.membership.audit import MEMBER, ROUND, AuditLog
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.membership.roster import Facts, Roster
from photon.membership.signing import RECEIPT, sign_document

RUN = "a" * 32


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Five keys, made once."""
    folder = tmp_path_factory.mktemp("keys")
    return [NodeKey.create(folder / f"node-{number}.key") for number in range(5)]


@pytest.fixture
def facts():
    return Facts("d" * 64, "e" * 64, 123_456, "0.1.0")


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "home" / "members.sqlite") as roster:
        yield roster


@pytest.fixture
def join(roster, keys, facts):
    """Make a member: join("lab") or join("lab", keys[1])."""

    def join(name, key=None):
        pem = (key or keys[0]).public_pem
        return roster.redeem(roster.invite(name, 60), name, pem, facts)

    return join


@pytest.fixture
def signed_reply():
    """A reply as a silo sends it, with what the audit log reads of it, and its signature."""

    def reply(key, silo, round=1, *, update="f" * 64, tokens=1000, run=RUN, data="d" * 64, **other):
        document = {
            "kind": "fit",
            "run": run,
            "round": round,
            "silo": silo,
            "task": f"{run}/fit/{round}/{silo}",
            "data": data,
            "fit": {"update": {"sha256": update}, "tokens": tokens},
        } | other
        text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        return SignedReply(
            document["task"], text, sign_document(key, RECEIPT, text), key.fingerprint
        )

    return reply


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path, roster, join, keys):
    """A log in which lab and bank are members."""
    log = AuditLog(path)
    for name, key in (("lab", keys[0]), ("bank", keys[1])):
        log.append(MEMBER, roster.signer(join(name, key).fingerprint))
    return log


@pytest.fixture
def merged(keys, signed_reply):
    """merged("lab", 3): lab's part of round 3."""

    def merged(silo="lab", round=1, *, key=None, **reply):
        key = key or keys[("lab", "bank").index(silo)]
        return merged_update(silo, UPDATE, 1000, signed_reply(key, silo, round, **reply))

    return merged


@pytest.fixture
def three_rounds(log, merged):
    for number in (1, 2, 3):
        log.append(ROUND, finished(number, merged("lab", number), merged("bank", number)))
    return log
