"""Grants: signed as the reference says, and the real store refuses what they don't allow."""

from __future__ import annotations

import hashlib
import http.server
import logging
import os
import shutil
import socket
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

from photon.errors import AccessRefusedError, LinkError, StoreUnavailableError, UnreachableError
from photon.store.dialling import proxy_to
from photon.store.granted_store import GrantedStore
from photon.store.object_store import open_store, presigner_for
from photon.store.presign import Grant, S3Presigner

#: Where this site lets a store be, in these tests.
HERE = ["127.0.0.1"]
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
    grant = example("https://door.example:443/s3", prefix="runs").grant(
        "PUT", "a/b=1", 60, 17, SHA256
    )
    url = httpx2.URL(grant.url)
    assert (url.host, url.path) == ("door.example", "/s3/examplebucket/runs/a/b=1")
    assert "b%3D1?" in grant.url
    signed = dict(url.params)["X-Amz-SignedHeaders"]
    assert signed == "content-length;host;if-none-match;x-amz-checksum-sha256"
    assert 58 <= grant.expires_at - time.time() <= 60
    assert "Signature" not in repr(grant)
    token = example(session_token="to/ken").grant("GET", "a", 60)
    assert "X-Amz-Security-Token=to%2Fken" in token.url


@pytest.mark.parametrize("valid_s", [0, -1, 604801])
def test_valid_for_a_while_only(valid_s: int) -> None:
    with pytest.raises(LinkError, match="1 to 604800 seconds"):
        example().grant("GET", "a", valid_s)


def test_what_can_not_be_signed() -> None:
    with pytest.raises(LinkError, match="not a sha256"):
        example().grant("PUT", "a", 60, 1, "abc")
    with pytest.raises(LinkError, match="can't name an object"):
        example().grant("GET", "../a", 60)
    with pytest.raises(LinkError, match="length and sha256"):
        example().grant("PUT", "a", 60, None, None)
    with pytest.raises(LinkError, match="ftp://host") as caught:
        example("ftp://user:hush@host")
    assert "hush" not in str(caught.value)


def test_others_sign_the_host_only() -> None:
    store = open_store("az://box/folder", {"account_name": "us", "account_key": "aHVzaA=="})
    grant = presigner_for(store).grant("PUT", "a", 60, 17, SHA256)
    assert grant.headers["x-ms-blob-type"] == "BlockBlob"
    assert "folder/a?" in grant.url


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
    assert ask(sign.grant("HEAD", "a", 60)) == 404
    assert ask(sign.grant("PUT", "a", 60, len(DATA), SHA256), DATA) == 200
    assert ask(sign.grant("HEAD", "a", 60)) == 200
    assert ask(sign.grant("GET", "a", 60)) == 200
    assert seaweed.store(prefix).get("a", max_bytes=100) == DATA


def test_overwriting(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    ask(sign.grant("PUT", "a", 60, len(DATA), SHA256), DATA)
    other = b"something else entirely"
    put = sign.grant("PUT", "a", 60, len(other), hashlib.sha256(other).hexdigest())
    assert ask(put, other) == 412
    assert seaweed.store(prefix).get("a", max_bytes=100) == DATA
    # Leaving the condition out, as who wants to overwrite would.
    headers = {k: v for k, v in put.headers.items() if k != "if-none-match"}
    assert ask(Grant("PUT", put.url, headers, put.expires_at), other) == 403
    assert seaweed.store(prefix).get("a", max_bytes=100) == DATA


def test_other_content(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    put = sign.grant("PUT", "a", 60, len(DATA), SHA256)
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
    read = sign.grant("GET", "a", 60)
    write = sign.grant("PUT", "c", 60, len(DATA), SHA256)
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
    read, write = sign.grant("GET", "a", 1), sign.grant("PUT", "b", 1, len(DATA), SHA256)
    time.sleep(2.2)
    assert ask(read) == 403
    assert ask(read, url=read.url.replace("Expires=1&", "Expires=100&")) == 403
    assert ask(write, DATA) == 403
    assert store.size("b") is None


# --- a node's side ---


def test_a_fresh_grant_when_the_first_is_refused(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix)
    seaweed.store(prefix).put("a", DATA)
    good = sign.grant("GET", "a", 60)
    bad = Grant("GET", good.url[:-4] + "0000", good.headers, good.expires_at)
    given = [bad, good]
    assert (
        GrantedStore(lambda *_: given.pop(0), seaweed.endpoint, allowed=HERE).get(
            "a", max_bytes=100
        )
        == DATA
    )
    assert not given
    given = [bad, bad, good]
    with pytest.raises(AccessRefusedError, match=r"403 [A-Za-z]+ to GET a") as caught:
        GrantedStore(lambda *_: given.pop(0), seaweed.endpoint, allowed=HERE, name="theirs").get(
            "a", max_bytes=100
        )
    assert given == [good]
    assert "theirs" in str(caught.value)
    assert "Signature=" not in str(caught.value)
    assert sign._access_key_id not in str(caught.value)


def test_nothing_secret_is_logged(
    seaweed: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    sign = seaweed.presigner(prefix).grant
    store = GrantedStore(
        lambda verb, key, count, sha256: sign(verb, key, 60, count, sha256),
        seaweed.endpoint,
        allowed=HERE,
    )
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
        store = GrantedStore(lambda *_: at(f"{url}/a?hush"), url, allowed=HERE, silence_s=5)
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
    trusted = ssl.create_default_context(cafile=str(certificate))
    with answering(200, {"content-length": "2"}, b"ok", context) as (url, asked):
        trusting = GrantedStore(
            lambda *_: at(f"{url}/a?hush"), url, allowed=HERE, trust=lambda: trusted
        )
        assert trusting.get("a", max_bytes=2) == b"ok"
        with pytest.raises(AccessRefusedError, match="certificate of theirs can't be") as caught:
            GrantedStore(lambda *_: at(f"{url}/a?hush"), url, allowed=HERE, name="theirs").get(
                "a", max_bytes=2
            )
        assert asked == ["/a?hush"]
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "origin", "message"),
    [
        ("https://elsewhere.example/a", "https://store.example", "only speaks to https://store"),
        ("https://store.example:444/a", "https://store.example", "only speaks to"),
        ("http://store.example/a", "https://store.example", "only speaks to"),
        ("https://user:hush@store.example/a", "https://store.example", "no http or https URL"),
        ("file:///etc/passwd", "https://store.example", "no http or https URL"),
    ],
)
def test_grants_a_node_does_not_use(url: str, origin: str, message: str) -> None:
    store = GrantedStore(lambda *_: at(url), origin)
    with pytest.raises(AccessRefusedError, match=message) as caught:
        store.get("a", max_bytes=1)
    assert "hush" not in str(caught.value)


def test_no_store_is_written_to_in_the_clear() -> None:
    for allowed in ((), ("10.0.0.0/8", "store.example")):
        for origin in ("http://10.1.2.3:9000", "http://store.example"):
            with pytest.raises(AccessRefusedError, match="not encrypted") as caught:
                GrantedStore(lambda *_: pytest.fail("asked for leave"), origin, allowed=allowed)
            assert "https" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("https://127.0.0.1:1", "127.0.0.1"),
        ("http://127.0.0.1:1", "127.0.0.1"),
        ("https://localhost:1", "127.0.0.1"),
        ("https://10.1.2.3", "10.1.2.3"),
        ("https://169.254.169.254", "169.254.169.254"),
        ("https://[fd00::1]:9000", "fd00::1"),
        ("https://[::ffff:192.168.0.7]", "192.168.0.7"),
        ("https://[64:ff9b::a01:203]", "10.1.2.3"),
        ("https://[64:ff9b:1::a01:203]", "64:ff9b:1::a01:203"),
        ("https://[::a01:203]", "::a01:203"),
        ("https://[::ffff:0:a01:203]", "::ffff:0:a01:203"),
        ("https://[fec0::1]", "fec0::1"),
        ("https://[ff0e::1]", "ff0e::1"),
        ("https://100.64.0.1", "100.64.0.1"),
        ("https://0.0.0.0", "0.0.0.0"),
    ],
)
def test_an_aggregator_can_name_no_store_inside_a_site(origin: str, shown: str) -> None:
    store = GrantedStore(lambda verb, *_: Grant(verb, f"{origin}/a", {}, 0), origin)
    for ask in (lambda: store.get("a", max_bytes=1), lambda: store.put("a", b"x")):
        with pytest.raises(AccessRefusedError, match="inside this site's own network") as caught:
            ask()
        assert f'allow_private_addresses = ["{shown}"]' in str(caught.value.hint)


def test_a_site_says_which_private_store_it_means() -> None:
    with answering(200, {"content-length": "2"}, b"ok") as (url, _):
        for allowed in ("127.0.0.1", "127.0.0.0/8"):
            store = GrantedStore(lambda *_: at(f"{url}/a"), url, allowed=[allowed])
            assert store.get("a", max_bytes=2) == b"ok"
        named = url.replace("127.0.0.1", "localhost")
        store = GrantedStore(lambda *_: at(f"{named}/a"), named, allowed=["localhost"])
        assert store.get("a", max_bytes=2) == b"ok"


def test_a_name_is_held_to_the_address_that_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up once for the check and once for the connection, it may be two addresses."""
    with answering(200, {"content-length": "2"}, b"ok") as (url, asked):
        port = int(url.rpartition(":")[2])
        origin = f"https://store.example:{port}"
        real, given = socket.getaddrinfo, ["93.184.215.14", "127.0.0.1"]
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *rest, **more: real(given.pop(0), *rest, **more)
        )
        with pytest.raises(AccessRefusedError, match=r"store.example \(127.0.0.1\)"):
            GrantedStore(lambda *_: at(f"{origin}/a"), origin).get("a", max_bytes=2)
    assert not given
    assert not asked


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "anything.example"},
        {"x-aws-ec2-metadata-token-ttl-seconds": "60"},
        {"authorization": "Basic eDp5"},
        {"content-length": "3"},
        {"x-amz-checksum-sha256": "AAAA"},
    ],
)
def test_a_grant_brings_no_headers_of_its_own(headers: dict[str, str]) -> None:
    origin = "https://store.example"
    store = GrantedStore(lambda verb, *_: Grant(verb, f"{origin}/a", headers, 0), origin)
    for ask in (lambda: store.get("a", max_bytes=1), lambda: store.put("a", b"xy")):
        with pytest.raises(AccessRefusedError, match=next(iter(headers))):
            ask()


def test_this_machine_is_reached_past_every_proxy(
    seaweed: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    options = {
        "endpoint": seaweed.endpoint,
        "region": seaweed.region,
        "access_key_id": seaweed.access_key_id,
        "secret_access_key": seaweed.secret,
    }
    open_store(f"s3://{seaweed.bucket}/{prefix}", options).put("a", DATA)
    sign = seaweed.presigner(prefix)
    granted = GrantedStore(lambda *_: sign.grant("GET", "a", 60), seaweed.endpoint, allowed=HERE)
    assert granted.get("a", max_bytes=100) == DATA
    assert proxy_to("https://[::1]:8443") is None


@pytest.mark.parametrize(
    ("variables", "url", "found"),
    [
        ({"HTTPS_PROXY": "http://u:hush@p:3128"}, "https://a.example", "HTTPS_PROXY=http://p:3128"),
        ({"ALL_PROXY": "p:3128"}, "https://a.example", "ALL_PROXY=http://p:3128"),
        ({"HTTP_PROXY": "http://p:3128"}, "https://a.example", None),
        ({"ALL_PROXY": "http://p", "NO_PROXY": ".example"}, "https://a.example", None),
        ({"ALL_PROXY": "http://p", "NO_PROXY": "10.0.0.0/8"}, "https://10.2.3.4", None),
    ],
)
def test_proxies_of_the_environment(
    variables: dict[str, str], url: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    proxy = proxy_to(url)
    assert (None if proxy is None else str(proxy)) == found
    assert "hush" not in repr(proxy)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
def test_socks_is_refused_in_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "socks5h://u:hush@127.0.0.1:1080")
    with pytest.raises(
        UnreachableError, match=rf"{name.upper()}=socks5h://127.0.0.1:1080"
    ) as caught:
        GrantedStore(lambda *_: pytest.fail("asked for leave"), "https://store.example")
    assert "hush" not in str(caught.value)


def test_a_grant_for_something_else() -> None:
    with pytest.raises(LinkError, match="leave to HEAD a, was given leave to GET"):
        GrantedStore(lambda *_: at("https://store.example/a"), "https://store.example").size("a")
