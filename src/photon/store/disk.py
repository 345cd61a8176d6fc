"""Disks: whether there is room, what a full one is called, and when bytes are safe on it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from photon.errors import DiskFullError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turn a full disk into DiskFullError naming the file; `what` says what was being written."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        text = str(error)
        if code in _NO_ROOM or any(f"os error {known}" in text for known in _NO_ROOM):
            raise DiskFullError(
                f"no room to write {what} to {path}: {error}",
                hint="Free space on that disk, then continue with `photon resume`.",
            ) from error
        raise


def require_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Check room before work starts.

    Args:
        folder: where the files will go; its nearest existing parent is asked.
        needed_bytes: bytes that must be free.
        what: what needs them, for the message.

    Raises:
        DiskFullError: less is free; says how much of each.
    """
    here = folder
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    if free < needed_bytes:
        raise DiskFullError(
            f"{what} needs {needed_bytes / 1e9:.2f} GB at {folder}, {free / 1e9:.2f} GB are free",
            hint="Free space, choose another folder with --run-dir, or keep fewer checkpoints "
            "(run.keep_checkpoints).",
        )


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
