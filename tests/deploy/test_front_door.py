"""What the one public port lets through, and what it does not; a real Caddy and a real store."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import ssl
import time
from dataclasses import replace

import httpx2
import pytest
from door_requests import CLOSED, STORE, ask, raw, reached

from photon.config.serve import ServeConfig
from photon.deploy.front_door import (
    DoorSettings,
    answers_as,
    caddy_words,
    caddyfile,
    front_door,
    public_url,
)
from photon.deploy.ports import free_ports
from photon.errors import DeployError, IncompatibleConfigError, PortInUseError
from photon.membership.desk_documents import (
    MOST_GRANTS_BYTES,
    MOST_JOIN_BYTES,
    MOST_REPLY_BYTES,
    MOST_SMALL_BYTES,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def client(running_door):
    """A member's, as far as the door knows."""
    with httpx2.Client(verify=running_door.trust(), trust_env=False, timeout=20) as found:
        yield found


# --- what goes through ---


def test_an_answer_of_the_greatest_length_gets_through(running_door, client) -> None:
    body = secrets.token_bytes(MOST_REPLY_BYTES)
    answer = client.post(f"{running_door.url}/photon/v2/reply", content=body)
    assert answer.json() == {"path": "/photon/v2/reply", "bytes": len(body)}
    asked = running_door.desk.asked[-1]
    assert hashlib.sha256(asked["body"]).digest() == hashlib.sha256(body).digest()


def test_the_desk_learns_who_asks_and_can_not_be_lied_to_about_it(running_door, client) -> None:
    lie = {"x-forwarded-for": "8.8.8.8"}
    answer = client.post(f"{running_door.url}/photon/v2/join", content=b"{}", headers=lie)
    assert answer.json() == {"path": "/photon/v2/join", "bytes": 2}
    asked = running_door.desk.asked[-1]
    assert asked["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert client.get(f"{running_door.url}/photon/v2/health").status_code == 200
    assert "server" not in client.get(f"{running_door.url}/nothing").headers


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_presigned_requests_reach_the_store_under_every_name_of_the_door(
    running_door, running_store, client, name
) -> None:
    data = secrets.token_bytes(5_000_000)
    sha256 = hashlib.sha256(data).hexdigest()
    url = f"https://{name}:{running_door.settings.port}"
    signer = running_store.store.presigner(url, f"door-{name}")
    put = signer.grant("PUT", "chunk", 60, len(data), sha256)
    assert client.put(put.url, content=data, headers=dict(put.headers)).status_code == 200
    again = client.put(put.url, content=data, headers=dict(put.headers))
    assert again.status_code == 412, "write once"
    assert client.head(signer.grant("HEAD", "chunk", 60).url).headers["content-length"] == str(
        len(data)
    )
    got = client.get(signer.grant("GET", "chunk", 60).url)
    assert got.content == data
    part = client.get(signer.grant("GET", "chunk", 60).url, headers={"range": "bytes=10-19"})
    assert part.content == data[10:20]
    inside = running_store.store.open(f"door-{name}")
    assert dict(inside.keys()) == {"chunk": len(data)}


def test_what_is_signed_is_what_may_be_written(running_door, running_store, client) -> None:
    data = b"x" * 1000
    signer = running_store.store.presigner(running_door.url, "signed")
    put = signer.grant("PUT", "one", 60, 1000, hashlib.sha256(data).hexdigest())

    def status(content: bytes, **headers: str) -> int:
        given = {**put.headers, **headers}
        return client.put(put.url, content=content, headers=given).status_code

    assert status(b"y" * 1000) == 400
    assert status(b"x" * 1001, **{"content-length": "1001"}) == 403
    get = signer.grant("GET", "one", 60)
    assert client.get(get.url.replace("/one?", "/two?")).status_code == 403
    assert client.put(get.url, content=data).status_code == 403
    assert client.get(f"{running_door.url}/photon/signed/one").status_code == 404
    assert list(running_store.store.open("signed").keys()) == []
    assert status(data) == 200


# --- what does not ---


@pytest.mark.parametrize(("verb", "target"), CLOSED, ids=[f"{v} {t}" for v, t in CLOSED])
def test_everything_else_is_closed(running_door, verb, target) -> None:
    before = reached(running_door)
    assert ask(running_door, verb, target) in (400, 404, 405)
    assert reached(running_door) == before, "it reached somebody"


def test_credentials_and_copies_are_not_let_through_to_the_store(running_door) -> None:
    target = STORE
    assert ask(running_door, "GET", target) == 403, "the store's own no: it does get there"
    assert ask(running_door, "GET", target, "authorization: AWS4-HMAC-SHA256 x") == 404
    assert ask(running_door, "PUT", target, "x-amz-copy-source: /photon/other") == 404


def test_bodies_and_headers_are_bounded(running_door, client) -> None:
    before = reached(running_door)
    assert ask(running_door, "GET", "/photon/v2/health", "x: " + "y" * 40_000) == 431
    assert reached(running_door) == before
    for path, most in (
        ("/photon/v2/join", MOST_JOIN_BYTES),
        ("/photon/v2/presence", MOST_SMALL_BYTES),
        ("/photon/v2/grants", MOST_GRANTS_BYTES),
        ("/photon/v2/task", MOST_SMALL_BYTES),
        ("/photon/v2/reply", MOST_REPLY_BYTES),
    ):
        behind = running_door.desk
        assert client.post(running_door.url + path, content=b"x" * most).json()["bytes"] == most
        for length in (most + 1, 5 << 20):
            with contextlib.suppress(httpx2.WriteError):  # cut off while it is still writing
                # Closed: what is left of the body would be read as the next request's headers.
                url, close = running_door.url + path, {"connection": "close"}
                answer = client.post(url, content=b"x" * length, headers=close)
                assert answer.status_code in (413, 502), path
        assert all(len(one["body"]) <= most for one in behind.asked if one["path"] == path)


@pytest.mark.parametrize("path", ["/photon/v2/join", "/photon/v2/reply"])
def test_what_strangers_begin_costs_the_services_behind_nothing(running_door, client, path) -> None:
    behind = running_door.desk
    context = running_door.trust()  # also where they are no strangers
    if path.endswith("join"):
        context = ssl.create_default_context(cafile=str(running_door.files.ca))
    address = ("127.0.0.1", running_door.settings.port)
    begun = behind.begun
    with contextlib.ExitStack() as open_ones:
        for _ in range(12):
            plain = open_ones.enter_context(socket.create_connection(address, timeout=10))
            tls = open_ones.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 4000\r\n\r\n"
            tls.sendall(f"{head}x".encode())
        # Those were there before it.
        assert client.post(running_door.url + path, content=b"whole").status_code == 200
        assert behind.begun == begun + 1


def test_a_body_that_does_not_come_is_cut_off(running_door) -> None:
    """body_silence_s is 3 here; one that comes in drops, faster than that, is let through."""
    head = b"POST /photon/v2/join HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\n"
    head += b"connection: close\r\n\r\n"
    began = time.monotonic()
    raw(running_door, head + b"x", wait_s=60)
    assert 2 < time.monotonic() - began < 60
    context = ssl.create_default_context(cafile=str(running_door.files.ca))
    address = ("127.0.0.1", running_door.settings.port)
    with (
        socket.create_connection(address, timeout=10) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(head)
        for _ in range(17):
            time.sleep(0.25)
            tls.sendall(b"y")
        assert tls.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "noise",
    [b"\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", os.urandom(2000), b"\r\n" * 500],
    ids=["zeros", "no target", "version", "random", "newlines"],
)
def test_noise_is_answered_or_cut_and_the_door_stays_open(running_door, client, noise) -> None:
    with contextlib.suppress(OSError):
        raw(running_door, noise, wait_s=15)
    assert client.get(f"{running_door.url}/photon/v2/health").status_code == 200


def test_plain_http_and_old_tls_are_refused(running_door) -> None:
    with socket.create_connection(("127.0.0.1", running_door.settings.port)) as plain:
        plain.sendall(b"GET /photon/v2/health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" not in plain.recv(100)
    context = ssl.create_default_context(cafile=str(running_door.files.ca))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA")
    address = ("127.0.0.1", running_door.settings.port)
    with socket.create_connection(address) as connection, pytest.raises(ssl.SSLError):
        context.wrap_socket(connection, server_hostname="127.0.0.1")


# --- faults ---


def test_kill_9_of_the_door(running_door, client) -> None:
    watched = running_door.watched
    pid = watched.status("door").pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while watched.status("door").pid in (pid, None) or watched.status("door").state != "up":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert watched.deaths("door")[-1].exit_code == -signal.SIGKILL
    assert client.get(f"{running_door.url}/photon/v2/health").status_code == 200


def test_nothing_secret_is_in_its_log(running_door, running_store, client) -> None:
    """What fails is said, without paths, queries and headers."""
    watched = running_door.watched
    settings = replace(running_door.settings, port=free_ports(1)[0], store_port=free_ports(1)[0])
    watched.supervisor.start(
        replace(front_door(settings, watched.home / "door2"), name="lonely-door")
    )
    url = f"https://127.0.0.1:{settings.port}"
    grant = running_store.store.presigner(url, "s").grant("GET", "secret-key", 60)
    assert client.get(grant.url, headers={"x-token": "hush"}).status_code == 502, "it did fail"
    watched.supervisor._keeper("lonely-door").stop()
    said = (watched.home / "logs" / "lonely-door.log").read_text()
    assert "connection refused" in said
    for secret in ("Signature", "secret-key", "hush", running_store.store.access_key_id):
        assert secret not in said
    assert any("502" in line for line in watched.lines if "lonely-door | error" in line)


def test_a_taken_port_and_a_damaged_certificate_are_told_in_words(
    running_door, short_folder, watch
) -> None:
    watched = watch(short_folder("taken"))
    with watched.supervisor as supervisor, pytest.raises(PortInUseError, match="taken by caddy"):
        supervisor.start(front_door(running_door.settings, watched.home / "door"))
    empty = watched.home / "empty.crt"
    empty.write_text("no certificate")
    with pytest.raises(DeployError, match=r"the door can't be opened: .*PEM"):
        front_door(replace(running_door.settings, certificate=empty), watched.home / "door")


def test_readiness_is_that_of_this_very_door(running_door, short_folder) -> None:
    from photon.deploy.certificates import keep_certificate

    assert answers_as(running_door.settings)
    other = keep_certificate(short_folder("other"), "127.0.0.1")
    assert not answers_as(replace(running_door.settings, certificate=other.certificate))


# --- configuration ---


@pytest.mark.parametrize("name", ["{env.HOME}", 'a"b', "a\\b", "a`b", "a\nb"])
def test_paths_that_caddy_would_read_otherwise_are_refused(tmp_path, name) -> None:
    settings = DoorSettings("0.0.0.0", 8443, tmp_path / name, tmp_path / "k", tmp_path / "m", 2)
    with pytest.raises(IncompatibleConfigError, match="can't be written into Caddy"):
        caddyfile(settings, tmp_path)


def test_paths_with_spaces_will_do(running_door, short_folder) -> None:
    folder = short_folder("with space") / "and more"
    folder.mkdir()
    moved = folder / "server crt.pem"
    moved.write_bytes(running_door.files.certificate.read_bytes())
    service = front_door(replace(running_door.settings, certificate=moved), folder)
    assert str(moved) in (folder / "Caddyfile").read_text()
    assert service.ports == (("127.0.0.1", running_door.settings.port),)


def test_ipv6_and_no_store(tmp_path) -> None:
    settings = DoorSettings("::", 443, tmp_path / "c", tmp_path / "k", tmp_path / "m", 2)
    text = caddyfile(settings, tmp_path)
    assert "bind [::]" in text
    assert "X-Amz-Signature" not in text


def test_the_url_that_silos_use() -> None:
    serve = ServeConfig(listen="0.0.0.0:8443", host="fed.example.org", public_port=443)
    assert public_url(serve) == "https://fed.example.org:443"
    assert public_url(ServeConfig(host="2001:db8::7")) == "https://[2001:db8::7]:8443"
    assert public_url(ServeConfig()) == f"https://{socket.gethostname()}:8443"


def test_words() -> None:
    assert caddy_words('{"level":"info","msg":"serving"}') is None
    assert caddy_words('{"level":"error","msg":"dial","status":502}') == "error: dial: 502"
    assert caddy_words("plain") == "plain"
    assert caddy_words("[1]") is None
    assert caddy_words('{"level":"warn","msg":"admin endpoint disabled"}') is None
