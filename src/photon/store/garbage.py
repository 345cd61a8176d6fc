"""Removing what no kept manifest names, and what a run that is over left: manifests, then chunks.

Invariant: at every moment, whatever a manifest in the store names is in the store. A crash between
the two steps leaves chunks that nobody names, and the next collection removes them. It breaks if a
chunk is promised to a writer (who finds it there and does not send it again) before its manifest is
there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from photon.errors import ManifestError
from photon.store.contract import Store

#: photon.federation.broadcast publishes there: whole states, and what leads from one to the next.
_PUBLISHED = re.compile(r"global/(state|outer_update)/round-(\d+)/[^/]+\.json")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
#: Removed between two looks at whether to go on.
_AT_ONCE = 500
#: No manifest of any model is longer.
_MOST_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Collected:
    """What `free_run` removed, manifests and chunks together.

    Attributes:
        whole: whether that was all there was to remove.
    """

    objects: int
    bytes: int
    whole: bool = True


def collect(
    store: Store,
    folder: str,
    *,
    keep: Callable[[str], bool],
    chunks_of: Callable[[str], Iterable[str]],
) -> None:
    """Remove what is not kept, then chunks that nothing kept names.

    Args:
        store: one that can list and delete.
        folder: of the run, in the store.
        keep: whether a key stays, which is a manifest's then; asked about all but FOLDER/chunks/,
            also about what was written just now.
        chunks_of: sha256 of each chunk that the manifest of a key names. Chunks that arrive while
            this runs stay in any case.

    Raises:
        LinkError: the store fails, or a kept manifest can't be read; nothing is removed then, or
            less than could be. Running it again is safe.
    """
    # Chunks are listed before manifests are read: one that arrives later is not in the list, and
    # one that is in it has its manifest by now, or is of an upload that was cut, or is under way.
    inside = f"{folder}/chunks/"
    chunks = [key for key, _ in store.keys(inside.rstrip("/"))]
    manifests = [key for key, _ in store.keys(folder) if not key.startswith(inside)]
    dropped = [key for key in manifests if not keep(key)]
    named = set[str]()
    for key in sorted({*manifests} - {*dropped}):
        named.update(chunks_of(key))
    unnamed = [key for key in chunks if key.removeprefix(inside) not in named]
    store.delete(dropped)
    store.delete(unnamed)


def free_run(
    store: Store,
    run_id: str,
    *,
    keep_last_state: bool,
    go_on: Callable[[], bool] = lambda: True,
) -> Collected:
    """Remove what a run that is over has in the store. No other key is touched, nor asked about.

    Running it again, after it was interrupted or for what came late, removes the rest.

    Args:
        store: one that can list and delete; others may have objects in it.
        run_id: 32 hexadecimal digits, the run's folder in the store.
        keep_last_state: leave what the last published global state is made of: the last whole one,
            and what leads on from there.
        go_on: asked between some hundred removals; False ends it early.

    Raises:
        ManifestError: `run_id` is none, or the manifest of a state that is to stay can't be read;
            nothing was removed then.
        LinkError: the store fails; less was removed than could be.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise ManifestError(
            f"{run_id[:100]!r} is no id of a run: nothing was removed from {store}",
            hint="A run's id has 32 hexadecimal digits; serve.json in its folder names it.",
        )
    folder = f"{run_id}/"
    found = [(key, size) for key, size in store.keys(run_id) if key.startswith(folder)]
    kept = _last_state(store, [key for key, _ in found], folder) if keep_last_state else set()
    going = [(key, size) for key, size in found if key not in kept]
    # Manifests first: whatever one names is there for as long as it is.
    going.sort(key=lambda entry: (not entry[0].endswith(".json"), entry[0]))
    objects = freed_bytes = 0
    for start in range(0, len(going), _AT_ONCE):
        if not go_on():
            return Collected(objects, freed_bytes, whole=False)
        some = going[start : start + _AT_ONCE]
        store.delete([key for key, _ in some])
        objects += len(some)
        freed_bytes += sum(size for _, size in some)
    return Collected(objects, freed_bytes)


def _last_state(store: Store, keys: Iterable[str], folder: str) -> set[str]:
    """Keys of the manifests and chunks that the last published global state is made of."""
    published = [
        (int(found[2]), found[1], key)
        for key in keys
        if (found := _PUBLISHED.fullmatch(key.removeprefix(folder)))
    ]
    whole = [number for number, kind, _ in published if kind == "state"]
    oldest = max(whole or [number for number, _, _ in published], default=0)
    kept: set[str] = set()
    for number, kind, key in published:
        if number > oldest or (number == oldest and (kind == "state" or not whole)):
            kept.add(key)
            kept.update(f"{folder}global/chunks/{sha256}" for sha256 in chunks_of(store, key))
    return kept


def chunks_of(store: Store, key: str) -> list[str]:
    """The sha256 of each chunk that a manifest in the store names, whoever wrote it.

    Raises:
        ManifestError: it is none.
        LinkError: the store is away or refuses, or has no such object.
    """
    size = store.size(key) or 0
    try:
        record = json.loads(bytes(store.get(key, max_bytes=min(size, _MOST_MANIFEST_BYTES))))
        return [str(chunk["sha256"]) for chunk in record["chunks"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ManifestError(
            f"{key} in {store} can't be read as a manifest: {error!r}",
            hint="Is that store damaged? Remove the run's folder there by hand once you have no "
            "more use for it.",
        ) from error
