"""What a run left in a store goes, but for its last state; nothing of anybody else's does."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_store import MemoryStore

from photon.errors import ManifestError, StoreUnavailableError
from photon.federation.broadcast import parcel_header
from photon.link import plain_entries, write_parcel
from photon.link.manifest import Kind
from photon.store import garbage
from photon.store.contract import FolderStore, Store
from photon.store.garbage import free_run
from photon.store.transfer import Transfer

RUN, OTHER = "a" * 32, "a" * 31 + "b"


@pytest.fixture(params=["memory", "folder", "seaweed"])
def store(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    elif request.param == "folder":
        yield FolderStore(tmp_path / "store")
    else:
        found = request.getfixturevalue("seaweed").store(prefix)
        yield found
        found.delete([key for key, _ in found.keys("")])


def state_of(number: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(number)
    # "frozen" is the same in each round: its chunk is named by several manifests.
    return {
        "frozen": torch.ones(2_000_000),
        "weights": torch.randn(50_000, generator=made),
    }


def publish(store: Store, run: str, kind: Kind, number: int, **how: Any) -> str:
    """As the aggregator, or as a silo does; the manifest's key."""
    silo = how.pop("silo", None)
    folder = f"{run}/silos/{silo}" if silo else f"{run}/global"
    state = state_of(number)
    header = parcel_header(kind, run, number, state, **how)
    return write_parcel(
        Transfer(store, streams=1),
        folder,
        header,
        plain_entries(state.items()),
        chunk_bytes=4 << 20,
    ).key


def fill(store: Store, run: str) -> None:
    for number in range(3):
        publish(store, run, "state", number)
    for silo in ("red", "blue"):
        key = f"{run}/silos/{silo}"
        for number in (1, 2):
            chunk = f"{run}{silo}{number}".encode() * 100
            name = hashlib.sha256(chunk).hexdigest()
            store.put(f"{key}/chunks/{name}", chunk)
            manifest = json.dumps({"chunks": [{"sha256": name, "bytes": len(chunk)}]}).encode()
            store.put(f"{key}/update/round-{number:06d}/{silo}-x.json", manifest)
        store.put(f"{key}/chunks/{'0' * 64}", b"nobody names it")


def others(store: Store) -> dict[str, bytes]:
    """Objects of others in the same store, some with names that look alike."""
    found = {
        f"{OTHER}/global/state/round-000001/x.json": b"{}",
        f"{OTHER}/global/chunks/abc": b"another run's",
        f"{RUN}2/global/chunks/abc": b"a longer name",
        f"backup/{RUN}/global/chunks/abc": b"a copy",
        "payroll.csv": b"not ours at all",
        "photon-probe/kept": b"ready",
    }
    for key, data in found.items():
        store.put(key, data)
    return found


def names(store: Store, run: str = RUN) -> dict[str, int]:
    return {key.removeprefix(f"{run}/"): size for key, size in store.keys(run)}


def chunks_named(store: Store, key: str) -> set[str]:
    record = json.loads(bytes(store.get(key, max_bytes=1 << 20)))
    return {f"global/chunks/{chunk['sha256']}" for chunk in record["chunks"]}


def test_all_of_an_overwritten_run_goes_and_nothing_else(store: Store) -> None:
    fill(store, RUN)
    untouched = others(store)
    before = names(store)
    assert len(before) > 15
    freed = free_run(store, RUN, keep_last_state=False)
    assert (freed.objects, freed.bytes, freed.whole) == (len(before), sum(before.values()), True)
    assert names(store) == {}
    assert {key: store.get(key, max_bytes=100) for key in untouched} == untouched
    assert free_run(store, RUN, keep_last_state=False).objects == 0


def test_of_a_finished_run_the_last_global_state_stays(store: Store) -> None:
    fill(store, RUN)
    untouched = others(store)
    last = f"{RUN}/{next(key for key in names(store) if 'global/state/round-000002' in key)}"
    stays = {last.removeprefix(f"{RUN}/"), *chunks_named(store, last)}
    before = names(store)
    freed = free_run(store, RUN, keep_last_state=True)
    after = names(store)
    assert set(after) == stays
    assert freed.objects == len(before) - len(after)
    assert freed.bytes == sum(before.values()) - sum(after.values())
    assert all(store.size(key) is not None for key in untouched)
    assert free_run(store, RUN, keep_last_state=True).objects == 0
    # An update that comes late, and the next sweep.
    store.put(f"{RUN}/silos/red/update/round-000003/red-x.json", b"{}")
    assert free_run(store, RUN, keep_last_state=True).objects == 1
    assert set(names(store)) == stays


def test_where_states_are_sent_as_updates_all_that_leads_to_the_last_stays(store: Store) -> None:
    """A lossy broadcast: the last whole state, and each outer update since."""
    keys = [publish(store, RUN, "state", number) for number in (0, 1)]
    keys += [
        publish(store, RUN, "outer_update", number, base=str(number) * 64) for number in (1, 2, 3)
    ]
    free_run(store, RUN, keep_last_state=True)
    kept = {key for key, _ in store.keys(RUN) if key.endswith(".json")}
    assert kept == {keys[1], keys[3], keys[4]}
    for key in kept:
        assert chunks_named(store, key) <= set(names(store))


def test_a_run_that_published_nothing(store: Store) -> None:
    store.put(f"{RUN}/silos/red/chunks/abc", b"early")
    assert free_run(store, RUN, keep_last_state=True).objects == 1
    assert free_run(store, OTHER, keep_last_state=True).objects == 0


@pytest.mark.parametrize("run_id", ["", "a", "..", "A" * 32, "a" * 33, f"{'a' * 32}/global", "*"])
def test_what_is_no_run_frees_nothing(run_id: str) -> None:
    store = MemoryStore()
    fill(store, RUN)
    before = names(store)
    with pytest.raises(ManifestError, match="no id of a run"):
        free_run(store, run_id, keep_last_state=False)
    assert names(store) == before


def test_a_last_state_that_can_not_be_read_frees_nothing() -> None:
    store = MemoryStore()
    fill(store, RUN)
    store.put(f"{RUN}/global/state/round-000009/x.json", b"{not json")
    before = names(store)
    with pytest.raises(ManifestError, match="round-000009"):
        free_run(store, RUN, keep_last_state=True)
    assert names(store) == before
    assert free_run(store, RUN, keep_last_state=False).whole


class Failing(MemoryStore):
    """Fails after so many deletions."""

    left = 0

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.left == 0:
                raise StoreUnavailableError("gone")
            self.left -= 1
            super().delete([key])


@pytest.mark.parametrize("keep", [True, False])
def test_cut_short_anywhere_the_next_time_does_the_rest(keep: bool) -> None:
    whole = MemoryStore()
    fill(whole, RUN)
    free_run(whole, RUN, keep_last_state=keep)
    cuts = 0
    for deletions in random.Random(5).sample(range(17), 8):
        store = Failing()
        fill(store, RUN)
        store.left = deletions
        try:
            free_run(store, RUN, keep_last_state=keep)
        except StoreUnavailableError:
            cuts += 1
        for key, _ in store.keys(f"{RUN}/global"):
            if key.endswith(".json"):
                assert chunks_named(store, key) <= set(names(store)), "manifests go first"
        store.left = 1000
        free_run(store, RUN, keep_last_state=keep)
        assert names(store) == names(whole)
    assert cuts >= 6


def test_it_ends_early_when_told_to(monkeypatch) -> None:
    monkeypatch.setattr(garbage, "_AT_ONCE", 3)
    store = MemoryStore()
    fill(store, RUN)
    before, asked = len(names(store)), iter([True, True, False])
    freed = free_run(store, RUN, keep_last_state=False, go_on=lambda: next(asked))
    assert (freed.objects, freed.whole) == (6, False)
    assert len(names(store)) == before - 6
    assert free_run(store, RUN, keep_last_state=False).objects == before - 6
