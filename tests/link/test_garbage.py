"""Collection: only what nobody names goes, manifests first, and a crash in between is mended."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from memory_store import MemoryStore

from photon.errors import ObjectMissingError, StoreUnavailableError
from photon.store.contract import FolderStore, Store, require_key
from photon.store.garbage import collect


def fill(store: Store) -> None:
    for name in "abcde":
        store.put(f"run/chunks/{name}", name.encode() * 10)
    store.put("run/update/round-000001/x.json", b"ab")
    store.put("run/update/round-000002/x.json", b"bc")
    store.put("run/state/round-000002/s.json", b"d")
    store.put("run/notes.txt", b"invented")
    store.put("run2/chunks/a", b"another run's")


def names(store: Store) -> list[str]:
    return [key.removeprefix("run/") for key, _ in store.keys("run")]


def of_round_two(key: str) -> bool:
    return "/round-000002/" in key


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_what_nobody_names_goes(kind: str, tmp_path: Path) -> None:
    store = MemoryStore() if kind == "memory" else FolderStore(tmp_path)
    fill(store)

    def chunks_of(key: str) -> Iterable[str]:
        return bytes(store.get(key, max_bytes=10)).decode()

    collect(store, "run", keep=of_round_two, chunks_of=chunks_of)
    assert names(store) == [
        "chunks/b",
        "chunks/c",
        "chunks/d",
        "state/round-000002/s.json",
        "update/round-000002/x.json",
    ]
    assert store.size("run2/chunks/a") is not None
    before = names(store)
    collect(store, "run", keep=of_round_two, chunks_of=chunks_of)
    assert names(store) == before


def test_an_upload_while_it_runs_is_left_alone() -> None:
    store = MemoryStore()
    fill(store)

    def chunks_of(key: str) -> Iterable[str]:
        store.put("run/chunks/late", b"just now")
        return bytes(store.get(key, max_bytes=10)).decode()

    collect(store, "run", keep=of_round_two, chunks_of=chunks_of)
    assert store.size("run/chunks/late") == 8


def test_nothing_goes_when_a_kept_manifest_can_not_be_read() -> None:
    store = MemoryStore()
    fill(store)
    before = names(store)

    def chunks_of(key: str) -> Iterable[str]:
        raise ObjectMissingError("gone")

    with pytest.raises(ObjectMissingError):
        collect(store, "run", keep=of_round_two, chunks_of=chunks_of)
    assert names(store) == before


def test_a_crash_leaves_no_manifest_without_its_chunks() -> None:
    """Killed after each single deletion in turn; the next collection does the rest."""
    crashes = 0
    for deletions in range(5):
        store = Crashing(deletions)
        fill(store)

        def chunks_of(key: str, store: Store = store) -> Iterable[str]:
            return bytes(store.get(key, max_bytes=10)).decode()

        try:
            collect(store, "run", keep=of_round_two, chunks_of=chunks_of)
        except StoreUnavailableError:
            crashes += 1
        for name in names(store):
            if name.endswith(".json"):
                for chunk in chunks_of(f"run/{name}"):
                    assert store.size(f"run/chunks/{chunk}") is not None
        store.left = 100
        collect(store, "run", keep=of_round_two, chunks_of=chunks_of)
        assert [name[-1] for name in names(store) if "chunks/" in name] == ["b", "c", "d"]
    assert crashes == 4


class Crashing(MemoryStore):
    """Fails after so many deletions."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.left == 0:
                raise StoreUnavailableError(f"no, {require_key(key)} stays")
            self.left -= 1
            super().delete([key])
