"""A store as a node sees it: no credentials, leave asked for each object, plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import ssl
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2

from photon.errors import AccessRefusedError, LinkError, StoreUnavailableError
from photon.store.contract import Buffer, Pace, Store, missing, require_key, require_size, unpaced
from photon.store.dialling import Allowed, distrust, http_client, is_loopback, proxy_to
from photon.store.presign import Grant, Verb

#: Asked for leave: verb, key, and for PUT the bytes and sha256 of what will be written.
Grants = Callable[[Verb, str, int | None, str | None], Grant]

#: Written at a time, and told to `pace`. Small enough to keep a cap of 100 KB/s smooth.
PIECE_BYTES = 128 << 10

#: Of an answer that is an error: enough for its code.
_ERROR_BYTES = 4096

_SHA256 = re.compile("[0-9a-f]{64}")

#: 409: another writer of the same object is at it; the next attempt finds it there.
_LATER = {408, 409, 425, 429, 500, 502, 503, 504}

#: S3's words for bytes that changed on their way, and for a body that did not arrive in full.
_LATER_CODES = {"BadDigest", "XAmzContentChecksumMismatch", "IncompleteBody", "RequestTimeout"}


class GrantedStore(Store):
    """Objects by grants: presigned URLs that the aggregator hands out one by one.

    A grant is held against what this side knows: the verb, where the store is, the length and
    sha256 of what is written. It brings no header but those that a store's signature needs, and
    redirects are not followed. Plain http is for this machine only. Where the environment names a
    proxy, it is used (photon.store.dialling).

    Args:
        grants: asks for leave; called from several threads. What it raises is passed on, so that
            a transfer tries again after StoreUnavailableError.
        origin: scheme, host and port that grants name ("https://door.example:443"): an update
            goes where it was agreed.
        allowed: photon.store.dialling.Allowed: where the store may lie inside this site's network.
        name: for messages.
        silence_s: the longest wait for a connection, for a write to go on, for a byte to read.
            Shorter than a transfer's own, so that a dead connection is given up and tried again.
        trust: certificate authorities, and what this side shows; asked for each connection, once
            there is leave. The system's if None.

    Raises:
        AccessRefusedError: an origin that no store may have.
        UnreachableError: the environment names a proxy that can't be used.
    """

    def __init__(
        self,
        grants: Grants,
        origin: str,
        *,
        allowed: Iterable[str] = (),
        name: str = "the run's store",
        silence_s: float = 20.0,
        trust: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._grants = grants
        self._name = name
        self._origin = require_origin(origin)
        self._watch = Allowed(allowed).watching(*self._origin[1:])
        self._silence_s = silence_s
        self._through = proxy_to(origin)
        self._trust = trust
        self._url = origin
        self._lock = threading.Lock()
        self._made: tuple[ssl.SSLContext | None, httpx2.Client] | None = None
        ends = contextlib.ExitStack()
        self._ends = ends.callback
        #: Closes connections; called by itself when nobody holds this store any more.
        self.close = weakref.finalize(self, ends.close)

    def _client(self) -> httpx2.Client:
        """For the trust of this moment: a certificate may have been renewed."""
        trust = self._trust() if self._trust is not None else None
        with self._lock:
            if self._made is None or self._made[0] is not trust:
                silence_s = self._silence_s
                client = http_client(
                    self._url,
                    trust,
                    httpx2.Timeout(silence_s, connect=min(10.0, silence_s), pool=None),
                    # As many connections as there are streams: the transfer bounds those.
                    limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
                )
                self._ends(client.close)
                self._made = trust, client
            return self._made[1]

    def put(self, key: str, data: Buffer, *, pace: Pace = unpaced) -> None:
        require_key(key)
        view = memoryview(data).cast("B")
        # A chunk is called by its hash, which the store checks against the bytes that arrive.
        name = key.rpartition("/")[2]
        sha256 = name if _SHA256.fullmatch(name) else hashlib.sha256(view).hexdigest()

        def body() -> Iterator[bytes]:
            for start in range(0, len(view), PIECE_BYTES):
                piece = bytes(view[start : start + PIECE_BYTES])
                yield piece
                pace(len(piece))

        with self._asked("PUT", key, len(view), sha256, body) as answer:
            # 412: an object of this key is there, and stays.
            if answer.status_code not in (200, 201, 204, 412):
                raise self._refusal(answer, "PUT", key)

    def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> bytes:
        require_key(key)
        pieces, done = [], 0
        with self._asked("GET", key) as answer:
            if answer.status_code == 404:
                raise missing(self, key)
            if answer.status_code != 200:
                raise self._refusal(answer, "GET", key)
            promised = self._length(answer, key)
            require_size(self, key, promised, max_bytes)
            for piece in answer.iter_raw():
                done += len(piece)
                # h11 never hands over more than the length it was promised.
                pieces.append(piece)
                pace(len(piece))
        if done != promised:
            raise StoreUnavailableError(
                f"{key} in {self} broke off after {done} of {promised} bytes"
            )
        return b"".join(pieces)

    def size(self, key: str) -> int | None:
        require_key(key)
        with self._asked("HEAD", key) as answer:
            if answer.status_code == 404:
                return None
            if answer.status_code != 200:
                raise self._refusal(answer, "HEAD", key)
            return self._length(answer, key)

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        raise LinkError(f"{self} can't be listed from here: leave is given for single objects")

    def delete(self, keys: Iterable[str]) -> None:
        raise LinkError(f"nothing in {self} can be deleted from here: the aggregator does that")

    def __str__(self) -> str:
        return self._name

    @contextmanager
    def _asked(
        self,
        verb: Verb,
        key: str,
        bytes: int | None = None,
        sha256: str | None = None,
        body: Callable[[], Iterator[bytes]] | None = None,
    ) -> Iterator[httpx2.Response]:
        """The answer to one request, with a fresh grant if the first is refused (it may be old)."""
        for last in (False, True):
            grant = self._grants(verb, key, bytes, sha256)
            self._check(grant, verb, key)
            _check_headers(grant, key, bytes, sha256)
            client = self._client()
            with self._speaking(verb, key):
                request = client.build_request(
                    verb,
                    grant.url,
                    headers=grant.headers,
                    content=body() if body else None,
                    # A connection to a proxy is none to the store.
                    extensions={} if self._through else {"trace": self._watch},
                )
                answer = client.send(request, stream=True)
                try:
                    if answer.status_code != 403 or last:
                        yield answer
                        _read_rest(answer)
                        return
                    _read_rest(answer)
                finally:
                    answer.close()

    def _check(self, grant: Grant, verb: Verb, key: str) -> None:
        """Refuse a grant for another verb, or one that names another host."""
        if grant.verb != verb:
            raise LinkError(f"asked for leave to {verb} {key}, was given leave to {grant.verb}")
        origin = _origin(grant.url)
        if origin != self._origin:
            raise AccessRefusedError(
                f"leave to {verb} {key} names {_shown(origin)}, this node only speaks to "
                f"{_shown(self._origin)}"
            )

    @contextmanager
    def _speaking(self, verb: Verb, key: str) -> Iterator[None]:
        """Turn httpx's errors into ours."""
        try:
            yield
        except httpx2.TimeoutException as error:
            raise StoreUnavailableError(
                f"{self} was silent for {self._silence_s:g} s, {verb} {key}"
            ) from error
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
            raise AccessRefusedError(f"leave to {verb} {key} in {self} can't be used") from error
        except httpx2.RequestError as error:
            if distrust(error) is not None:
                raise AccessRefusedError(
                    f"the certificate of {self} can't be trusted, {verb} {key}: {error}",
                    hint="Name the certificate authority that the aggregator gave you. If it is "
                    "the right one, somebody else answers in the store's place.",
                ) from error
            by = f" through the proxy {self._through}" if self._through else ""
            raise StoreUnavailableError(
                f"the connection to {self}{by} failed, {verb} {key}: {error}"
            ) from error

    def _length(self, answer: httpx2.Response, key: str) -> int:
        text = answer.headers.get("content-length", "")
        if not text.isascii() or not text.isdecimal():
            raise StoreUnavailableError(f"{self} does not say how long {key} is")
        return int(text)

    def _refusal(self, answer: httpx2.Response, verb: Verb, key: str) -> LinkError:
        """The error for a status that is not success."""
        status = answer.status_code
        code = _error_code(answer)
        what = f"{self} answers {status}{f' {code}' if code else ''} to {verb} {key}"
        if status in _LATER or code in _LATER_CODES:
            return StoreUnavailableError(what)
        if answer.is_redirect:
            return AccessRefusedError(f"{what}; redirects are not followed")
        return AccessRefusedError(
            what, hint="Leave expired or is for something else. Is the clock of this machine right?"
        )


def _error_code(answer: httpx2.Response) -> str:
    """S3's word for what is wrong. Not its message, which may quote what was signed."""
    text = b""
    for piece in answer.iter_raw():
        text += piece
        if len(text) >= _ERROR_BYTES:
            break
    found = re.search(rb"<Code>([A-Za-z]{1,60})</Code>", text[:_ERROR_BYTES])
    return found[1].decode() if found else ""


def _read_rest(answer: httpx2.Response) -> None:
    """Read an answer to its end, if that is near: only then is its connection used again."""
    if not answer.is_stream_consumed:
        _error_code(answer)


def require_origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a store: https, or http on this machine.

    Raises:
        AccessRefusedError: something else.
    """
    found = _origin(url)
    if found[0] != "https" and not is_loopback(found[1]):
        raise AccessRefusedError(
            f"the store at {_shown(found)} is not encrypted",
            hint="A store needs https. serve.store and AWS_ENDPOINT_URL of the aggregator say "
            "where it is.",
        )
    return found


def _check_headers(grant: Grant, key: str, size: int | None, sha256: str | None) -> None:
    """Refuse headers that no store's signature needs, or that say something untrue."""
    known = {}
    if grant.verb == "PUT" and sha256 is not None:
        known = {
            "content-length": str(size),
            "if-none-match": "*",
            "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode(),
            "x-ms-blob-type": "BlockBlob",
        }
    if odd := [name[:100] for name, value in grant.headers.items() if known.get(name) != value]:
        raise AccessRefusedError(
            f"leave to {grant.verb} {key} brings headers that it must not: {', '.join(odd)}"
        )


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL; the rest may be secret."""
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        port = 0
    if not port or not parts.hostname or parts.username is not None:
        raise AccessRefusedError("the store's address is no http or https URL")
    return parts.scheme, parts.hostname, port


def _shown(origin: tuple[str, str, int]) -> str:
    scheme, host, port = origin
    return f"{scheme}://{host}:{port}"
