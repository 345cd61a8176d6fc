"""Parcels fetched ahead: in order, a bounded number, each whole before it is looked at."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from photon.errors import ChunkCorruptError, ManifestError
from photon.link import (
    Expected,
    FolderStore,
    Header,
    Intake,
    MemoryStore,
    Transfer,
    plain_entries,
    write_parcel,
)

SHAPES = {"wide": (1500, 1500), "vector": (70,)}


class Counting(MemoryStore):
    """Counts what is read of it."""

    def __init__(self):
        super().__init__()
        self.read, self._counting = [], threading.Lock()

    def get(self, key, **options):
        with self._counting:
            self.read.append(key)
        return super().get(key, **options)


def header(silo):
    return Header(kind="update", run="a", round=1, silo=silo, model="m")


def tensors(number):
    draw = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@pytest.fixture
def stored():
    """A store with five parcels, and what to ask for."""
    store = Counting()
    wanted = []
    for number in range(5):
        whose = header(f"silo-{number}")
        entries = plain_entries(tensors(number).items())
        ref = write_parcel(Transfer(store), f"p{number}", whose, entries)
        wanted.append((number, ref, Expected(whose, SHAPES, frozenset({"fp32"}))))
    return store, wanted


def test_parcels_come_in_order_and_are_read_from_here(stored, tmp_path):
    store, wanted = stored
    seen = []
    for number, parcel in Intake(store, tmp_path / "spool", ahead=2).parcels(wanted):
        chunks_before = [key for key in store.read if key.startswith(f"p{number}/chunks")]
        for _ in range(2):
            found = dict(parcel.tensors())
            assert all(torch.equal(found[name], t) for name, t in tensors(number).items())
        assert chunks_before == [key for key in store.read if key.startswith(f"p{number}/chunks")]
        seen.append(number)
    assert seen == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "spool").iterdir())


def test_no_more_are_fetched_ahead_than_asked(stored, tmp_path):
    store, wanted = stored
    arriving = Intake(store, tmp_path / "spool", ahead=1).parcels(wanted)
    next(arriving)
    deadline = time.monotonic() + 10
    while len({key[:2] for key in store.read}) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert {key[:2] for key in store.read} == {"p0", "p1"}
    arriving.close()


def test_a_bad_parcel_comes_as_its_error_and_others_go_on(stored, tmp_path):
    store, wanted = stored
    chunk = next(key for key, _ in store.keys("p1/chunks"))
    damaged = bytearray(store.get(chunk, max_bytes=10**9))
    damaged[100] ^= 1
    store.delete([chunk])
    store.put(chunk, bytes(damaged))
    of_another = Expected(header("silo-9"), SHAPES, frozenset({"fp32"}))
    wanted[3] = (3, wanted[3][1], of_another)
    found = dict(Intake(store, tmp_path / "spool").parcels(wanted))
    assert isinstance(found[1], ChunkCorruptError)
    assert isinstance(found[3], ManifestError)
    assert [number for number in found if number not in (1, 3)] == [0, 2, 4]


def test_what_an_earlier_process_fetched_is_not_fetched_again(stored, tmp_path):
    store, wanted = stored
    _, ref, _ = wanted[0]
    before = FolderStore(tmp_path / "spool" / ref.sha256, durable=False)
    chunk = next(key for key, _ in store.keys("p0/chunks"))
    before.put(chunk.rpartition("/")[2], store.get(chunk, max_bytes=10**9))
    store.read.clear()
    ((_, parcel),) = Intake(store, tmp_path / "spool").parcels(wanted[:1])
    assert chunk not in store.read
    assert not isinstance(parcel, Exception)
