"""Memory lent again: never while something still refers to it."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from photon.store.contract import FolderStore
from photon.store.memory import ReusedMemory


def address(piece):
    return np.frombuffer(piece, np.uint8).ctypes.data


def test_what_was_let_go_of_is_lent_again():
    memory = ReusedMemory(2)
    piece = memory.take(1000)
    first = address(piece)
    del piece
    again = memory.take(900)
    assert address(again) == first
    assert len(again) == 900


@pytest.mark.parametrize(
    "reader",
    [
        lambda piece: piece[10:20],
        lambda piece: torch.frombuffer(piece, dtype=torch.uint8),
        lambda piece: torch.frombuffer(piece, dtype=torch.float32, count=3, offset=8).view(3, 1),
        lambda piece: np.frombuffer(piece, np.uint8)[5:],
    ],
    ids=["a memoryview", "a tensor", "a view of a tensor", "an array"],
)
def test_not_while_anything_refers_to_it(reader):
    memory = ReusedMemory(2)
    piece = memory.take(1000)
    first = address(piece)
    held = reader(piece)
    del piece
    gc.collect()
    other = memory.take(1000)
    assert address(other) != first
    del held
    assert address(memory.take(1000)) == first


def test_a_piece_far_too_large_is_not_lent():
    memory = ReusedMemory(2)
    first = address(memory.take(1000))
    small = memory.take(499)
    assert address(small) != first
    del small
    assert address(memory.take(500)) == first


def test_the_largest_pieces_are_kept():
    memory = ReusedMemory(1)
    pieces = [memory.take(size) for size in (1000, 3000, 2000)]
    for mark, piece in enumerate(pieces, 1):
        piece[0] = mark
    while pieces:
        piece = pieces.pop()
        del piece
    assert memory.take(1900)[0] == 2  # and a new one is zeros
    assert memory.take(900)[0] == 0


def test_what_is_lent_keeps_nothing_else():
    memory = ReusedMemory(8)
    pieces = [memory.take(1000) for _ in range(8)]
    held = pieces.pop()
    free = [weakref.ref(np.frombuffer(piece, np.uint8).base.obj.base) for piece in pieces]
    pieces.clear()
    assert all(one() is not None for one in free)
    del memory
    gc.collect()
    assert all(one() is None for one in free)
    assert len(held) == 1000


def test_threads_never_share_a_piece():
    memory = ReusedMemory(4)

    def use(number):
        for _ in range(300):
            piece = np.frombuffer(memory.take(4096), np.uint8)
            piece[:] = number
            assert bool((piece == number).all())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))


def test_a_folders_objects_stay_what_they_are_while_they_are_held(tmp_path):
    store = FolderStore(tmp_path, memory=ReusedMemory(8))
    for number in range(6):
        store.put(f"chunks/{number}", bytes([number]) * 1000)
    held = [store.get(f"chunks/{number}", max_bytes=1000) for number in range(6)]
    for number, data in enumerate(held):
        assert bytes(data) == bytes([number]) * 1000
    first = address(held.pop(0))
    assert address(store.get("chunks/3", max_bytes=1000)) == first
