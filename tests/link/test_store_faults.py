"""Transfers through the real store while what is between or behind fails; each fault fired."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from photon.errors import ChunkCorruptError, LinkError, TransferStalledError
from photon.store.granted_store import GrantedStore
from photon.store.object_store import ObjectStore, open_store
from photon.store.transfer import Transfer, Wanted

CHUNK_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.store.streams._LONGEST_PAUSE_S", 0.5)


def make_chunks(count: int, seed: int) -> list[tuple[str, bytes]]:
    draw = random.Random(seed)
    made = [draw.randbytes(CHUNK_BYTES) for _ in range(count)]
    return [(f"chunks/{hashlib.sha256(data).hexdigest()}", data) for data in made]


def wanted_of(chunks: list[tuple[str, bytes]]) -> list[Wanted]:
    return [Wanted(key, len(data), key.rpartition("/")[2]) for key, data in chunks]


def granted(presigner: Any, **options: Any) -> GrantedStore:
    return GrantedStore(
        lambda verb, key, count, sha256: presigner.grant(verb, key, 300, count, sha256),
        presigner._origin,
        allowed=["127.0.0.1"],
        **options,
    )


class CuttingProxy:
    """Passes bytes on, and cuts connections in the middle of objects.

    Args:
        port: of the store, on this machine.
        direction: whose bytes are counted: "up" to the store, "down" from it.
        cuts: how many connections are cut, each after 1 byte to a chunk: whichever carries one.
        reset: cut as a router does (RST), or as a server that ends (FIN).
    """

    def __init__(self, port: int, direction: str, *, cuts: int, seed: int, reset: bool) -> None:
        self._store_port = port
        self._direction = direction
        self._cuts_left = cuts
        self._reset = reset
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        #: Bytes that had passed when a connection was cut.
        self.cut_after: list[int] = []
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                store = socket.create_connection(("127.0.0.1", self._store_port), timeout=10)
            except OSError:
                client.close()
                continue
            store.settimeout(None)
            self.connections += 1
            budget = self._draw.randint(1, CHUNK_BYTES)
            for one, other, direction in ((client, store, "up"), (store, client, "down")):
                limit = budget if direction == self._direction else None
                threading.Thread(target=self._pass, args=(one, other, limit), daemon=True).start()

    def _may_cut(self) -> bool:
        with self._lock:
            self._cuts_left -= 1
            return self._cuts_left >= 0

    def _pass(self, source: socket.socket, sink: socket.socket, budget: int | None) -> None:
        passed = 0
        try:
            while piece := source.recv(65536):
                if budget is not None and passed + len(piece) >= budget and self._may_cut():
                    sink.sendall(piece[: max(0, budget - passed)])
                    self.cut_after.append(budget)
                    if self._reset:
                        for one in (source, sink):
                            linger = struct.pack("ii", 1, 0)
                            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return
                sink.sendall(piece)
                passed += len(piece)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                # Wakes the other thread, which may be reading from it.
                shut_down(one)
                one.close()


def shut_down(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting(*args: Any, **options: Any) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(*args, **options)
    try:
        yield proxy
    finally:
        proxy.close()


def test_connections_are_used_again(seaweed: Any, prefix: str) -> None:
    chunks = make_chunks(10, seed=0)
    with cutting(seaweed.port, "up", cuts=0, seed=0, reset=False) as proxy:
        presigner = seaweed.presigner(prefix, endpoint=proxy.endpoint)
        transfer = Transfer(granted(presigner), streams=3)
        transfer.send(chunks)
        assert transfer.retries == 0
        assert list(transfer.fetch(wanted_of(chunks))) == [data for _, data in chunks]
        assert 1 <= proxy.connections <= 5  # three streams, and two that ask ahead


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("through", ["grants", "obstore"])
def test_cut_while_writing(seaweed: Any, prefix: str, seed: int, through: str) -> None:
    chunks = make_chunks(12, seed)
    with cutting(seaweed.port, "up", cuts=4, seed=seed, reset=seed % 2 == 0) as proxy:
        if through == "grants":
            store = granted(seaweed.presigner(prefix, endpoint=proxy.endpoint))
        else:
            store = seaweed.store(prefix, endpoint=proxy.endpoint)
        transfer = Transfer(store, streams=4)
        transfer.send(chunks)
        assert len(proxy.cut_after) == 4
    assert transfer.retries > 0
    direct = seaweed.store(prefix)
    assert dict(direct.keys()) == {key: CHUNK_BYTES for key, _ in chunks}
    for key, data in chunks:
        assert direct.get(key, max_bytes=CHUNK_BYTES) == data


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("through", ["grants", "obstore"])
def test_cut_while_reading(seaweed: Any, prefix: str, seed: int, through: str) -> None:
    chunks = make_chunks(12, seed)
    Transfer(seaweed.store(prefix)).send(chunks)
    with cutting(seaweed.port, "down", cuts=4, seed=seed, reset=seed % 2 == 0) as proxy:
        if through == "grants":
            store = granted(seaweed.presigner(prefix, endpoint=proxy.endpoint))
        else:
            store = seaweed.store(prefix, endpoint=proxy.endpoint)
        transfer = Transfer(store, streams=4)
        assert list(transfer.fetch(wanted_of(chunks))) == [data for _, data in chunks]
        assert len(proxy.cut_after) == 4
    assert transfer.retries > 0


class KillOnce:
    """Kills the store with no warning once some bytes have moved, and starts it again."""

    def __init__(self, seaweed: Any, after_bytes: int) -> None:
        self._seaweed = seaweed
        self._after_bytes = after_bytes
        self.killed_at: int | None = None

    def __call__(self, done_bytes: int) -> None:
        if self.killed_at is None and done_bytes >= self._after_bytes:
            self.killed_at = done_bytes
            self._seaweed.kill()
            # Not waited for: the transfer goes on and meets a store that is down.
            self._seaweed.launch()


@pytest.mark.parametrize("direction", ["writing", "reading"])
def test_store_killed_and_started_again(seaweed: Any, prefix: str, direction: str) -> None:
    chunks = make_chunks(24, seed=5)
    store = granted(seaweed.presigner(prefix))
    total = 24 * CHUNK_BYTES
    kill = KillOnce(seaweed, total // 4)
    # Capped, so that the store dies in the middle.
    transfer = Transfer(store, streams=4, bytes_per_s=16e6, attempts=200, on_progress=kill)
    if direction == "writing":
        transfer.send(chunks)
    else:
        Transfer(seaweed.store(prefix)).send(chunks)
        assert list(transfer.fetch(wanted_of(chunks))) == [data for _, data in chunks]
    assert kill.killed_at is not None
    seaweed.wait_until_ready()
    assert kill.killed_at < total
    assert transfer.retries > 0
    direct = Transfer(seaweed.store(prefix))
    assert list(direct.fetch(wanted_of(chunks))) == [data for _, data in chunks]


class SilentStore:
    """Accepts connections and says no more than `first` to each."""

    def __init__(self, first: bytes) -> None:
        self._first = first
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            self.accepted.append(one)
            one.sendall(self._first)

    def close(self) -> None:
        self._listener.close()
        for one in self.accepted:
            one.close()


@contextmanager
def silent(first: bytes = b"") -> Iterator[SilentStore]:
    store = SilentStore(first)
    try:
        yield store
    finally:
        store.close()


def send_one(transfer: Transfer) -> None:
    transfer.send([("run/a", bytes(CHUNK_BYTES))])


def fetch_one(transfer: Transfer) -> None:
    list(transfer.fetch([Wanted("run/a", CHUNK_BYTES, "0" * 64)]))


@pytest.mark.parametrize(("move", "doing"), [(send_one, "writing"), (fetch_one, "reading")])
@pytest.mark.parametrize("socket_silence_s", [0.3, 30.0])
def test_silent_store(
    seaweed: Any, move: Callable[[Transfer], None], doing: str, socket_silence_s: float
) -> None:
    """Whether sockets give up first and are tried again, or never do: a deadline ends it."""
    with silent() as mute:
        presigner = seaweed.presigner(endpoint=f"http://127.0.0.1:{mute.port}")
        store = granted(presigner, name="the mute store", silence_s=socket_silence_s)
        transfer = Transfer(store, silence_s=1.5, attempts=1000)
        start = time.monotonic()
        with pytest.raises(TransferStalledError) as caught:
            move(transfer)
        # The silence and what threads get to leave, on a machine with other work.
        assert 1.4 < time.monotonic() - start < 25
        assert mute.accepted
    for said in ("the mute store", f"{doing} run/a", "0 of" if doing == "reading" else "0 bytes"):
        assert said in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_silent_in_the_middle_of_an_object(seaweed: Any) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {CHUNK_BYTES}\r\n\r\n".encode()
    with silent(head + b"some bytes") as mute:
        presigner = seaweed.presigner(endpoint=f"http://127.0.0.1:{mute.port}")
        transfer = Transfer(granted(presigner, silence_s=30), silence_s=1.5)
        with pytest.raises(TransferStalledError, match=f"; 10 of {CHUNK_BYTES} bytes done"):
            fetch_one(transfer)
        assert len(mute.accepted) == 1


def test_silent_store_through_obstore() -> None:
    with silent() as mute:
        options = {
            "endpoint": f"http://127.0.0.1:{mute.port}",
            "region": "r",
            "skip_signature": "true",
        }
        store = open_store("s3://bucket", options, silence_s=0.5)
        with pytest.raises(TransferStalledError, match="s3://bucket"):
            send_one(Transfer(store, silence_s=3, attempts=1000))
        assert len(mute.accepted) > 1


@pytest.mark.parametrize("through", ["grants", "obstore"])
def test_chunk_corrupt_in_the_store(seaweed: Any, prefix: str, through: str) -> None:
    chunks = make_chunks(3, seed=9)
    direct: ObjectStore = seaweed.store(prefix)
    key, data = chunks[1]
    wrong = bytearray(data)
    wrong[CHUNK_BYTES // 2] ^= 1
    direct.put(key, wrong)
    store = granted(seaweed.presigner(prefix), name="theirs") if through == "grants" else direct
    Transfer(store).send(chunks)
    assert direct.get(key, max_bytes=CHUNK_BYTES) == wrong
    transfer = Transfer(store)
    arriving = transfer.fetch(wanted_of(chunks))
    assert next(arriving) == chunks[0][1]
    with pytest.raises(ChunkCorruptError, match=key) as caught:
        next(arriving)
    assert str(store) in str(caught.value)
    assert transfer.retries == 1


def test_fetch_of_grants_goes_on_where_it_was(seaweed: Any, prefix: str, tmp_path: Any) -> None:
    """The connection is lost for good in the middle; the next day only the rest is asked for."""
    chunks = make_chunks(8, seed=11)
    Transfer(seaweed.store(prefix)).send(chunks)
    asked: list[str] = []

    def fetch(most: int) -> list[bytes]:
        def grants(verb: Any, key: str, count: Any, sha256: Any) -> Any:
            asked.append(key)
            if len(asked) > most:
                raise LinkError("the aggregator is gone")
            return seaweed.presigner(prefix).grant(verb, key, 60, count, sha256)

        transfer = Transfer(
            GrantedStore(grants, seaweed.endpoint, allowed=["127.0.0.1"]), streams=2
        )
        return list(transfer.fetch(wanted_of(chunks), spool=tmp_path / "spool"))

    with pytest.raises(LinkError, match="the aggregator is gone"):
        fetch(3)
    assert len(asked) > 3
    kept = {path.name for path in (tmp_path / "spool").iterdir()}
    # Two streams: when the fourth question fails, the third's answer may still be on its way.
    assert len(kept) in (2, 3)
    asked.clear()
    assert fetch(100) == [data for _, data in chunks]
    assert {key.rpartition("/")[2] for key in asked}.isdisjoint(kept)
    assert len(asked) == 8 - len(kept)
