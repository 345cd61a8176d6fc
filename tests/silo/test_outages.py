"""Stores that come and go while a site fetches and sends."""

from __future__ import annotations

import json
import math
import time

from kept_state import keys_of

from photon.errors import StoreUnavailableError
from photon.federation.envelopes import parse_reply
from photon.store.contract import FolderStore, Store, unpaced
from photon.store.transfer import Transfer


class Unsteady(Store):
    """A folder that can't be reached for as many requests as `down` says."""

    def __init__(self, below: FolderStore) -> None:
        self.below, self.down, self.refused = below, 0, 0
        self.got, self.breaks_at = [], None

    def _reach(self) -> None:
        if self.down:
            self.down -= 1
            self.refused += 1
            raise StoreUnavailableError("the store is down")

    def put(self, key, data, *, pace=unpaced):
        self._reach()
        self.below.put(key, data, pace=pace)

    def get(self, key, *, max_bytes, pace=unpaced):
        self._reach()
        self.got.append(key)
        if key == self.breaks_at:
            self.breaks_at = None
            raise StoreUnavailableError("the line broke")
        return self.below.get(key, max_bytes=max_bytes, pace=pace)

    def size(self, key):
        self._reach()
        return self.below.size(key)

    def keys(self, prefix=""):
        return self.below.keys(prefix)

    def delete(self, keys):
        self.below.delete(keys)

    def __str__(self):
        return "an unsteady store"


def unsteady(bench, monkeypatch, *, streams=8):
    bench.store = Unsteady(bench.store)
    bench.trainer._carriers = lambda _: Transfer(bench.store, streams=streams, attempts=1)
    monkeypatch.setattr("photon.silo.trainer._FIRST_PAUSE_S", 0.01)
    return bench.store


def test_an_outage_is_waited_for_both_ways(bench, aggregator, monkeypatch, fits):
    store = unsteady(bench, monkeypatch)
    store.down = 3
    send = bench.trainer._send

    def outage_then_send(ask):
        if store.refused == 3:
            store.down = 3
        send(ask)

    bench.trainer._send = outage_then_send
    reply = bench.answer(aggregator.fit())
    assert store.refused >= 6
    assert reply.fit.update.key in keys_of(store)
    assert len(fits) == 1


def test_what_arrived_before_an_outage_is_not_fetched_again(
    make_aggregator, make_bench, monkeypatch
):
    aggregator = make_aggregator("federation.optimizer_state=average")
    bench = make_bench(aggregator)
    chunks = sorted(key for key in keys_of(bench.store) if "/chunks/" in key)
    assert len(chunks) > 1
    store = unsteady(bench, monkeypatch, streams=1)
    ask = aggregator.fit()
    whole = ask.state.whole
    manifest = json.loads(bytes(store.get(whole.key, max_bytes=whole.bytes)))
    last = manifest["chunks"][-1]["sha256"]
    store.breaks_at, store.got = next(key for key in chunks if key.endswith(last)), []
    reply = bench.answer(ask)
    assert store.breaks_at is None  # it broke
    assert {store.got.count(key) for key in chunks if not key.endswith(last)} == {1}
    assert reply.fit.bytes_down == whole.wire_bytes
    assert not (bench.home / "incoming").exists()


def test_an_outage_longer_than_the_deadline_is_a_refusal_and_loses_nothing(
    bench, aggregator, monkeypatch, fits
):
    store = unsteady(bench, monkeypatch)
    send, ends = bench.trainer._send, [math.inf]

    def outage(ask):
        store.down = 10**6
        ends[0] = min(ends[0], time.monotonic() + 3)
        send(ask)

    bench.trainer._send = outage
    ask = aggregator.fit()
    refused = parse_reply(
        bench.trainer.answer(ask, lambda: ends[0] - time.monotonic()).text
    ).refused
    assert refused.code == 71
    assert store.refused > 3
    store.down = 0
    bench.start()
    assert bench.answer(ask).fit.update is not None
    assert len(fits) == 1  # what was trained was kept
