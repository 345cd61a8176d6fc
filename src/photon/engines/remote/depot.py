"""A run's part of the store: the global state, the silos' updates, and those that are here.

RUN/global/         states, written by the aggregator
RUN/silos/SILO/     updates, written by that silo
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from photon.config import LinkConfig, RunConfig
from photon.errors import LinkError, ManifestError
from photon.federation import FitTask, Version
from photon.federation.tasks import GlobalState, StateRef, update_header
from photon.link import Expected, Parcel, Ref
from photon.secure.documents import MOST_BITS
from photon.store.contract import Store
from photon.store.garbage import chunks_of, collect
from photon.store.memory import ReusedMemory
from photon.store.transfer import Transfer

_STATE = re.compile(r"/round-(\d+)/[^/]+\.json$")


def global_folder(run_id: str) -> str:
    """Where a run's states lie in the store."""
    return f"{run_id}/global"


def silo_folder(run_id: str, silo: str) -> str:
    """Where a silo's updates lie in the store; it writes nowhere else."""
    return f"{run_id}/silos/{silo}"


class Depot:
    """Publishes states, fetches updates, and removes what no round needs any more.

    Args:
        run_id: of the run.
        config: which codecs its parcels may name; those of members that are federations too.
        store: the aggregator's own way to it.
        spool: folder for updates on their way to be merged; emptied, and closed to other users:
            what was verified as it came is read from there without being hashed again.
    """

    def __init__(self, run_id: str, config: RunConfig, store: Store, spool: Path) -> None:
        self._run_id = run_id
        links = [
            LinkConfig(update_codec=one.update_codec) for one in config.federation.children.values()
        ]
        self._specs = config.link.specs.union(*(link.specs for link in links))
        if config.privacy.secure_aggregation:
            self._specs = frozenset({f"ring(bits={bits})" for bits in range(8, MOST_BITS + 1)})
        self._store = store
        self._spool = spool
        self._memory = ReusedMemory()
        self._published: dict[Version, StateRef] = {}
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)
        spool.chmod(0o700)

    def published(self, version: Version) -> StateRef:
        """Where a version lies in the store; put there now, if it was not before.

        Raises:
            LinkError: the store can't be reached, refuses, or stalls.
        """
        if version not in self._published:
            assert version.publish is not None
            ref = version.publish(self._carrier(), global_folder(self._run_id))
            self._published = {version: ref}
        return self._published[version]

    def fetch(self, task: FitTask, ref: Ref, state: GlobalState) -> Parcel:
        """Bring an update here, verified.

        Raises:
            LinkError: it is not there, not what was promised, or the store is away.
        """
        parcel = self._parcel(task, ref, state)
        parcel.keep(self._place_of(ref))
        return parcel

    def tensors(
        self, parcel: Parcel, task: FitTask, ref: Ref, state: GlobalState
    ) -> Iterator[tuple[str, Tensor]]:
        """An update's tensors: from the spool while it is there, else from the store again."""
        here = self._place_of(ref).exists()
        yield from (parcel if here else self._parcel(task, ref, state)).tensors()

    def free_bytes(self) -> int:
        """Of the disk on which updates wait for their turn."""
        return shutil.disk_usage(self._spool).free

    def let_go(self, ref: Ref) -> None:
        """An update need not be here any more."""
        shutil.rmtree(self._place_of(ref), ignore_errors=True)

    def discard(self, silo: str) -> None:
        """Remove what a silo has in the store, so that it sends it again.

        An object that is there is never written again, damaged or not.
        """
        folder = silo_folder(self._run_id, silo)
        with contextlib.suppress(LinkError):
            self._store.delete([key for key, _ in self._store.keys(folder)])

    def sweep(self, silos: Iterable[str], *, oldest: int, accepted: Collection[str]) -> None:
        """Remove states of rounds before `oldest`, and of silos all that no accepted answer names.

        Args:
            accepted: keys of the updates that are still needed.

        Raises:
            LinkError, OSError: the store is away or refuses; the next sweep finds it again.
        """
        keeps: dict[str, Callable[[str], bool]] = {
            global_folder(self._run_id): lambda key: _round_of(key) >= oldest or "/once/" in key
        }
        keeps |= {silo_folder(self._run_id, silo): accepted.__contains__ for silo in silos}
        for folder, keep in keeps.items():
            collect(self._store, folder, keep=keep, chunks_of=self._chunks_of)

    def close(self) -> None:
        shutil.rmtree(self._spool, ignore_errors=True)

    def _place_of(self, ref: Ref) -> Path:
        """Where an update lies while it is here."""
        return self._spool / ref.sha256

    def _parcel(self, task: FitTask, ref: Ref, state: GlobalState) -> Parcel:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        expected = Expected(update_header(task, state), shapes, self._specs)
        return Parcel(self._carrier(), ref, expected, self._memory)

    def _carrier(self) -> Transfer:
        return Transfer(self._store, streams=4)

    def _chunks_of(self, key: str) -> list[str]:
        """The chunks that a manifest in the store names."""
        try:
            return chunks_of(self._store, key)
        except ManifestError:
            return []  # whoever needs it is told when it is fetched


def _round_of(key: str) -> int:
    """Of a state's manifest: FOLDER/<kind>/round-000012/NAME.json; -1 for any other key."""
    found = _STATE.search(key)
    return int(found[1]) if found else -1
