"""A node's client and those in its desk's place: certificates, odd answers, nobody, a proxy."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from member_desk import Aggregator
from odd_server import an_error, saying
from tls_door import Authority, door

from photon.errors import (
    CertificateError,
    PhotonError,
    ProtocolError,
    SignatureError,
    UnknownMemberError,
    UnreachableError,
)
from photon.membership.keys import NodeKey
from photon.membership.roster import Presence
from photon.silo.desk_client import DeskClient


def refused_certificate(address: str, ca: Path | None, tmp_path: Path) -> CertificateError:
    key = NodeKey.create(tmp_path / f"{time.monotonic_ns()}.key")
    client = DeskClient(address, ca, key, timeout_s=10)
    try:
        with pytest.raises(CertificateError) as caught:
            client.presence(Presence("idle"))
    finally:
        client.close()
    assert caught.value.hint
    assert address in caught.value.message
    return caught.value


def test_certificates_that_prove_nothing(
    aggregator: Aggregator, authority: Authority, tmp_path: Path
) -> None:
    port = aggregator.desk.port
    stranger = Authority.made(tmp_path, "photon")  # of the same name
    asked_before = len(aggregator.roster.journal.events(1000))
    for context, words in (
        (stranger.server(), "not of the authority that the invitation names"),
        (authority.server(from_days=-3, to_days=-2), "expired"),
        (authority.server(from_days=2, to_days=3), "not valid yet"),
        (authority.server("elsewhere.example"), "another host's"),
    ):
        with door(context, port) as address:
            assert words in refused_certificate(address, authority.file, tmp_path).message
    # Without an authority of its own, a node trusts the system's: not ours.
    with door(authority.server(), port) as address:
        error = refused_certificate(address, None, tmp_path)
        assert "not of the authority" in error.message
    # Nothing was said to any of them.
    assert len(aggregator.roster.journal.events(1000)) == asked_before


def test_a_certificate_authority_that_is_none(tmp_path: Path) -> None:
    for name, text in (("missing.crt", None), ("empty.crt", ""), ("odd.crt", "not a certificate")):
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(CertificateError, match=name):
            DeskClient("127.0.0.1:1", file, None)


def test_nobody_there(authority: Authority, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{unused.getsockname()[1]}"
        client = DeskClient(closed, authority.file, None)
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:\d+ can't be reached") as caught:
            client.health()
        assert "firewall" in (caught.value.hint or "")
        client.close()
    client = DeskClient("no-such-host.invalid:8443", authority.file, None)
    with pytest.raises(UnreachableError, match=r"no-such-host\.invalid"):
        client.health()
    client.close()


def test_somebody_who_never_answers(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = DeskClient(
            f"127.0.0.1:{mute.getsockname()[1]}", authority.file, None, timeout_s=0.3
        )
        start = time.monotonic()
        with pytest.raises(UnreachableError, match="no answer within"):
            client.health()
        assert time.monotonic() - start < 10
        client.close()


def test_tls_to_what_speaks_none(aggregator: Aggregator, authority: Authority) -> None:
    client = DeskClient(f"127.0.0.1:{aggregator.desk.port}", authority.file, None)
    with pytest.raises(UnreachableError, match="can't be reached"):
        client.health()
    client.close()


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", "host:x", "host:99999", "host:1/path", "u:p@host:1", ":1"],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UnreachableError, match="is no address"):
        DeskClient(address, None, None)


def test_nothing_is_sent_in_the_clear() -> None:
    with pytest.raises(UnreachableError, match="not encrypted"):
        DeskClient("http://photon.example:80", None, None)


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (404, b"", ProtocolError, "is no desk of Photon's"),
        (200, b"<html>hello</html>", ProtocolError, "is no desk of Photon's"),
        (200, b"[1]", ProtocolError, "is no desk of Photon's"),
        (200, b"[" * 100_000, ProtocolError, "is no desk of Photon's"),
        (200, b" " * (5 << 20), ProtocolError, "more than 4194304 bytes"),
        (302, b"", ProtocolError, "status 302"),
        (502, b"", UnreachableError, "can't answer just now: its door answers 502"),
        (503, b"Service Unavailable", UnreachableError, "can't answer just now"),
        (503, an_error(51, "disk full"), UnreachableError, "can't answer just now: disk full"),
        (429, an_error(95, "too many"), UnreachableError, "too many"),
        (403, an_error(82), UnknownMemberError, "words"),
        (401, an_error(83), SignatureError, "words"),
        (400, an_error(250), PhotonError, "words"),
        (400, an_error(0), ProtocolError, "is no desk"),
        (400, {"error": {"code": "82", "message": 1}}, ProtocolError, "is no desk"),
        (200, an_error(82) | {"x": 1}, None, ""),
    ],
)
def test_answers_of_others(
    tmp_path: Path, status: int, body: Any, kind: type[PhotonError] | None, words: str
) -> None:
    key = NodeKey.create(tmp_path / "node.key")
    with saying(status, body, location="http://127.0.0.1:1/x") as (address, asked):
        client = DeskClient(address, None, key, timeout_s=10)
        try:
            if kind is None:
                client.presence(Presence("idle"))
            else:
                with pytest.raises(kind, match=words) as caught:
                    client.presence(Presence("idle"))
                assert type(caught.value) is kind
        finally:
            client.close()
        assert len(asked) == 1


def test_words_of_a_server_move_no_cursor(tmp_path: Path) -> None:
    key = NodeKey.create(tmp_path / "node.key")
    message, hint = "a\x1b[2Jb\n" + "x" * 5000, "\x1b]0;title\x07"
    with saying(403, an_error(82, message, hint)) as (address, _):
        client = DeskClient(address, None, key)
        with pytest.raises(UnknownMemberError) as caught:
            client.presence(Presence("idle"))
        client.close()
    assert caught.value.message.isprintable()
    assert (caught.value.hint or "").isprintable()
    assert len(caught.value.message) == 2000


# --- through a proxy ---


def test_a_proxy_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("ALL_PROXY", f"http://u:hush@127.0.0.1:{port}")

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(refusal)

        asked: list[bytes] = []
        proxy = threading.Thread(target=refuse)
        proxy.start()
        client = DeskClient("fed.example:8443", None, None)
        with pytest.raises(UnreachableError, match="407 Proxy Authentication") as refused:
            client.health()
        proxy.join()
        listener.close()
        assert asked[0].startswith(b"CONNECT fed.example:8443 ")
        with pytest.raises(UnreachableError, match="Connection refused") as dead:
            client.health()
        client.close()
    for error in (refused.value, dead.value):
        assert f"through the proxy ALL_PROXY=http://127.0.0.1:{port}" in error.message
        assert "serve" not in f"{error}"
        assert "hush" not in f"{error}"
