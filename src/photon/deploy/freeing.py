"""What runs that are over left in a store, and the list of those that are to be freed of it.

serve.home/freeing.json names them, with where their objects lie. A run is noted there before its
folder goes, or once it is finished, and struck off when nothing of it can arrive any more: sweeps
that were interrupted go on at the next start, and so do those for an update that a site sent late.

Invariant: only keys under the id of a run that is noted are removed. It breaks if a run is noted
that is still to go on.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from photon.errors import DeployError, PhotonError
from photon.store.contract import Store
from photon.store.disk import write_json
from photon.store.garbage import free_run
from photon.store.object_store import open_store
from photon.store.served import Serving

FREEING_FILE = "freeing.json"
_EMBEDDED = "embedded"


@dataclass(frozen=True)
class Leftover:
    """A run whose objects are to go.

    Attributes:
        run_id: 32 hexadecimal digits.
        store: URL of the store; "embedded" for the one in this home.
        keep_last_state: whether its last published global state stays.
        until: seconds since the epoch when leave that its nodes were given to write runs out.
    """

    run_id: str
    store: str
    keep_last_state: bool
    until: float


def note_leftover(home: Path, serving: Serving, *, keep_last_state: bool, grant_s: float) -> None:
    """Have a run freed, by the serve that runs in `home` or the next one there.

    Args:
        home: of the serve that replaces or finished it.
        serving: of the run; one that never had a store left nothing.
        grant_s: for how long leave to write is valid.

    Raises:
        DeployError: the list can't be read, or written.
        DiskFullError: no room.
    """
    if not serving.store:
        return
    # The embedded store, and what it needs to be reached, is in the home that served the run.
    place = Path(serving.home) if serving.secrets is not None else home
    store = _EMBEDDED if serving.secrets is not None else serving.store
    if not place.is_dir():
        if serving.secrets is not None:
            return  # its store went with its home
        place.mkdir(parents=True, mode=0o700)
    noted = Leftover(serving.run_id, store, keep_last_state, time.time() + grant_s)
    with _changing(place) as leftovers:
        leftovers[serving.run_id] = noted


def leftovers(home: Path) -> list[Leftover]:
    """The runs that are to be freed. Raises DeployError for a list that can't be read."""
    return list(_read(home / FREEING_FILE).values())


def free_leftovers(
    home: Path,
    embedded: Store | None,
    *,
    tell: Callable[[str], None],
    but: str | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Free all runs that are noted, as far as their stores can be reached; says what it did.

    Args:
        home: serve.home.
        embedded: the store in it; None where it does not run.
        tell: told in words what was freed, and of trouble, which is no reason to stop.
        but: a run that is being served; left alone.
        go_on: False ends it early; the rest follows at the next start.
    """
    try:
        noted = leftovers(home)
    except DeployError as error:
        tell(f"what earlier runs left in the store stays: {error.message}")
        return
    for one in noted:
        if one.run_id == but or not go_on():
            continue
        if one.store == _EMBEDDED and embedded is None:
            continue  # it is freed once that store runs again
        try:
            store = embedded if one.store == _EMBEDDED else open_store(one.store)
            assert store is not None
            _free(home, one, store, tell, go_on)
        except (PhotonError, OSError) as error:
            words = error.message if isinstance(error, PhotonError) else str(error)
            tell(f"run {one.run_id} could not be freed, the next start tries again: {words}")


def _free(
    home: Path,
    one: Leftover,
    store: Store,
    tell: Callable[[str], None],
    go_on: Callable[[], bool],
) -> None:
    freed = free_run(store, one.run_id, keep_last_state=one.keep_last_state, go_on=go_on)
    if freed.objects or not freed.whole:
        left = "" if freed.whole else "; the rest follows at the next start"
        kept = ", its last global state stays" if one.keep_last_state else ""
        tell(
            f"freed {freed.objects:,} objects, {freed.bytes:,} bytes, of run {one.run_id} in "
            f"{store}{kept}{left}"
        )
    if freed.whole and time.time() > one.until:
        with _changing(home) as noted:
            noted.pop(one.run_id, None)


@contextmanager
def _changing(home: Path) -> Iterator[dict[str, Leftover]]:
    """The list, to be changed; one process at a time."""
    path = home / FREEING_FILE
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        noted = _read(path)
        yield noted
        record = {run_id: vars(one) for run_id, one in noted.items()}
        write_json(path, record, "the runs that are to be freed", mode=0o600)


def _read(path: Path) -> dict[str, Leftover]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {run_id: Leftover(**rest | {"run_id": run_id}) for run_id, rest in record.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DeployError(
            f"{path} can't be read: {error!r}",
            hint="It names runs that left objects in the store. Move it away, and they stay there.",
        ) from error
