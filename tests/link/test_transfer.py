"""Many objects: in order, verified, bounded in memory and bandwidth, resumed, never hanging."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_store import MemoryStore

from photon.errors import (
    AccessRefusedError,
    ChunkCorruptError,
    LinkError,
    ObjectMissingError,
    StoreUnavailableError,
    TransferStalledError,
)
from photon.store.contract import Buffer, FolderStore, Pace, Store, unpaced
from photon.store.granted_store import GrantedStore
from photon.store.transfer import Transfer, Wanted


class Watched(Store):
    """A store that counts what it is asked, and lets a test meddle first."""

    def __init__(self, store: Store, meddle: Callable[[str, str], None] | None = None) -> None:
        self._store = store
        self._meddle = meddle or (lambda verb, key: None)
        self.asked: Counter[str] = Counter()

    def _ask(self, verb: str, key: str) -> None:
        self.asked[verb] += 1
        self._meddle(verb, key)

    def put(self, key: str, data: Buffer, *, pace: Pace = unpaced) -> None:
        self._ask("put", key)
        self._store.put(key, data, pace=pace)

    def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> bytes:
        self._ask("get", key)
        return self._store.get(key, max_bytes=max_bytes, pace=pace)

    def size(self, key: str) -> int | None:
        self._ask("size", key)
        return self._store.size(key)

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        return self._store.keys(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        self._store.delete(keys)

    def __str__(self) -> str:
        return "a watched store"


def make_chunks(count: int, count_bytes: int = 1000, seed: int = 0) -> list[tuple[str, bytes]]:
    draw = random.Random(seed)
    made = [draw.randbytes(count_bytes + number) for number in range(count)]
    return [(f"run/chunks/{hashlib.sha256(data).hexdigest()}", data) for data in made]


def wanted_of(chunks: list[tuple[str, bytes]]) -> list[Wanted]:
    return [Wanted(key, len(data), key.rpartition("/")[2]) for key, data in chunks]


def threads_are_gone() -> bool:
    deadline = time.monotonic() + 10
    while any(thread.name == "photon-transfer" for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_there_and_back(streams: int) -> None:
    chunks = make_chunks(20)
    told: list[int] = []
    store = Watched(MemoryStore(), lambda *_: time.sleep(random.uniform(0, 0.005)))
    transfer = Transfer(store, streams=streams, on_progress=told.append)
    transfer.send(chunks)
    total = sum(len(data) for _, data in chunks)
    assert (store.asked["put"], transfer.retries) == (20, 0)
    assert told[-1] == total
    assert told == sorted(told)
    told.clear()
    assert list(transfer.fetch(iter(wanted_of(chunks)))) == [data for _, data in chunks]
    assert told[-1] == total
    assert threads_are_gone()


def test_nothing_to_do() -> None:
    transfer = Transfer(MemoryStore())
    transfer.send([])
    assert list(transfer.fetch([])) == []


def test_what_is_there_is_not_sent_again() -> None:
    store = Watched(MemoryStore())
    chunks = make_chunks(10)
    Transfer(store).send(chunks[:6])
    Transfer(store).send(chunks)
    assert store.asked["put"] == 10


def test_another_object_of_that_key() -> None:
    store = MemoryStore()
    store.put("a", b"theirs")
    with pytest.raises(ChunkCorruptError, match="memory has an object a of 6 bytes, this one has"):
        Transfer(store).send([("a", b"ours, longer")])
    assert store.get("a", max_bytes=10) == b"theirs"


def test_objects_are_pulled_as_streams_become_free() -> None:
    pulled, go_on = [], threading.Event()

    def objects() -> Iterator[tuple[str, bytes]]:
        for key, data in make_chunks(20):
            pulled.append(key)
            yield key, data

    def hold(verb: str, key: str) -> None:
        assert go_on.wait(timeout=20)

    transfer = Transfer(Watched(MemoryStore(), hold), streams=3)
    sender = threading.Thread(target=lambda: transfer.send(objects()), daemon=True)
    sender.start()
    deadline = time.monotonic() + 10
    while len(pulled) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(pulled) == 5
    go_on.set()
    sender.join(timeout=20)
    assert len(pulled) == 20


def test_fetch_runs_no_further_ahead_than_its_streams() -> None:
    chunks = make_chunks(20)
    store = Watched(MemoryStore())
    Transfer(store).send(chunks)
    arriving = Transfer(store, streams=3).fetch(wanted_of(chunks))
    next(arriving)
    time.sleep(0.2)
    assert store.asked["get"] <= 1 + 3
    arriving.close()
    assert threads_are_gone()


def test_unavailable_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.store.streams._LONGEST_PAUSE_S", 0.5)
    failures = Counter[str]()

    def fail_twice(verb: str, key: str) -> None:
        failures[key + verb] += 1
        if verb != "size" and failures[key + verb] <= 2:
            raise StoreUnavailableError("not now")

    chunks = make_chunks(6)
    transfer = Transfer(Watched(MemoryStore(), fail_twice))
    transfer.send(chunks)
    assert transfer.retries == 12
    assert list(transfer.fetch(wanted_of(chunks))) == [data for _, data in chunks]
    assert transfer.retries == 24


def test_unavailable_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.store.streams._LONGEST_PAUSE_S", 0.5)

    def fail(verb: str, key: str) -> None:
        raise StoreUnavailableError("not now")

    store = Watched(MemoryStore(), fail)
    transfer = Transfer(store, attempts=3)
    with pytest.raises(StoreUnavailableError, match=r"not now \(attempt 3 of 3; 0 of 5 bytes done"):
        list(transfer.fetch([Wanted("a", 5, "0" * 64)]))
    assert store.asked["get"] == 3
    with pytest.raises(StoreUnavailableError, match="attempt 3 of 3"):
        transfer.send([("a", b"x")])
    assert threads_are_gone()


def test_refusals_are_not_tried_again() -> None:
    def refuse(verb: str, key: str) -> None:
        raise AccessRefusedError("no")

    store = Watched(MemoryStore(), refuse)
    with pytest.raises(AccessRefusedError):
        Transfer(store).send([("a", b"x")])
    assert store.asked.total() == 1
    with pytest.raises(ObjectMissingError):
        list(Transfer(MemoryStore()).fetch([Wanted("a", 5, "0" * 64)]))


@pytest.mark.parametrize("found", [b"wrong", b"right and more", b"right"[:3], b""])
def test_wrong_bytes_are_never_handed_over(found: bytes) -> None:
    store = Watched(MemoryStore())
    store.put("run/chunks/good", b"fine")
    store.put("run/chunks/bad", found)
    fine = Wanted("run/chunks/good", 4, hashlib.sha256(b"fine").hexdigest())
    arriving = Transfer(store).fetch(
        [fine, Wanted("run/chunks/bad", 5, hashlib.sha256(b"right").hexdigest()), fine]
    )
    assert next(arriving) == b"fine"
    with pytest.raises(ChunkCorruptError, match=r"run/chunks/bad (in|from) a watched|chunks/bad"):
        next(arriving)
    with pytest.raises(StopIteration):
        next(arriving)
    asked = store.asked["get"]
    assert asked in (3, 4), "the bad one twice, a good one or two"


def test_wrong_once() -> None:
    right = b"right"

    class Once(MemoryStore):
        asked = 0

        def get(self, key: str, *, max_bytes: int, pace: Pace = unpaced) -> bytes:
            self.asked += 1
            return b"wrong" if self.asked == 1 else right

    store = Once()
    transfer = Transfer(store)
    wanted = Wanted("a", 5, hashlib.sha256(right).hexdigest())
    assert list(transfer.fetch([wanted])) == [right]
    assert (store.asked, transfer.retries) == (2, 1)


def test_interrupted_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    chunks = make_chunks(12)
    inner = MemoryStore()
    Transfer(inner).send(chunks)
    broken = threading.Event()

    def break_off(verb: str, key: str) -> None:
        if store.asked["get"] > 5:
            broken.set()
            raise AccessRefusedError("no more today")

    spool = tmp_path / "spool"
    store = Watched(inner, break_off)
    got = []
    with pytest.raises(AccessRefusedError):
        got.extend(Transfer(store, streams=2).fetch(wanted_of(chunks), spool=spool))
    assert broken.is_set()
    kept = len(list(spool.iterdir()))
    assert kept == 5

    # One of those kept is half there only, as after a power cut.
    (spool / wanted_of(chunks)[0].sha256).write_bytes(chunks[0][1][:10])
    again = Watched(inner)
    told: list[int] = []
    transfer = Transfer(again, streams=2, on_progress=told.append)
    assert list(transfer.fetch(wanted_of(chunks), spool=spool)) == [data for _, data in chunks]
    assert again.asked["get"] == 12 - kept + 1
    assert told[-1] == sum(len(data) for _, data in chunks)

    third = Watched(inner)
    assert len(list(Transfer(third).fetch(wanted_of(chunks), spool=spool))) == 12
    assert third.asked["get"] == 0


def test_bandwidth_cap_over_all_streams() -> None:
    chunks = make_chunks(40, 50_000)
    total = sum(len(data) for _, data in chunks)
    transfer = Transfer(MemoryStore(), streams=8, bytes_per_s=2e6)
    start = time.monotonic()
    transfer.send(chunks)
    send_s = time.monotonic() - start
    list(transfer.fetch(wanted_of(chunks)))
    both_s = time.monotonic() - start
    # A quarter of a second's worth may be saved up, each time.
    assert total / 2e6 - 0.3 < send_s < 10
    assert 2 * total / 2e6 - 0.6 < both_s < 20


def test_bandwidth_cap_within_an_object(seaweed: Any, prefix: str) -> None:
    sign = seaweed.presigner(prefix).grant
    store = GrantedStore(
        lambda verb, key, count, sha256: sign(verb, key, 60, count, sha256),
        seaweed.endpoint,
        allowed=["127.0.0.1"],
    )
    chunks = make_chunks(2, 2_000_000)
    told: list[tuple[float, int]] = []
    transfer = Transfer(
        store, bytes_per_s=2e6, on_progress=lambda done: told.append((time.monotonic(), done))
    )
    start = time.monotonic()
    transfer.send(chunks)
    assert 1.7 < time.monotonic() - start < 10
    # In every window, not only over the whole: within an object too. Each stream may be a piece
    # ahead of what it slept for.
    for at, done in told:
        assert done <= 2e6 * (at - start + 0.3) + 2 * (128 << 10)
    assert sum(0 < done < 2_000_000 for _, done in told) >= 2


def test_a_cap_so_low_that_pieces_take_longer_than_the_deadline() -> None:
    # Sleeping to keep the cap is our own doing: not a stall.
    store = MemoryStore()
    transfer = Transfer(store, streams=2, bytes_per_s=10_000, silence_s=2)
    transfer.send([("a", bytes(25_000)), ("b", bytes(5_000))])
    assert [store.size(key) for key in "ab"] == [25_000, 5_000]


def test_a_slow_caller_is_no_stall() -> None:
    chunks = make_chunks(3)

    def slowly() -> Iterator[tuple[str, bytes]]:
        for chunk in chunks:
            time.sleep(1.0)
            yield chunk

    store = MemoryStore()
    transfer = Transfer(store, streams=1, silence_s=0.8)
    transfer.send(slowly())
    for _ in transfer.fetch(wanted_of(chunks)):
        time.sleep(1.0)


def test_stalled() -> None:
    release = threading.Event()

    def hang(verb: str, key: str) -> None:
        if key == "run/b":
            release.wait(timeout=30)

    transfer = Transfer(Watched(MemoryStore(), hang), silence_s=1.0)
    start = time.monotonic()
    message = (
        r"no byte moved for \d+ s between here and a watched store, writing run/b; 3 bytes done"
    )
    with pytest.raises(TransferStalledError, match=message):
        transfer.send([("run/a", b"123"), ("run/b", b"4567")])
    # The silence, and what threads get to leave.
    assert time.monotonic() - start < 10
    with pytest.raises(TransferStalledError, match=r"reading run/b; 0 of 5 bytes done"):
        list(transfer.fetch([Wanted("run/b", 5, "0" * 64)]))
    release.set()
    assert threads_are_gone()


def test_stalled_between_attempts() -> None:
    def fail(verb: str, key: str) -> None:
        raise StoreUnavailableError("the door is shut")

    transfer = Transfer(Watched(MemoryStore(), fail), attempts=10_000, silence_s=1.0)
    start = time.monotonic()
    with pytest.raises(TransferStalledError, match=r"run/a, to be tried again.*the door is shut"):
        transfer.send([("run/a", b"123")])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_errors_of_the_caller_end_it(kind: type[BaseException]) -> None:
    def objects() -> Iterator[tuple[str, bytes]]:
        yield "a", b"x"
        raise kind

    def interrupt(done: int) -> None:
        raise kind

    start = time.monotonic()
    with pytest.raises(kind):
        Transfer(MemoryStore()).send(objects())
    slow = Watched(MemoryStore(), lambda *_: time.sleep(0.5))
    with pytest.raises(kind):
        Transfer(slow, on_progress=interrupt).send([("a", b"x")])
    capped = Transfer(MemoryStore(), bytes_per_s=1.0, on_progress=interrupt)
    with pytest.raises(kind):
        capped.send([("a", bytes(1000)), ("b", bytes(1000))])
    assert threads_are_gone()
    assert time.monotonic() - start < 10


def test_a_spool_that_can_not_be_written(tmp_path: Path) -> None:
    store = MemoryStore()
    chunks = make_chunks(1)
    Transfer(store).send(chunks)
    (tmp_path / "spool").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="spool"):
        list(Transfer(store).fetch(wanted_of(chunks), spool=tmp_path / "spool"))


def test_folder_to_folder(tmp_path: Path) -> None:
    chunks = make_chunks(5)
    Transfer(FolderStore(tmp_path / "a")).send(chunks)
    arriving = Transfer(FolderStore(tmp_path / "a")).fetch(wanted_of(chunks))
    keys = [key for key, _ in chunks]
    Transfer(FolderStore(tmp_path / "b")).send(zip(keys, arriving, strict=True))
    assert sum(path.is_file() for path in (tmp_path / "b").rglob("*")) == 5


@pytest.mark.parametrize(
    "wrong", [{"streams": 0}, {"attempts": 0}, {"silence_s": 0}, {"bytes_per_s": 0.0}]
)
def test_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(LinkError, match="a transfer needs"):
        Transfer(MemoryStore(), **wrong)
