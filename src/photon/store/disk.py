"""Disks: whether there is room, what a full one is called, when bytes are safe, small files whole.

Invariant: under the name given to `write_whole` lies what was there before, or all of the new
bytes, whatever ends the process or the machine. It breaks if a name is written to in any other way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from photon.errors import DiskFullError, PhotonError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Ends the name of a file that is being written beside the one it will replace.
_PARTIAL = ".partial"
#: Ends the name of a folder that another one takes the place of.
OLD = ".old"
#: No small file takes so long to write: what is older was left by a process that was killed.
_LEFT_BEHIND_S = 3600.0


@contextmanager
def held_alone(lock: Path, otherwise: PhotonError) -> Iterator[None]:
    """Hold a lock file, which goes with its process; whoever comes second gets `otherwise`."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise otherwise from None
        yield


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
                hint="Free space on that disk, then continue with `photon resume DIR`.",
            ) from error
        raise


def write_whole(path: Path, data: str | bytes, what: str, *, mode: int = 0o644) -> None:
    """Write a small file under its name at once: a reader sees the old one or the new one.

    It is made beside `path`, with its permissions from the first byte, and on disk when this
    returns. Nothing is left beside it when this fails; what a process that was killed left there is
    removed by a later call. Several may write the same file at once: one of them is the last.

    Args:
        path: its folder is made if need be.
        data: text is written as UTF-8.
        what: is being written, for the message.
        mode: permissions, less the umask; also where an older file there has others.

    Raises:
        DiskFullError: no room; what was there before is as it was.
        OSError: it can't be written, likewise.
    """
    content = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    with writing(what, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        put_whole(path, content, mode=mode)


def put_whole(
    path: Path, data: bytes | bytearray | memoryview, *, mode: int = 0o666, durable: bool = True
) -> None:
    """Bytes under a name at once, and on disk too if they are to be durable; raises OSError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_to_disk(path.parent)


def write_new(path: Path, data: str | bytes, what: str, *, mode: int = 0o644) -> None:
    """`write_whole` under a name that is free, however many write it at once; raises as it does.

    Raises:
        FileExistsError: there is a file already; it stays as it is.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        write_whole(partial, data, what, mode=mode)
        os.link(partial, path)  # unlike a rename, it replaces nothing
        sync_to_disk(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(
    path: Path, record: Mapping[str, Any], what: str = "a record", *, mode: int = 0o644
) -> None:
    """`write_whole` of a record as JSON, a line for each key; raises as it does.

    Raises:
        ValueError: a number that JSON has no word for.
    """
    text = json.dumps(dict(record), indent=1, allow_nan=False)
    write_whole(path, text + "\n", what, mode=mode)


def put_in_place(folder: Path, out: Path) -> None:
    """Rename a finished folder to `out`; what was there goes last, or comes back.

    A folder can't be swapped in one step everywhere: a kill between two renames leaves what was
    there beside it, as FOLDER.old.
    """
    old = folder.with_name(folder.name + OLD)
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_left_behind(path: Path) -> None:
    beside = f".{path.name}."
    for found in path.parent.iterdir():
        if found.name.startswith(beside) and found.name.endswith(_PARTIAL):
            with suppress(OSError):  # somebody else may have removed it, or be the one who writes
                if time.time() - found.stat().st_mtime > _LEFT_BEHIND_S:
                    found.unlink()


def require_disk(
    folder: Path,
    needed_bytes: int,
    what: str,
    hint: str = "Free space, choose another folder with --run-dir, or keep fewer checkpoints "
    "(run.keep_checkpoints).",
) -> None:
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
            hint=hint,
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
