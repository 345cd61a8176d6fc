"""Roots and paths as RFC 9162 defines them, and one line of a log proved without the log."""

from __future__ import annotations

import hashlib
import json

import pytest
from audit_rounds import finished
from typer.testing import CliRunner

from photon.cli.main import app
from photon.errors import AuditError
from photon.membership.audit import ROUND, AuditLog
from photon.membership.merkle import Tree, inclusion_path, leaf_hash, root_by_path
from photon.membership.proof import check_proof, prove_line
from photon.membership.verification import verify_audit


def by_definition(lines):
    """MTH of RFC 9162, section 2.1.1."""
    if not lines:
        return hashlib.sha256(b"").digest()
    if len(lines) == 1:
        return hashlib.sha256(b"\0" + lines[0]).digest()
    split = 1
    while split * 2 < len(lines):
        split *= 2
    left, right = by_definition(lines[:split]), by_definition(lines[split:])
    return hashlib.sha256(b"\1" + left + right).digest()


def test_roots_and_paths_are_those_of_the_rfc():
    lines = [str(number).encode() for number in range(20)]
    leaves = [leaf_hash(line) for line in lines]
    for size in range(21):
        root = by_definition(lines[:size])
        assert Tree(leaves[:size]).root == root
        for index in range(size):
            path = inclusion_path(leaves[:size], index)
            assert root_by_path(leaves[index], index, size, path) == root
            for other in range(size):
                if other != index:
                    assert root_by_path(leaves[other], index, size, path) != root
    for index, size, path in [(5, 5, []), (0, 2, []), (0, 1, ["00" * 32]), (1, 3, ["00" * 32])]:
        with pytest.raises(ValueError, match="no path"):
            root_by_path(leaves[0], index, size, path)


@pytest.fixture
def signed_log(path, keys, merged):
    """A log of five lines, all signed by the aggregator, and two rounds of lab's."""
    from photon.membership.audit import MEMBER
    from photon.membership.records import Signer

    log = AuditLog(path, keys[4])
    log.append(MEMBER, Signer("lab", keys[0].fingerprint, keys[0].public_pem))
    for number in (1, 2, 3):
        log.append(ROUND, finished(number, merged("lab", number)))
    return log


def test_each_line_is_proved_without_the_log(signed_log, keys):
    assert verify_audit(signed_log.path).problems == []
    for number in range(1, 6):
        line, head, signer = check_proof(json.dumps(prove_line(signed_log.path, number)).encode())
        assert (line["n"], head["n"], head["sha256"]) == (number, 5, signed_log.head)
        assert signer == keys[4].fingerprint
    with pytest.raises(AuditError, match="no line 6"):
        prove_line(signed_log.path, 6)


def test_a_changed_proof_proves_nothing(signed_log, keys):
    proof = prove_line(signed_log.path, 3)
    other = prove_line(signed_log.path, 4)
    changes = [
        {"line": other["line"]},
        {"line": proof["line"].replace('"round":1', '"round":2')},
        {"path": other["path"]},
        {"path": []},
        {"path": [proof["path"][0]] * 20_000},
        {"head": other["line"]},
        {"aggregator": keys[0].public_pem},
        {"aggregator": 5},
        {"line": None},
    ]
    for change in changes:
        with pytest.raises(AuditError):
            check_proof(json.dumps(proof | change).encode())
    for text in (b"", b"[]", b"{}", b"[" * 100_000):
        with pytest.raises(AuditError):
            check_proof(text)


def test_the_root_in_a_line_is_checked(signed_log, keys):
    lines = signed_log.path.read_bytes().splitlines()
    record = json.loads(lines[-1])
    assert verify_audit(signed_log.path).root == by_definition([one + b"\n" for one in lines]).hex()
    assert record["root"] == by_definition([one + b"\n" for one in lines[:-1]]).hex()
    bare = {name: record[name] for name in ("at", "body", "kind", "n", "previous")}
    bare["root"] = "0" * 64
    text = json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()
    sealed = record | bare | {"sha256": hashlib.sha256(text).hexdigest()}
    lines[-1] = json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode()
    signed_log.path.write_bytes(b"\n".join(lines) + b"\n")
    (found, _) = verify_audit(signed_log.path).problems  # and the signature is over another one
    assert "its Merkle root is not that of the lines before it" in found


def test_the_commands_hand_a_proof_from_one_to_the_other(signed_log, keys, tmp_path):
    proof = tmp_path / "proof.json"
    made = CliRunner().invoke(app, ["audit", str(signed_log.path), "--prove", "3"])
    proof.write_text(made.stdout)
    right = keys[4].fingerprint
    shown = CliRunner().invoke(app, ["verify", str(proof), "--key", right])
    assert shown.exit_code == 0
    assert "line 3 (round) is in the log" in shown.output
    assert f"intact, signed by {right}" in shown.output
    assert CliRunner().invoke(app, ["verify", str(proof)]).exit_code == 0
    refused = CliRunner().invoke(app, ["verify", str(proof), "--key", keys[0].fingerprint])
    assert refused.exit_code == 84
