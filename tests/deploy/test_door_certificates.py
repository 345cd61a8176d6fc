"""Whose certificate the door believes, and how little it does for those without one."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl

import httpx2
import pytest
from cryptography import x509
from door_requests import CLOSED, STORE, ask, reached

from photon.deploy.certificates import keep_member_authority, member_certificate
from photon.membership.keys import NodeKey

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("verb", "target"),
    [
        *((verb, target) for verb, target in CLOSED if verb != "CONNECT"),
        *(("POST", f"/photon/v2/{name}") for name in ("presence", "grants", "task", "reply")),
        *(("POST", f"/photon/v2/{name}") for name in ("check", "anything")),
        *((verb, STORE) for verb in ("GET", "HEAD", "PUT")),
        ("GET", "/door/member"),
    ],
)
def test_without_a_certificate_nothing_but_joining_and_health_is_answered(
    running_door, verb, target
) -> None:
    behind = running_door.desk
    before, admissions = reached(running_door), len(behind.admissions)
    assert ask(running_door, verb, target, member=False) in (400, 401, 404)
    assert (reached(running_door), len(behind.admissions)) == (before, admissions)
    assert ask(running_door, "POST", "/photon/v2/join", member=False) == 200
    assert ask(running_door, "GET", "/photon/v2/health", member=False) == 200


def test_who_has_no_certificate_is_told_in_words(running_door, running_store) -> None:
    """Also with leave for the store that somebody passed on."""
    data = b"x" * 1000
    signer = running_store.store.presigner(running_door.url, "strangers")
    put = signer.grant("PUT", "one", 60, 1000, hashlib.sha256(data).hexdigest())
    trust = ssl.create_default_context(cafile=str(running_door.files.ca))
    with httpx2.Client(verify=trust, trust_env=False) as stranger:
        for answer in (
            stranger.post(f"{running_door.url}/photon/v2/presence", content=b"{}"),
            stranger.put(put.url, content=data, headers=dict(put.headers)),
        ):
            assert answer.status_code == 401
            error = answer.json()["error"]
            assert (error["code"], "no certificate" in error["message"]) == (92, True)
            assert "ends TLS in between" in error["hint"]
    assert list(running_store.store.open("strangers").keys()) == []


@pytest.mark.parametrize("path", ["/photon/v2/reply", STORE])
@pytest.mark.parametrize("expelled", [False, True])
def test_a_body_is_not_read_before_it_is_known_who_sends_it(running_door, path, expelled) -> None:
    behind, before = running_door.desk, reached(running_door)
    trust = ssl.create_default_context(cafile=str(running_door.files.ca))
    verb = "PUT" if path == STORE else "POST"
    length = 1 << 20 if path != STORE else 1 << 30
    head = f"{verb} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
    behind.admits = 403
    try:
        with (
            socket.create_connection(("127.0.0.1", running_door.settings.port), 10) as plain,
            (running_door.trust() if expelled else trust).wrap_socket(
                plain, server_hostname="127.0.0.1"
            ) as tls,
        ):
            tls.sendall(head.encode())
            # Answered while nothing of the body was sent.
            assert tls.recv(100).startswith(b"HTTP/1.1 403" if expelled else b"HTTP/1.1 401")
            sent = 0
            with contextlib.suppress(OSError):  # broken pipe, reset, or the line is full
                tls.settimeout(3.0)
                while sent < 64 << 20:
                    sent += tls.send(b"x" * 65536)
            assert sent < 16 << 20, "buffers of the two sockets at most"
    finally:
        behind.admits = 200
    assert reached(running_door) == before


def test_only_certificates_for_members_of_this_aggregator_are_believed(
    running_door, short_folder
) -> None:
    other = keep_member_authority(short_folder("other"))
    assert ask(running_door, "POST", "/photon/v2/presence") == 200
    for trust in (
        running_door.trust(other),
        running_door.trust(running_door.files.ca.parent),  # the door's own authority
        running_door.trust(days=-0.01),  # expired 14 minutes ago
    ):
        with (
            httpx2.Client(verify=trust, trust_env=False) as stranger,
            pytest.raises(httpx2.TransportError),
        ):
            stranger.post(f"{running_door.url}/photon/v2/presence", content=b"{}")
    # Nor does a member believe a certificate of that authority.
    found = member_certificate(
        running_door.settings.members_ca.parent, *_public(short_folder("k")), 1.0
    )
    leaf = x509.load_pem_x509_certificate(found[0].encode())
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer = x509.load_pem_x509_certificate(running_door.files.ca.read_bytes())
    assert leaf.issuer != issuer.subject


def _public(folder) -> tuple[str, str]:
    key = NodeKey.create(folder / "node.key")
    return key.public_pem, key.fingerprint


def test_the_desk_learns_whose_certificate_came_and_no_caller_says_so(
    running_door, running_store
) -> None:
    behind = running_door.desk
    lie = {"photon-certificate": f"CN={'0' * 64}"}
    with httpx2.Client(verify=running_door.trust(), trust_env=False) as member:
        member.post(f"{running_door.url}/photon/v2/join", content=b"{}", headers=lie)
        assert "photon-certificate" not in behind.asked[-1]["headers"]
        member.post(f"{running_door.url}/photon/v2/presence", content=b"{}", headers=lie)
        said = behind.asked[-1]["headers"]["photon-certificate"]
        assert re.fullmatch("CN=[0-9a-f]{64}", said)
        assert said not in lie.values()
        grant = running_store.store.presigner(running_door.url, "s").grant("GET", "hush", 60)
        member.get(grant.url, headers=lie)
        asked = behind.admissions[-1]
        assert asked["photon-certificate"] == said
        # Leave is a secret, and none of the desk's business.
        assert "hush" not in str(asked)
        assert "Signature" not in str(asked)
