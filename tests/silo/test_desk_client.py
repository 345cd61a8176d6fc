"""A node's client, over real TLS, against a real desk, a real store, and others in its place."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import ipaddress
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from photon.deploy.certificates import keep_member_authority
from photon.deploy.desk import Desk, DeskLimits
from photon.errors import (
    AccessRefusedError,
    CertificateError,
    ClockSkewError,
    InvitationError,
    KeyInUseError,
    MembershipError,
    PhotonError,
    ProtocolError,
    SignatureError,
    StoreUnavailableError,
    UnknownMemberError,
    UnreachableError,
)
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask
from photon.membership.roster import Facts, Presence, Roster
from photon.silo.desk_client import DeskClient
from photon.silo.grant_book import GrantBook, Leave
from photon.store.granted_store import GrantedStore
from photon.store.presign import Grant, S3Presigner
from photon.store.transfer import Transfer, Wanted

RUN = "0" * 32
FACTS = Facts("a" * 64, "b" * 64, 1000, "0.1.0")


# --- certificates and a TLS door ---


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    file: Path

    @classmethod
    def made(cls, folder: Path, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        file = folder / f"{name}.crt"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(key, certificate, file)

    def server(
        self, host: str = "127.0.0.1", *, from_days: float = -1, to_days: float = 1
    ) -> ssl.SSLContext:
        """A server's side of TLS with a certificate for one host and time."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=from_days))
            .not_valid_after(now + timedelta(days=to_days))
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        pem += key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        file = self.file.with_name(f"server-{certificate.serial_number}.pem")
        file.write_bytes(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@contextmanager
def door(context: ssl.SSLContext | None, to_port: int) -> Iterator[str]:
    """TLS on a free port, forwarded to a port of this machine; yields host:port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    open_ = True
    threads: list[threading.Thread] = []

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(raw: socket.socket) -> None:
        raw.settimeout(20)
        try:
            with (
                context.wrap_socket(raw, server_side=True) if context else raw as line,
                socket.create_connection(("127.0.0.1", to_port), timeout=20) as inner,
            ):
                back = threading.Thread(target=copy, args=(inner, line))
                back.start()
                copy(line, inner)
                back.join()
        except OSError:
            raw.close()

    def accept() -> None:
        while open_:
            try:
                raw, _ = listener.accept()
            except OSError:
                continue
            threads.append(threading.Thread(target=serve, args=(raw,), daemon=True))
            threads[-1].start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        open_ = False
        thread.join()
        listener.close()


# --- a desk ---


class Aggregator:
    """A desk without a door; `client` is a member's, over plain HTTP on this machine."""

    def __init__(self, folder: Path, presigner: S3Presigner, **options: Any) -> None:
        self.folder = folder
        self.roster = Roster(folder / "members.sqlite")
        self.desk = Desk(self.roster, presigner, **options)
        self.desk.start()
        self.address = f"http://127.0.0.1:{self.desk.port}"
        self.clients: list[DeskClient] = []

    def client(self, key: NodeKey | None, *, timeout_s: float = 20) -> DeskClient:
        self.clients.append(DeskClient(self.address, None, key, timeout_s=timeout_s))
        return self.clients[-1]

    def member(self, name: str) -> DeskClient:
        key = NodeKey.create(self.folder / f"{name}.key")
        token = self.roster.invite(name, 60)
        client = self.client(key)
        client.join(token, name, key.public_pem, FACTS)
        return client

    def task(self, name: str, *, most_bytes: int = 1 << 30) -> OpenTask:
        now = time.time()
        own = f"{RUN}/silos/{name}/"
        task = OpenTask(
            *(f"{RUN}/fit/1/{name}", RUN, 1, name, "fit", now, now + 600, most_bytes),
            readable=(f"{RUN}/global/", own),
            writable=(f"{own}chunks/{{sha256}}", f"{own}a", f"{own}b"),
        )
        self.roster.tasks.open(task)
        return task

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.desk.stop()
        self.roster.close()


def fake_store() -> S3Presigner:
    return S3Presigner("https://s", "box", region="r", access_key_id="a", secret="b")


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path, fake_store())
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("ca"), "photon")


# --- joining, being here ---


def test_a_node_joins_and_says_that_it_is_here_over_tls(
    aggregator: Aggregator, authority: Authority, tmp_path: Path
) -> None:
    aggregator.desk.stop()
    aggregator.desk = Desk(
        aggregator.roster,
        fake_store(),
        audience=certificate_fingerprint(authority.file.read_text()),
        authority=keep_member_authority(tmp_path),
    )
    aggregator.desk.start()
    key = NodeKey.create(tmp_path / "node.key")
    token = aggregator.roster.invite("blue", 60)
    with door(authority.server(), aggregator.desk.port) as address:
        client = DeskClient(address, authority.file, key)
        try:
            assert client.health()["ok"] is True
            joined = client.join(token, "blue", key.public_pem, FACTS)
            assert (joined["name"], joined["fingerprint"]) == ("blue", key.fingerprint)
            # Again by the same node, whose answer was lost.
            assert client.join(token, "blue", key.public_pem, FACTS)["name"] == "blue"
            said = client.presence(Presence("training", RUN, 2, 5, 9, "task", "words", "boot-1"))
            assert said | {"ok": True, "draining": False} == said
        finally:
            client.close()
    presence, _ = aggregator.roster.presences()["blue"]
    assert presence == Presence("training", RUN, 2, 5, 9, "task", "words", "boot-1")


def test_words_that_a_desk_would_not_take_are_cut(aggregator: Aggregator) -> None:
    blue = aggregator.member("blue")
    blue.presence(Presence("refused", detail="\ud800\x1b" + "x" * 5000))
    presence, _ = aggregator.roster.presences()["blue"]
    assert presence.detail == "  " + "x" * 1998


def test_refusals_arrive_as_the_desk_raised_them(aggregator: Aggregator, tmp_path: Path) -> None:
    thief = NodeKey.create(tmp_path / "thief.key")
    blue = aggregator.member("blue")
    with pytest.raises(InvitationError, match="no such invitation") as caught:
        aggregator.client(thief).join("guess", "blue", thief.public_pem, FACTS)
    assert caught.value.hint
    with pytest.raises(UnknownMemberError, match="is no member's"):
        aggregator.client(thief).presence(Presence("idle"))
    for boot in ("a", "b", "a"):
        blue.presence(Presence("idle", boot=boot))
    with pytest.raises(KeyInUseError, match="another node runs with the key of blue"):
        blue.presence(Presence("idle", boot="b"))
    aggregator.roster.suspend("blue")
    with pytest.raises(UnknownMemberError, match="suspended"):
        blue.presence(Presence("idle"))


def test_a_wrong_clock(aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    blue = aggregator.member("blue")
    real = time.time
    signer = sys.modules["photon.silo.desk_client"].sign_request
    monkeypatch.setattr(
        "photon.silo.desk_client.sign_request",
        lambda *what, now, audience: signer(*what, now=real() - 7200, audience=audience),
    )
    with pytest.raises(ClockSkewError, match=r"was signed at .* this clock says"):
        blue.presence(Presence("idle"))


def test_the_key_that_joins_is_the_key_that_signs(aggregator: Aggregator, tmp_path: Path) -> None:
    key, other = (NodeKey.create(tmp_path / name) for name in ("one", "two"))
    for client in (aggregator.client(None), aggregator.client(other)):
        with pytest.raises(MembershipError, match="the key that it holds"):
            client.join("t", "blue", key.public_pem, FACTS)
    with pytest.raises(MembershipError, match="needs the node's key"):
        aggregator.client(None).presence(Presence("idle"))
    assert aggregator.client(None).health()["ok"] is True


# --- who answers instead ---


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


class _Says(http.server.BaseHTTPRequestHandler):
    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")
    asked: list[tuple[str, dict[str, str]]] = []  # noqa: RUF012 (replaced for each server)

    def _say(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.path, dict(self.headers)))
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    do_GET = do_POST = _say  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def saying(status: int, body: bytes | dict[str, Any], **headers: str) -> Iterator[tuple[str, Any]]:
    """A server that answers everything alike; its address, and what it was asked."""
    text = json.dumps(body).encode() if isinstance(body, dict) else body
    handler = type("Says", (_Says,), {"answer": (status, headers, text), "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def an_error(code: int, message: str = "words", hint: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "hint": hint}}


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


def test_each_request_is_signed_anew_and_nothing_else_is_sent(tmp_path: Path) -> None:
    key = NodeKey.create(tmp_path / "node.key")
    with saying(200, {"ok": True}) as (address, asked):
        client = DeskClient(address, None, key)
        client.presence(Presence("idle"))
        client.presence(Presence("idle"))
        client.close()
    (path, first), (_, second) = asked
    assert path == "/photon/v2/presence"
    names = {name.lower() for name in first}
    assert names == {
        *("host", "accept", "accept-encoding", "connection", "user-agent"),
        *("content-length", "content-type"),
        *("photon-key", "photon-time", "photon-nonce", "photon-signature"),
    }
    nonces = [{name.lower(): one[name] for name in one}["photon-nonce"] for one in (first, second)]
    assert nonces[0] != nonces[1]


# --- grants ---


def test_leave_for_a_task_s_objects(aggregator: Aggregator) -> None:
    blue = aggregator.member("blue")
    book = blue.grants(aggregator.task("blue").id)
    grant = book("PUT", f"{RUN}/silos/blue/a", 5, "c" * 64)
    assert grant.verb == "PUT"
    assert grant.url.startswith(f"https://s/box/{RUN}/silos/blue/a?")
    assert grant.headers["content-length"] == "5"
    assert 290 < grant.expires_at - time.time() <= 301
    with pytest.raises(AccessRefusedError, match="not part of task"):
        book("PUT", f"{RUN}/silos/red/a", 5, "c" * 64)
    with pytest.raises(AccessRefusedError, match="blue has no open task") as caught:
        blue.grants("another")("GET", f"{RUN}/global/a", None, None)
    assert isinstance(caught.value.__cause__, AccessRefusedError)
    aggregator.roster.expel("blue")
    with pytest.raises(AccessRefusedError, match="expelled"):
        book("GET", f"{RUN}/global/a", None, None)


def test_what_may_pass_and_what_will_not(tmp_path: Path) -> None:
    """A transfer tries again after StoreUnavailableError only."""
    key = NodeKey.create(tmp_path / "node.key")
    client = DeskClient("http://127.0.0.1:1", None, key)
    with pytest.raises(StoreUnavailableError, match="can't be reached") as caught:
        client.grants("t")("GET", "a", None, None)
    assert isinstance(caught.value.__cause__, UnreachableError)
    client.close()
    for status, body, kind in (
        (502, b"", StoreUnavailableError),
        (429, an_error(95), StoreUnavailableError),
        (401, an_error(93), AccessRefusedError),
        (404, b"", AccessRefusedError),
        (200, {"server_time": 1.0, "grants": [an_error(71)]}, StoreUnavailableError),
        (200, {"server_time": 1.0, "grants": [an_error(76)]}, AccessRefusedError),
        (200, {"grants": []}, AccessRefusedError),
    ):
        with saying(status, body) as (address, _):
            client = DeskClient(address, None, key)
            with pytest.raises(kind):
                client.grants("t")("GET", "a", None, None)
            client.close()


GOOD = {"verb": "GET", "key": "a", "url": "https://s/a?X-Amz-Signature=hush", "headers": {}}
GOOD |= {"expires_at": 2.0}


@pytest.mark.parametrize(
    "answer",
    [
        {"server_time": 1.0, "grants": []},
        {"server_time": 1.0, "grants": [GOOD, GOOD]},
        {"server_time": 1.0, "grants": [GOOD | {"verb": "PUT"}]},
        {"server_time": 1.0, "grants": [GOOD | {"key": "b"}]},
        {"server_time": 1.0, "grants": [GOOD | {"url": "x" * 9000}]},
        {"server_time": 1.0, "grants": [GOOD | {"headers": {"Host": "evil"}}]},
        {"server_time": 1.0, "grants": [GOOD | {"headers": {"a": "b\r\nc: d"}}]},
        {"server_time": 1.0, "grants": [{}]},
        {"server_time": "now", "grants": [GOOD]},
        {"server_time": 1.0, "grants": {}},
    ],
    ids=lambda answer: json.dumps(answer)[:60],
)
def test_grants_of_a_server_that_means_harm(tmp_path: Path, answer: dict[str, Any]) -> None:
    key = NodeKey.create(tmp_path / "node.key")
    with saying(200, answer) as (address, _):
        client = DeskClient(address, None, key)
        with pytest.raises(AccessRefusedError, match=r"desk of") as caught:
            client.grants("t")("GET", "a", None, None)
        client.close()
    assert "hush" not in str(caught.value) + repr(caught.value.__cause__)


class SlowDesk:
    """Stands in for DeskClient where the order of events matters: how requests are put together."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, str]]] = []
        self.good_s = 600.0
        self.answering = threading.Event()
        self.answering.set()
        self.fail: BaseException | None = None

    def ask_grants(self, task_id: str, wants: list[dict[str, Any]]) -> list[Leave | PhotonError]:
        self.batches.append([(want["verb"], want["key"]) for want in wants])
        assert self.answering.wait(20)
        if self.fail is not None:
            raise self.fail
        found: list[Leave | PhotonError] = []
        for want in wants:
            if want["key"].startswith("no"):
                found.append(AccessRefusedError("no"))
            else:
                grant = Grant(want["verb"], "https://s/" + want["key"], {}, 0.0)
                found.append(Leave(grant, time.monotonic() + self.good_s))
        return found


def in_threads(book: GrantBook, keys: list[str]) -> tuple[list[threading.Thread], dict[str, Any]]:
    found: dict[str, Any] = {}

    def ask(key: str) -> None:
        try:
            found[key] = book("GET", key, None, None).url
        except PhotonError as error:
            found[key] = error

    threads = [threading.Thread(target=ask, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    return threads, found


def test_threads_that_ask_at_once_share_a_request() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    desk.answering.clear()
    threads, found = in_threads(book, ["first"])
    give_up = time.monotonic() + 20
    while not desk.batches:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    keys = [f"k{n}" for n in range(300)] + ["no-1", "no-2"]
    more, found_more = in_threads(book, keys)
    while len(book._waiting) < len(keys):
        assert time.monotonic() < give_up
        time.sleep(0.001)
    desk.answering.set()
    for thread in threads + more:
        thread.join(20)
    assert found == {"first": "https://s/first"}
    assert {key: value for key, value in found_more.items() if not key.startswith("no")} == {
        key: f"https://s/{key}" for key in keys[:300]
    }
    # Each gets an error of its own: a shared one would mix up its tracebacks.
    errors = [found_more["no-1"], found_more["no-2"]]
    assert all(type(error) is AccessRefusedError for error in errors)
    assert errors[0] is not errors[1]
    assert [len(batch) for batch in desk.batches] == [1, 256, 46]


def test_one_request_that_fails_fails_all_who_wait_for_it() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    desk.fail = UnreachableError("away", hint="wait")
    threads, found = in_threads(book, ["a", "b", "c"])
    for thread in threads:
        thread.join(20)
    assert {type(error) for error in found.values()} == {StoreUnavailableError}
    desk.fail = RuntimeError("a fault")
    with pytest.raises(RuntimeError):
        book("GET", "a", None, None)
    # And the next one works again.
    desk.fail = None
    assert book("GET", "a", None, None).url == "https://s/a"


def test_what_is_expected_comes_along() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    keys = [f"c{n}" for n in range(100)]
    book.expect([*keys, "no"])
    assert book("GET", "other", None, None)
    assert [len(batch) for batch in desk.batches] == [1]
    for key in keys:
        assert book("GET", key, None, None).url == f"https://s/{key}"
    assert [len(batch) for batch in desk.batches] == [1, 65, 36]
    assert book.requests == 3
    # What came along is given once: who asks again needs a fresh one.
    assert book("GET", "c7", None, None)
    assert len(desk.batches) == 4
    # A refusal that came along is told to who asks.
    with pytest.raises(AccessRefusedError):
        book("GET", "no", None, None)


def test_leave_that_is_about_to_end_is_not_used() -> None:
    desk = SlowDesk()
    desk.good_s = 30.0
    book = GrantBook(desk, "t")
    book.expect(["a", "b"])
    book("GET", "a", None, None)
    assert desk.batches == [[("GET", "a"), ("GET", "b")]]
    book("GET", "b", None, None)
    assert len(desk.batches) == 2


def test_only_leave_to_read_comes_along() -> None:
    desk = SlowDesk()
    book = GrantBook(desk, "t")
    book.expect(["a", "b"])
    book("HEAD", "a", None, None)
    book("PUT", "b", 1, "d" * 64)
    assert desk.batches == [[("HEAD", "a")], [("PUT", "b")]]


# --- with a real store ---


@pytest.fixture(scope="module")
def seaweed() -> Iterator[Any]:
    """A running SeaweedFS (tests/link/seaweed.py)."""
    file = Path(__file__).parents[1] / "link" / "seaweed.py"
    spec = importlib.util.spec_from_file_location("seaweed_for_desk", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = Path(tempfile.mkdtemp(prefix="photon-seaweed-"))
    weed = module.Seaweed(folder)
    try:
        weed.start()
        yield weed
    finally:
        weed.kill()
        shutil.rmtree(folder, ignore_errors=True)


def chunk(folder: str, seed: int, size: int) -> tuple[str, bytes]:
    data = random.Random(seed).randbytes(size)
    return f"{folder}/chunks/{hashlib.sha256(data).hexdigest()}", data


@pytest.mark.slow
def test_an_update_through_a_desk_into_a_store_and_back(seaweed: Any, tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path, seaweed.presigner("runs"))
    try:
        blue = aggregator.member("blue")
        objects = [chunk(f"{RUN}/silos/blue", seed, 10_000) for seed in range(40)]
        task = aggregator.task("blue", most_bytes=40 * 10_000)
        book = blue.grants(task.id)
        sender = Transfer(GrantedStore(book, seaweed.endpoint, allowed=["127.0.0.1"]), streams=4)
        sent = sender.send(objects)
        assert (sent.objects, sent.bytes) == (40, 400_000)
        # Two questions an object, several to a request.
        assert book.requests < 80
        stored = dict(seaweed.store("runs").keys(f"{RUN}/silos/blue"))
        assert stored == {key: 10_000 for key, _ in objects}
        # Sent again by a node that was killed: all there, and nothing counts twice.
        again = Transfer(
            GrantedStore(blue.grants(task.id), seaweed.endpoint, allowed=["127.0.0.1"])
        ).send(objects)
        assert (again.objects, again.skipped_bytes) == (0, 400_000)
        # Read back, leave for all of it in one request.
        reader = blue.grants(task.id)
        reader.expect(key for key, _ in objects)
        wanted = [Wanted(key, len(data), hashlib.sha256(data).hexdigest()) for key, data in objects]
        carrier = Transfer(GrantedStore(reader, seaweed.endpoint, allowed=["127.0.0.1"]), streams=1)
        assert [bytes(data) for data in carrier.fetch(wanted)] == [data for _, data in objects]
        assert reader.requests == 1
    finally:
        aggregator.close()


@pytest.mark.slow
def test_the_store_holds_a_silo_to_its_grants(seaweed: Any, tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path, seaweed.presigner("held"))
    try:
        blue, red = aggregator.member("blue"), aggregator.member("red")
        aggregator.task("red")
        book = blue.grants(aggregator.task("blue", most_bytes=1000).id)
        key, data = chunk(f"{RUN}/silos/blue", 1, 100)
        grant = book("PUT", key, 100, hashlib.sha256(data).hexdigest())

        def ask(verb: str, url: str, **more: Any) -> int:
            return httpx2.request(verb, url, trust_env=False, timeout=20, **more).status_code

        def write(content: bytes, url: str = grant.url, **changed: str) -> int:
            return ask("PUT", url, content=content, headers={**grant.headers, **changed})

        assert write(data[:-1] + b"!") == 400
        assert write(data + b"!", **{"content-length": "101"}) == 403
        other = grant.url.replace("/silos/blue/", "/silos/red/")
        assert other != grant.url
        assert write(data, other) == 403
        assert ask("GET", grant.url) == 403
        assert ask("DELETE", grant.url) == 403
        assert ask("GET", grant.url.partition("?")[0]) == 403
        assert write(data) == 200
        # Written once: not over again, not even by itself.
        assert write(data) == 412
        # Who is not asked for it does not get to read it.
        with pytest.raises(AccessRefusedError, match="not part of task"):
            red.grants(f"{RUN}/fit/1/red")("GET", key, None, None)
        assert dict(seaweed.store("held").keys()) == {key: 100}
        # No more than the task may write.
        with pytest.raises(AccessRefusedError, match="1000 are allowed"):
            book("PUT", f"{RUN}/silos/blue/b", 901, "e" * 64)
    finally:
        aggregator.close()


@pytest.mark.slow
def test_a_desk_that_restarts_in_the_middle(seaweed: Any, tmp_path: Path) -> None:
    """Transfers wait for it, as they wait for a store."""
    aggregator = Aggregator(tmp_path, seaweed.presigner("restart"))
    blue = aggregator.member("blue")
    objects = [chunk(f"{RUN}/silos/blue", seed, 50_000) for seed in range(30)]
    task = aggregator.task("blue", most_bytes=30 * 50_000)
    port, fell = aggregator.desk.port, threading.Event()
    restarted: list[Desk] = []

    def some(objects: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        for number, one in enumerate(objects):
            if number == 10:
                aggregator.desk.stop()
                fell.set()
            yield one

    def restart() -> None:
        assert fell.wait(30)
        time.sleep(0.5)
        desk = Desk(aggregator.roster, seaweed.presigner("restart"))
        desk.start(port)
        restarted.append(desk)

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        store = GrantedStore(blue.grants(task.id), seaweed.endpoint, allowed=["127.0.0.1"])
        carrier = Transfer(store, streams=2)
        sent = carrier.send(some(objects))
        thread.join(30)
        assert sent.objects == 30
        assert sent.retries > 0
    finally:
        thread.join(30)
        for desk in restarted:
            desk.stop()
        aggregator.close()


# --- the machine's own ---


def test_answers_come_at_once(aggregator: Aggregator) -> None:
    """Without TCP_NODELAY on the desk's side, each would take 40 ms."""
    client = aggregator.client(None)
    client.health()
    took = []
    for _ in range(20):
        start = time.perf_counter()
        client.health()
        took.append(time.perf_counter() - start)
    assert min(took) < 0.03, took


def test_a_member_s_limit_is_no_obstacle_to_a_busy_node(aggregator: Aggregator) -> None:
    """Eight streams over a fast link ask some tens of times a second, in batches."""
    assert DeskLimits().requests_per_minute / 60 >= 50


def test_no_torch_in_a_client() -> None:
    program = "import sys, photon.silo.desk_client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


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
