"""What every store keeps to, whatever it is made of."""

from __future__ import annotations

import random
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from memory_store import MemoryStore
from obstore.store import MemoryStore as ObstoreMemory

from photon.errors import (
    AccessRefusedError,
    ChunkCorruptError,
    LinkError,
    ObjectMissingError,
    StoreUnavailableError,
)
from photon.store.contract import FolderStore, Store
from photon.store.granted_store import GrantedStore
from photon.store.object_store import ObjectStore, open_store, presigner_for

LISTED = ["memory", "folder", "obstore memory", "seaweed"]
ALL = [*LISTED, "granted"]


def make_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Store:
    if kind == "memory":
        return MemoryStore()
    if kind == "folder":
        return FolderStore(tmp_path / "objects")
    if kind == "obstore memory":
        return ObjectStore(ObstoreMemory())
    weed = request.getfixturevalue("seaweed")
    if kind == "seaweed":
        return weed.store(prefix)
    sign = weed.presigner(prefix).grant
    return GrantedStore(
        lambda verb, key, count, sha256: sign(verb, key, 60, count, sha256),
        weed.endpoint,
        allowed=["127.0.0.1"],
    )


@pytest.fixture(params=ALL)
def store(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Store:
    return make_store(request.param, request, tmp_path, prefix)


@pytest.fixture(params=LISTED)
def listed(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Store:
    return make_store(request.param, request, tmp_path, prefix)


def test_written_and_read(store: Store) -> None:
    store.put("run/chunks/ab", b"hello")
    store.put("run/update=1/round-000001/a_b.json", memoryview(bytearray(b"{}")))
    assert store.get("run/chunks/ab", max_bytes=5) == b"hello"
    assert store.get("run/update=1/round-000001/a_b.json", max_bytes=100) == b"{}"
    assert store.size("run/chunks/ab") == 5


def test_written_once(store: Store) -> None:
    store.put("a", b"first")
    store.put("a", b"second")
    store.put("a", b"")
    assert store.get("a", max_bytes=100) == b"first"


def test_empty(store: Store) -> None:
    store.put("a", b"")
    assert store.size("a") == 0
    assert store.get("a", max_bytes=0) == b""


def test_large(store: Store) -> None:
    data = random.Random(0).randbytes(20 << 20)
    told: list[int] = []
    store.put("a/large", data, pace=told.append)
    assert sum(told) == len(data)
    told.clear()
    assert store.get("a/large", max_bytes=len(data), pace=told.append) == data
    assert sum(told) == len(data)


def test_missing(store: Store) -> None:
    assert store.size("run/nothing") is None
    with pytest.raises(ObjectMissingError, match="run/nothing"):
        store.get("run/nothing", max_bytes=10)


def test_never_more_than_asked_for(store: Store) -> None:
    store.put("a", bytes(1_000_000))
    told: list[int] = []
    with pytest.raises(ChunkCorruptError, match=r"a in .* has 1000000 bytes, at most 999999"):
        store.get("a", max_bytes=999_999, pace=told.append)
    assert not told


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a/.b", "a b", "a?b", "é", "a" * 513]
)
def test_odd_keys(store: Store, key: str) -> None:
    for ask in (
        lambda: store.put(key, b""),
        lambda: store.get(key, max_bytes=1),
        lambda: store.size(key),
        lambda: store.delete([key]),
    ):
        with pytest.raises(LinkError):
            ask()


def test_many_writers_of_one_object(store: Store) -> None:
    objects = [bytes([number]) * 300_000 for number in range(8)]
    together = threading.Barrier(len(objects))

    def write(data: bytes) -> None:
        together.wait(timeout=30)
        # Told that another writer is at it, one comes back: Transfer does so.
        for _ in range(20):
            try:
                return store.put("same", data)
            except StoreUnavailableError:
                continue
        raise AssertionError("20 attempts")

    with ThreadPoolExecutor(len(objects)) as pool:
        list(pool.map(write, objects))
    assert store.get("same", max_bytes=300_000) in objects


def test_whole_or_absent_for_a_reader(store: Store) -> None:
    data = random.Random(1).randbytes(4 << 20)
    seen: list[bytes | None] = []

    def read() -> None:
        while not seen or seen[-1] is None:
            try:
                seen.append(store.get("a", max_bytes=len(data)))
            except ObjectMissingError:
                seen.append(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    store.put("a", data)
    reader.join(timeout=30)
    assert seen[-1] == data


def test_listing(listed: Store) -> None:
    names = ["run/chunks/b", "run/chunks/a", "run/chunks.c", "run/x/y/z", "run2/a", "top"]
    for number, name in enumerate(names):
        listed.put(name, bytes(number))
    sizes = {name: number for number, name in enumerate(names)}
    assert list(listed.keys()) == sorted(sizes.items())
    assert list(listed.keys("run/chunks")) == [("run/chunks/a", 1), ("run/chunks/b", 0)]
    assert [name for name, _ in listed.keys("run")] == sorted(n for n in names if n[:4] == "run/")
    assert list(listed.keys("none")) == []


@pytest.mark.parametrize("listed", ["obstore memory", "seaweed"], indirect=True)
def test_pages(listed: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: listed.put(f"p/{number:04d}", b"x"), range(1100)))
    assert [name for name, _ in listed.keys("p")] == [f"p/{number:04d}" for number in range(1100)]
    listed.delete(f"p/{number:04d}" for number in range(1100))
    assert list(listed.keys("p")) == []


def test_deletion(listed: Store) -> None:
    for name in ("a/1", "a/2", "b"):
        listed.put(name, b"x")
    listed.delete(["a/1", "nothing", "b"])
    listed.delete([])
    assert list(listed.keys()) == [("a/2", 1)]
    listed.put("b", b"again")
    assert listed.get("b", max_bytes=5) == b"again"


def test_a_node_can_neither_list_nor_delete() -> None:
    store = GrantedStore(lambda *_: pytest.fail("asked for leave"), "https://store.example")
    with pytest.raises(LinkError, match="can't be listed"):
        store.keys()
    with pytest.raises(LinkError, match="can be deleted"):
        store.delete(["a"])


def test_open_store(seaweed: Any, prefix: str, tmp_path: Path) -> None:
    options = {
        "endpoint": seaweed.endpoint,
        "region": seaweed.region,
        "access_key_id": seaweed.access_key_id,
        "secret_access_key": seaweed.secret,
    }
    store = open_store(f"s3://{seaweed.bucket}/{prefix}", options)
    store.put("a", b"x")
    assert seaweed.store(prefix).get("a", max_bytes=1) == b"x"
    assert str(store) == f"s3://{seaweed.bucket}/{prefix}"
    for secret in (seaweed.secret, seaweed.access_key_id):
        assert secret not in str(store)
    grant = presigner_for(store).grant("GET", "a", 60)
    granted = GrantedStore(lambda *_: grant, seaweed.endpoint, allowed=["127.0.0.1"])
    assert granted.get("a", max_bytes=1) == b"x"

    for url in (str(tmp_path / "o"), f"file://{tmp_path}/o"):
        open_store(url).put("a", b"x")
    assert (tmp_path / "o" / "a").read_bytes() == b"x"
    assert str(open_store("gs://bucket/folder", {"skip_signature": "true"})) == "gs://bucket/folder"
    azure = open_store("az://box/folder", {"account_name": "us", "skip_signature": "true"})
    assert str(azure) == "az://box/folder"


def test_wrong_credentials(seaweed: Any, prefix: str) -> None:
    options = {
        "endpoint": seaweed.endpoint,
        "region": seaweed.region,
        "access_key_id": "nobody",
        "secret_access_key": "hush-hush",
    }
    store = open_store(f"s3://{seaweed.bucket}/{prefix}", options)
    for ask in (
        lambda: store.put("a", b""),
        lambda: store.get("a", max_bytes=1),
        lambda: store.size("a"),
        lambda: list(store.keys()),
    ):
        with pytest.raises(AccessRefusedError, match=prefix) as caught:
            ask()
        said = "".join(traceback.format_exception(caught.value))
        assert "hush-hush" not in said
        assert "nobody" not in said


def test_no_bucket(seaweed: Any) -> None:
    options = {
        "endpoint": seaweed.endpoint,
        "region": seaweed.region,
        "access_key_id": seaweed.access_key_id,
        "secret_access_key": seaweed.secret,
    }
    store = open_store("s3://no-such-bucket", options)
    with pytest.raises(AccessRefusedError, match="s3://no-such-bucket"):
        store.put("a", b"x")


def test_nobody_listens() -> None:
    options = {"endpoint": "http://127.0.0.1:9", "region": "r", "skip_signature": "true"}
    store = open_store("s3://bucket", options)
    with pytest.raises(StoreUnavailableError, match=r"s3://bucket .*reading a"):
        store.get("a", max_bytes=1)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("ftp://host/folder", {}, "ftp://host/folder names no store"),
        ("s3://", {}, "names no store"),
        ("s3://key:hush@bucket/a", {}, "s3://bucket/a names no store"),
        ("s3://bucket/a?token=hush", {}, "s3://bucket/a names no store"),
        ("s3://bucket", {"regoin": "hush"}, "'regoin' is not valid"),
    ],
)
def test_urls_that_are_refused(url: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(LinkError, match=message) as caught:
        open_store(url, options)
    assert "hush" not in str(caught.value)


def test_a_folder_signs_nothing(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="can't sign grants"):
        presigner_for(FolderStore(tmp_path))
