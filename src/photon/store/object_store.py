"""Objects in S3, Google's or Azure's store or one that speaks S3, for those with credentials."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store, from_url

from photon.errors import (
    AccessRefusedError,
    ChunkCorruptError,
    LinkError,
    ObjectMissingError,
    StoreUnavailableError,
)
from photon.store.contract import (
    Buffer,
    FolderStore,
    Pace,
    Store,
    missing,
    require_key,
    require_size,
    unpaced,
)
from photon.store.dialling import is_loopback
from photon.store.presign import Grant, Presigner, S3Presigner, Verb

#: Read at a time from a store, and told to `pace`.
PIECE_BYTES = 256 << 10

#: In one request to a store; S3 takes no more.
_DELETED_AT_ONCE = 1000

#: Statuses below 500 that go away by themselves.
_LATER = {408, 409, 425, 429}

_SCHEMES = ("s3", "gs", "az")

#: Two quick attempts for what a dropped connection explains. Longer patience is with
#: photon.store.transfer.Transfer, which has a deadline and says what it waits for.
_RETRIES: Any = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1)},
}


class ObjectStore(Store):
    """Objects by obstore.

    A put hands an object over as a whole, so `pace` learns of it when it is written; get is paced
    piece by piece.

    Args:
        store: obstore's; with its prefix, retries and timeouts.
    """

    def __init__(self, store: S3Store | GCSStore | AzureStore | MemoryStore) -> None:
        self.backend = store

    def put(self, key: str, data: Buffer, *, pace: Pace = unpaced) -> None:
        require_key(key)
        view = memoryview(data).cast("B")
        with self._speaking("writing", key):
            try:
                self.backend.put(key, view, mode="create", use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return
            except FileNotFoundError as error:
                raise AccessRefusedError(
                    f"{self} does not exist: writing {key}",
                    hint="Create the bucket (or container), or correct its name.",
                ) from error
        pace(len(view))

    def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> bytes:
        require_key(key)
        pieces, done = [], 0
        with self._speaking("reading", key):
            found = self.backend.get(key)
            promised = found.meta["size"]
            require_size(self, key, promised, max_bytes)
            for piece in found.stream(min_chunk_size=PIECE_BYTES):
                pieces.append(bytes(piece))
                done += len(pieces[-1])
                require_size(self, key, done, max_bytes)
                pace(len(pieces[-1]))
        if done != promised:
            raise ChunkCorruptError(f"{key} in {self} broke off after {done} of {promised} bytes")
        return b"".join(pieces)

    def size(self, key: str) -> int | None:
        require_key(key)
        try:
            with self._speaking("asking for", key):
                return self.backend.head(key)["size"]
        except ObjectMissingError:
            return None

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        if prefix:
            require_key(prefix)
        found = []
        with self._speaking("listing", prefix or "all objects"):
            for page in self.backend.list(prefix or None, chunk_size=1000):
                found += [(entry["path"], entry["size"]) for entry in page]
        # Stores that keep folders list "a/b" before "a.c"; as strings it is the other way round.
        return iter(sorted(found))

    def delete(self, keys: Iterable[str]) -> None:
        todo = [require_key(key) for key in keys]
        for start in range(0, len(todo), _DELETED_AT_ONCE):
            some = todo[start : start + _DELETED_AT_ONCE]
            with self._speaking("deleting", f"{some[0]} and {len(some) - 1} others"):
                self._delete(some)

    def _delete(self, keys: list[str]) -> None:
        try:
            self.backend.delete(keys)
        except FileNotFoundError:
            # Google and Azure mind what is not there, and then what became of the rest is not said.
            for key in keys:
                try:
                    self.backend.delete(key)
                except FileNotFoundError:
                    continue

    @contextmanager
    def _speaking(self, doing: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into ours."""
        try:
            yield
        except FileNotFoundError as error:
            raise missing(self, key) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise self._refused(doing, key, error) from None
        except (
            exceptions.NotSupportedError,
            NotImplementedError,
            exceptions.InvalidPathError,
        ) as error:
            raise AccessRefusedError(
                f"{self} can't do this, {doing} {key}: {_reason(error)}",
                hint="Photon needs a store with conditional writes (If-None-Match).",
            ) from error
        except (exceptions.BaseError, OSError) as error:
            if _is_final(error):
                raise self._refused(doing, key, error) from None
            raise StoreUnavailableError(
                f"{self} does not answer as it should, {doing} {key}: {_reason(error)}"
            ) from error

    def _refused(self, doing: str, key: str, error: BaseException) -> AccessRefusedError:
        # To be raised from None: obstore's own error quotes the store's answer, which may quote
        # what was signed and by whom.
        return AccessRefusedError(
            f"{self} refuses {doing} {key}: {_reason(error)}",
            hint="Check the bucket's name, the credentials and what they may do with it.",
        )

    def __str__(self) -> str:
        backend = self.backend
        if isinstance(backend, MemoryStore):
            return "memory (obstore)"
        if isinstance(backend, S3Store):
            place = f"s3://{backend.config.get('bucket')}"
        elif isinstance(backend, GCSStore):
            place = f"gs://{backend.config.get('bucket')}"
        else:
            place = f"az://{backend.config.get('container_name')}"
        return f"{place}/{backend.prefix}" if backend.prefix else place


class ObstorePresigner(Presigner):
    """Grants as obstore signs them, for Google's and Azure's stores and for S3 through a role.

    Weaker than S3Presigner's: only the host is signed, so that a grant to write lets its holder
    write anything, of any length, also over what is there, until it expires. Readers notice, as
    they compare sha256; keep such grants short.
    """

    def __init__(self, store: S3Store | GCSStore | AzureStore) -> None:
        self._store = store

    def _written(self, bytes: int, sha256: str) -> dict[str, str]:
        headers = {"content-length": str(bytes)}
        if isinstance(self._store, AzureStore):
            headers["x-ms-blob-type"] = "BlockBlob"
        if not isinstance(self._store, GCSStore):
            # Not signed, so a courtesy: an honest client doesn't overwrite.
            headers["if-none-match"] = "*"
        return headers

    def _sign(self, verb: Verb, key: str, headers: Mapping[str, str], valid_s: int) -> Grant:
        expires_at = int(time.time()) + valid_s
        url = obstore.sign(self._store, verb, require_key(key), timedelta(seconds=valid_s))
        return Grant(verb, url, headers, expires_at)


def open_store(
    url: str, options: Mapping[str, str] | None = None, *, silence_s: float = 60.0
) -> Store:
    """The store at a URL.

    Args:
        url: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or a
            path.
        options: obstore's configuration keys (endpoint, region, access_key_id, ...). What is not
            here is read from the environment (AWS_..., GOOGLE_..., AZURE_...).
        silence_s: how long one write may take, and a read go without a byte.

    Raises:
        LinkError: another scheme, or an option that is none.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return FolderStore(Path(url))
    if scheme == "file":
        return FolderStore(Path(unquote(urlsplit(url).path)))
    if scheme not in _SCHEMES or not urlsplit(url).netloc or "?" in rest or "@" in rest:
        raise LinkError(
            f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]} names no store",
            hint="Allowed: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, "
            "file:///folder and paths. Credentials belong in the environment.",
        )
    client: Any = {
        "connect_timeout": timedelta(seconds=min(10.0, silence_s)),
        "read_timeout": timedelta(seconds=silence_s),
        # Progress is what is watched (read_timeout above, and Transfer), not the whole request.
        "timeout": timedelta(hours=24),
        # Only who writes http:// for the endpoint gets it.
        "allow_http": _endpoint(options or {}).startswith("http://"),
    }
    host = urlsplit(_endpoint(options or {})).hostname
    if host is not None and is_loopback(host):
        # A proxy of our own choice takes the environment's place, and this host goes past it.
        client |= {"proxy_url": _endpoint(options or {}), "proxy_excludes": host}
    config: Any = dict(options or {})
    try:
        backend = from_url(url, config=config, client_options=client, retry_config=_RETRIES)
    except (exceptions.BaseError, ValueError, OSError) as error:
        # The message may hold a value, thus a secret: it stays in the chain for nobody.
        raise LinkError(
            f"can't open {url}: {_config_problem(error)}",
            hint="Options are those of obstore: endpoint, region, access_key_id, ...",
        ) from None
    if not isinstance(backend, S3Store | GCSStore | AzureStore):
        raise LinkError(f"{url} names no store that Photon knows")
    return ObjectStore(backend)


def presigner_for(store: Store) -> Presigner:
    """What makes grants for a store.

    For S3 with a key pair everything about a request is signed; otherwise (Google, Azure, S3
    through a role) obstore signs the host only: ObstorePresigner says what that means.

    Args:
        store: one that `open_store` made.

    Raises:
        LinkError: it is not a store that can sign.
    """
    backend = store.backend if isinstance(store, ObjectStore) else None
    if isinstance(backend, S3Store):
        config = backend.config
        bucket = config.get("bucket")
        region = _of(config, "region", "AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
        endpoint = _of(config, "endpoint", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        # Both from the same place: an id from here does not go with a secret from there.
        if config.get("access_key_id"):
            names = ("access_key_id", "secret_access_key", "session_token")
            access_key_id, secret, token = (config.get(name) for name in names)
        else:
            names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
            access_key_id, secret, token = (os.environ.get(name) for name in names)
        if bucket and access_key_id and secret:
            return S3Presigner(
                endpoint or f"https://s3.{region}.amazonaws.com",
                str(bucket),
                region=region,
                access_key_id=str(access_key_id),
                secret=str(secret),
                session_token=str(token) if token else None,
                prefix=backend.prefix or "",
            )
    if isinstance(backend, S3Store | GCSStore | AzureStore):
        return ObstorePresigner(backend)
    raise LinkError(
        f"can't sign grants for {store}",
        hint="Grants need an object store (s3, gs, az); with a front door, S3 and a key pair.",
    )


def _of(config: Mapping[str, Any], name: str, *variables: str) -> str | None:
    """An option of obstore's, from the store or from the environment, where obstore looks too."""
    if config.get(name):
        return str(config[name])
    return next((os.environ[one] for one in variables if os.environ.get(one)), None)


def _endpoint(options: Mapping[str, str]) -> str:
    """The endpoint obstore will use, as far as it matters whether it is http."""
    for name, value in options.items():
        if name.lower().removeprefix("aws_").removeprefix("azure_") in ("endpoint", "endpoint_url"):
            return str(value)
    return os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""


def _is_final(error: BaseException) -> bool:
    """Whether obstore's error quotes a status that another attempt would meet again."""
    status = re.search(r"status code: (4\d\d)", str(error))
    return status is not None and int(status[1]) not in _LATER


def _reason(error: BaseException) -> str:
    """What obstore says, without the body of an answer, queries, and the dump that follows."""
    text = str(error)
    first = re.sub(r"[:\s]*<.*|\?\S*", "", text.partition("\n")[0])[:300]
    code = re.search(r"<Code>([A-Za-z]{1,60})</Code>", text)
    return f"{first} ({code[1]})" if code else first


def _config_problem(error: BaseException) -> str:
    """The part of a complaint about options that names a key, never a value."""
    named = re.match(r"Configuration key: '[\w.-]+' is not valid", str(error))
    return named[0] if named else f"{type(error).__name__}, see its options"
