"""Grants: signed as the reference says, and the real store refuses what they don't allow."""

from __future__ import annotations

import hashlib
import http.server
import logging
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from photon.errors import AccessRefusedError, LinkError, StoreUnavailableError
from photon.link import Grant, GrantedStore, S3Presigner, open_store, presigner_for

DATA = b"what was promised"
SHA256 = hashlib.sha256(DATA).hexdigest()


def example(endpoint: str = "https://examplebucket.s3.amazonaws.com", **extra: Any) -> S3Presigner:
    return S3Presigner(
        endpoint,
        "examplebucket",
        region="us-east-1",
        access_key_id="AKIAIOSFODNN7EXAMPLE",
        secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        **extra,
    )


def test_the_reference_s_example() -> None:
    """AWS S3 API Reference, "Authenticating Requests: Using Query Parameters"."""
    at = datetime(2013, 5, 24, tzinfo=UTC)
    assert example().signed_query("GET", "/test.txt", {}, at, 86400) == (
        "X-Amz-Algorithm=AWS4-HMAC-SHA256"
        "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
        "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


def test_what_a_grant_says() -> None:
    grant = example("https://door.example:443/s3", prefix="runs").put("a/b=1", 17, SHA256, 60)
    url = httpx2.URL(grant.url)
    assert (url.host, url.path) == ("door.example", "/s3/examplebucket/runs/a/b=1")
    assert "b%3D1?" in grant.url
    signed = dict(url.params)["X-Amz-SignedHeaders"]
    assert signed == "content-length;host;if-none-match;x-amz-checksum-sha256"
    assert 58 <= grant.expires_at - time.time() <= 60
    assert "Signature" not in repr(grant)
    token = example(session_token="to/ken").get("a", 60)
    assert "X-Amz-Security-Token=to%2Fken" in token.url


@pytest.mark.parametrize("valid_s", [0, -1, 604801])
def test_valid_for_a_while_only(valid_s: int) -> None:
    with pytest.raises(LinkError, match="1 to 604800 seconds"):
        example().get("a", valid_s)


def test_what_can_not_be_signed() -> None:
    with pytest.raises(LinkError, match="not a sha256"):
        example().put("a", 1, "abc", 60)
    with pytest.raises(LinkError, match="can't name an object"):
        example().get("../a", 60)
    with pytest.raises(LinkError, match="length and sha256"):
        example().grant("PUT", "a", None, None, 60)
    with pytest.raises(LinkError, match="ftp://host") as caught:
        example("ftp://user:hush@host")
    assert "hush" not in str(caught.value)


def test_others_sign_the_host_only() -> None:
    store = open_store("az://box/folder", {"account_name": "us", "account_key": "aHVzaA=="})
    grant = presigner_for(store).put("a", 17, SHA256, 60)
    assert grant.headers["x-ms-blob-type"] == "BlockBlob"
    assert "folder/a?" in grant.url
    with pytest.raises(LinkError, match="another URL"):
        presigner_for(store, public_url="https://door.example")


# --- the real store ---


def ask(grant: Grant, data: bytes | None = None, **changed: Any) -> int:
    """The status of one request, made as the grant says but for what is changed."""
    answer = httpx2.request(
        changed.get("verb", grant.verb),
        changed.get("url", grant.url),
        headers={**grant.headers, **changed.get("headers", {})},
        content=data,
        trust_env=False,
        timeout=20,
    )
    return answer.status_code


def test_allowed(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    assert ask(sign.head("a", 60)) == 404
    assert ask(sign.put("a", len(DATA), SHA256, 60), DATA) == 200
    assert ask(sign.head("a", 60)) == 200
    assert ask(sign.get("a", 60)) == 200
    assert seaweed.store(prefix).get("a", max_bytes=100) == DATA


def test_overwriting(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    ask(sign.put("a", len(DATA), SHA256, 60), DATA)
    other = b"something else entirely"
    put = sign.put("a", len(other), hashlib.sha256(other).hexdigest(), 60)
    assert ask(put, other) == 412
    assert seaweed.store(prefix).get("a", max_bytes=100) == DATA
    # Leaving the condition out, as who wants to overwrite would.
    headers = {k: v for k, v in put.headers.items() if k != "if-none-match"}
    assert ask(Grant("PUT", put.url, headers, put.expires_at), other) == 403
    assert seaweed.store(prefix).get("a", max_bytes=100) == DATA


def test_other_content(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    put = sign.put("a", len(DATA), SHA256, 60)
    assert ask(put, DATA[:-1] + b"!") == 400
    longer = DATA + b"!"
    assert ask(put, longer, headers={"content-length": str(len(longer))}) == 403
    unchecked = {k: v for k, v in put.headers.items() if k != "x-amz-checksum-sha256"}
    assert ask(Grant("PUT", put.url, unchecked, put.expires_at), DATA) == 403
    assert seaweed.store(prefix).size("a") is None


def test_other_verb_or_key(seaweed: Any, prefix: str) -> None:
    store, sign = seaweed.store(prefix), seaweed.presigner(prefix)
    store.put("a", DATA)
    store.put("b", DATA)
    read = sign.get("a", 60)
    write = sign.put("c", len(DATA), SHA256, 60)
    assert ask(read, verb="DELETE") == 403
    assert ask(read, DATA, verb="PUT") == 403
    assert ask(read, url=read.url.replace("/a?", "/b?")) == 403
    assert ask(write, DATA, url=write.url.replace("/c?", "/d?")) == 403
    assert ask(read, url=read.url.partition("?")[0]) == 403
    assert ask(read, url=read.url + "&acl") == 403
    assert [key for key, _ in store.keys("")] == ["a", "b"]


def test_expired(seaweed: Any, prefix: str) -> None:
    store, sign = seaweed.store(prefix), seaweed.presigner(prefix)
    store.put("a", DATA)
    read, write = sign.get("a", 1), sign.put("b", len(DATA), SHA256, 1)
    time.sleep(2.2)
    assert ask(read) == 403
    assert ask(read, url=read.url.replace("Expires=1&", "Expires=100&")) == 403
    assert ask(write, DATA) == 403
    assert store.size("b") is None


# --- a node's side ---


def test_a_fresh_grant_when_the_first_is_refused(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    seaweed.store(prefix).put("a", DATA)
    good = sign.get("a", 60)
    bad = Grant("GET", good.url[:-4] + "0000", good.headers, good.expires_at)
    given = [bad, good]
    assert GrantedStore(lambda *_: given.pop(0)).get("a", max_bytes=100) == DATA
    assert not given
    given = [bad, bad, good]
    with pytest.raises(AccessRefusedError, match=r"403 [A-Za-z]+ to GET a") as caught:
        GrantedStore(lambda *_: given.pop(0), name="theirs").get("a", max_bytes=100)
    assert given == [good]
    assert "theirs" in str(caught.value)
    assert "Signature=" not in str(caught.value)
    assert sign._access_key_id not in str(caught.value)


def test_nothing_secret_is_logged(
    seaweed: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    sign = seaweed.presigner(prefix).grant
    store = GrantedStore(lambda verb, key, count, sha256: sign(verb, key, count, sha256, 60))
    with caplog.at_level(logging.DEBUG):
        store.put("a", DATA)
        assert store.get("a", max_bytes=100) == DATA
    assert f"/{prefix}/a" in caplog.text
    for secret in ("X-Amz-Credential", "Signature", seaweed.access_key_id):
        assert secret not in caplog.text


@contextmanager
def answering(
    status: int, headers: dict[str, str], body: bytes = b"", tls: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything alike; its URL and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        scheme = "https" if tls is not None else "http"
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def at(url: str) -> Grant:
    return Grant("GET", url, {}, time.time() + 60)


@pytest.mark.parametrize(
    ("status", "headers", "kind", "message"),
    [
        (503, {}, StoreUnavailableError, "503"),
        (429, {}, StoreUnavailableError, "429"),
        (302, {"location": "http://127.0.0.1:1/a"}, AccessRefusedError, "redirects are not foll"),
        (418, {}, AccessRefusedError, "418"),
        (200, {}, StoreUnavailableError, "how long"),
        (200, {"content-length": "-5"}, StoreUnavailableError, "connection"),
        (200, {"content-length": "50"}, StoreUnavailableError, "connection"),
    ],
)
def test_answers_of_an_odd_server(
    status: int, headers: dict[str, str], kind: type[LinkError], message: str
) -> None:
    with answering(status, headers, b"short" if status == 200 else b"") as (url, asked):
        store = GrantedStore(lambda *_: at(f"{url}/a?hush"), silence_s=5)
        with pytest.raises(kind, match=message) as caught:
            store.get("a", max_bytes=100)
        assert asked == ["/a?hush"]
    assert "hush" not in str(caught.value)


def test_certificates(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with the openssl command, which is not here")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [
        *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=store"),
        *("-addext", "subjectAltName=IP:127.0.0.1"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(200, {"content-length": "2"}, b"ok", context) as (url, asked):
        trusting = GrantedStore(lambda *_: at(f"{url}/a?hush"), origin=url, ca_file=certificate)
        assert trusting.get("a", max_bytes=2) == b"ok"
        with pytest.raises(AccessRefusedError, match="certificate of theirs can't be") as caught:
            GrantedStore(lambda *_: at(f"{url}/a?hush"), name="theirs").get("a", max_bytes=2)
        assert asked == ["/a?hush"]
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "origin", "message"),
    [
        ("http://store.example/a", None, "not encrypted"),
        ("https://elsewhere.example/a", "https://store.example", "only speaks to https://store"),
        ("https://store.example:444/a", "https://store.example", "only speaks to"),
        ("http://store.example/a", "https://store.example", "only speaks to"),
        ("https://user:hush@store.example/a", None, "names no http"),
        ("file:///etc/passwd", None, "names no http"),
    ],
)
def test_grants_a_node_does_not_use(url: str, origin: str | None, message: str) -> None:
    store = GrantedStore(lambda *_: at(url), origin=origin)
    with pytest.raises(AccessRefusedError, match=message) as caught:
        store.get("a", max_bytes=1)
    assert "hush" not in str(caught.value)


def test_a_grant_for_something_else() -> None:
    with pytest.raises(LinkError, match="leave to HEAD a, was given leave to GET"):
        GrantedStore(lambda *_: at("https://store.example/a")).size("a")
