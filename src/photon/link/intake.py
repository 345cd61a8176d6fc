"""Several parcels on their way here at once, each whole and verified before it is looked at."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from photon.errors import LinkError
from photon.link.manifest import Expected, Ref
from photon.link.parcel import Parcel
from photon.store.contract import Store
from photon.store.transfer import Transfer

_T = TypeVar("_T")


class Intake:
    """Fetches parcels ahead of who reads them, onto a local disk: memory does not grow with them.

    Args:
        store: where they are.
        spool: folder of this intake alone. What it holds of a parcel, from a process that died
            say, is not fetched again.
        ahead: parcels fetched while one is read.
        transfer: makes what moves chunks; each parcel on its way has one of its own.
    """

    def __init__(
        self,
        store: Store,
        spool: Path,
        *,
        ahead: int = 2,
        transfer: Callable[[Store], Transfer] = Transfer,
    ) -> None:
        self._store = store
        self._spool = spool
        self._ahead = ahead
        self._transfer = transfer

    def parcels(
        self, wanted: Iterable[tuple[_T, Ref, Expected]]
    ) -> Iterator[tuple[_T, Parcel | LinkError]]:
        """Parcels in the order asked for, each with what it was asked for with.

        `wanted` is read `ahead` entries beyond the one given. A parcel is valid until the next is
        asked for. One that can't be had or is refused comes as its error: others go on.
        """
        todo = iter(wanted)
        waiting: deque[tuple[_T, Path, Future[Parcel]]] = deque()
        with ThreadPoolExecutor(self._ahead + 1, thread_name_prefix="photon-intake") as pool:
            try:
                while True:
                    while len(waiting) <= self._ahead:
                        one = next(todo, None)
                        if one is None:
                            break
                        tag, ref, expected = one
                        folder = self._spool / ref.sha256
                        future = pool.submit(self._fetch, ref, expected, folder)
                        waiting.append((tag, folder, future))
                    if not waiting:
                        return
                    tag, folder, future = waiting.popleft()
                    try:
                        yield tag, future.result()
                    except LinkError as error:
                        yield tag, error
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                for _, _, future in waiting:
                    future.cancel()

    def _fetch(self, ref: Ref, expected: Expected, folder: Path) -> Parcel:
        parcel = Parcel(self._transfer(self._store), ref, expected)
        parcel.keep(folder)
        return parcel
