"""A folder that appears whole or not at all, whatever happens while it is being written."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from photon.store.disk import OLD


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write in; `store.disk.put_in_place` makes it `out`.

    It goes when the block ends, by an error or Ctrl-C too, and so do parents that were made for it.
    A process that is killed leaves it; the next one for the same `out` removes it. Which of them is
    in use shows by a lock that dies with its process, so two processes may prepare one `out` at
    once: the last to finish wins.
    """
    prefix = f".{out.name}.preparing-"
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out, prefix)
        folder, lock = _locked(out.parent, prefix)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    finally:
        for parent in missing:
            with suppress(OSError):  # it is in use
                parent.rmdir()


def _locked(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nobody will sweep there
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)
        # Another process swept it away before it was locked: make another.


def _sweep(out: Path, prefix: str) -> None:
    for left in sorted(out.parent.iterdir()):
        if not left.name.startswith(prefix) or not left.is_dir():
            continue
        if left.name.endswith(OLD) and not out.exists():
            continue  # a kill between two renames: this is the only copy of what `out` was
        try:
            lock = os.open(left, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # somebody is writing there
        finally:
            os.close(lock)
