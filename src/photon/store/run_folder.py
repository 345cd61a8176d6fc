"""Whether a folder may become a run's. No torch, so that it is known before that is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from photon.errors import RunError, RunExistsError
from photon.store.served import LOCKS


def holds_run(folder: Path) -> bool:
    return (folder / "run.json").exists() or (folder / "events.jsonl").exists()


def require_unused(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything else than, with `overwrite`, a run that is replaced.

    Raises:
        RunExistsError: it does.
        RunError: no folder can have that name, or be looked into there.
    """
    with usable(folder):
        begun = holds_run(folder)
        others = folder.exists() and any(path.name not in LOCKS for path in folder.iterdir())
    if begun and not overwrite:
        raise RunExistsError(
            f"{folder} already holds a run",
            hint=f"Continue it with `photon resume {folder}`, choose another --run-dir, or "
            "replace it with --overwrite.",
        )
    if others and not begun:
        raise RunExistsError(
            f"{folder} is not empty and holds no run", hint="Choose another --run-dir."
        )


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turn what the system says against a run folder's path into RunError, which names it."""
    try:
        str(folder.absolute()).encode()  # safetensors could not open what it wrote there
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, FileExistsError):
            reason = "a file, or a link that leads nowhere, has that name"
        elif isinstance(error, UnicodeError):
            reason = "its name is not UTF-8"
        raise RunError(
            f"{folder} can't be a run folder: {reason}",
            hint="Choose another --run-dir, on a disk that can be written.",
        ) from error
