"""A node's client, a real desk and a real store: what grants allow, and a desk that restarts."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from member_desk import RUN, Aggregator

from photon.deploy.desk import Desk
from photon.errors import AccessRefusedError
from photon.store.granted_store import GrantedStore
from photon.store.transfer import Transfer, Wanted


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
        sender.send(objects)
        # Two questions an object, several to a request.
        assert book.requests < 80
        stored = dict(seaweed.store("runs").keys(f"{RUN}/silos/blue"))
        assert stored == {key: 10_000 for key, _ in objects}
        # Sent again by a node that was killed: all there, and nothing counts twice.
        told: list[int] = []
        Transfer(
            GrantedStore(blue.grants(task.id), seaweed.endpoint, allowed=["127.0.0.1"]),
            on_progress=told.append,
        ).send(objects)
        assert told[-1] == 400_000
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
        carrier.send(some(objects))
        thread.join(30)
        assert carrier.retries > 0
    finally:
        thread.join(30)
        for desk in restarted:
            desk.stop()
        aggregator.close()
