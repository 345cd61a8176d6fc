"""Merkle trees (RFC 9162, section 2.1) over a log's lines: one hash of all, a short proof of each.

A leaf is a whole line, its newline included. Each signed line holds the root of all before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def leaf_hash(line: bytes) -> bytes:
    return hashlib.sha256(b"\0" + line).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


class Tree:
    """Grows a leaf at a time and keeps hashes of whole subtrees only: log2 of its size."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._whole: list[tuple[int, bytes]] = []  # leaves and hash, the largest first
        for leaf in leaves:
            self.add(leaf)

    def add(self, leaf: bytes) -> None:
        size = 1
        while self._whole and self._whole[-1][0] == size:
            leaf, size = _node(self._whole.pop()[1], leaf), 2 * size
        self._whole.append((size, leaf))

    @property
    def root(self) -> bytes:
        """Of no leaves, the sha256 of nothing."""
        *above, (_, root) = self._whole or [(0, hashlib.sha256().digest())]
        for _, left in reversed(above):
            root = _node(left, root)
        return root


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[str]:
    """Hashes that lead from leaf `index` (from 0) to the root, from below, hexadecimal."""
    if len(leaves) == 1:
        return []
    split = _split(len(leaves))
    left, right = leaves[:split], leaves[split:]
    mine, other, inside = (left, right, index) if index < split else (right, left, index - split)
    return [*inclusion_path(mine, inside), Tree(other).root.hex()]


def root_by_path(leaf: bytes, index: int, size: int, path: Sequence[str]) -> bytes:
    """The root of a tree of `size` leaves that such a path leads to; ValueError if it is none."""
    if not 0 <= index < size or (size == 1) != (not path):
        raise ValueError(f"no path from leaf {index} in a tree of {size}")
    if size == 1:
        return leaf
    split, other = _split(size), bytes.fromhex(path[-1])
    if index < split:
        return _node(root_by_path(leaf, index, split, path[:-1]), other)
    return _node(other, root_by_path(leaf, index - split, size - split, path[:-1]))


def _split(size: int) -> int:
    """Leaves on the left: the largest power of two below the size."""
    return 1 << (size - 1).bit_length() - 1
