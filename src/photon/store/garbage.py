"""Removing what no kept manifest names: manifests first, then chunks.

Invariant: at every moment, whatever a manifest in the store names is in the store. A crash between
the two steps leaves chunks that nobody names, and the next collection removes them. It breaks if a
chunk is promised to a writer (who finds it there and does not send it again) and is not in
`in_use`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from photon.store.contract import Store

_MANIFEST = re.compile(r"[^/]+/round-\d+/[^/]+\.json")


@dataclass(frozen=True)
class Collected:
    """What was removed, manifests and chunks together."""

    objects: int
    bytes: int


def collect(
    store: Store,
    folder: str,
    *,
    keep: Callable[[str], bool],
    chunks_of: Callable[[str], Iterable[str]],
    in_use: Collection[str] = (),
) -> Collected:
    """Remove manifests that are not kept, then chunks that no kept manifest names.

    Objects that are neither FOLDER/chunks/... nor FOLDER/<kind>/round-.../....json stay.

    Args:
        store: one that can list and delete.
        folder: of the run, in the store.
        keep: whether the manifest of a key stays; also asked about those written just now.
        chunks_of: sha256 of each chunk that the manifest of a key names.
        in_use: sha256 of chunks that stay though no manifest names them yet: those of uploads
            under way. Chunks that arrive while this runs stay in any case.

    Raises:
        LinkError: the store fails, or a kept manifest can't be read; nothing is removed then, or
            less than could be. Running it again is safe.
    """
    # Chunks are listed before manifests are read: one that arrives later is not in the list, and
    # one that is in it either has its manifest by now or is in use.
    chunks = {key.rpartition("/")[2]: (key, size) for key, size in store.keys(f"{folder}/chunks")}
    manifests = [
        (key, size)
        for key, size in store.keys(folder)
        if _MANIFEST.fullmatch(key.removeprefix(f"{folder}/"))
    ]
    dropped = [(key, size) for key, size in manifests if not keep(key)]
    going = {key for key, _ in dropped}
    named = set(in_use)
    for key, _ in manifests:
        if key not in going:
            named.update(chunks_of(key))
    unnamed = [entry for sha256, entry in chunks.items() if sha256 not in named]

    store.delete([key for key, _ in dropped])
    store.delete([key for key, _ in unnamed])
    return Collected(
        objects=len(dropped) + len(unnamed),
        bytes=sum(size for _, size in dropped) + sum(size for _, size in unnamed),
    )
