"""Whether a folder may become a run's, and what one began as; no torch, which is slow to load."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from photon.errors import ResumeMismatchError, RunError, RunExistsError, RunNotFoundError, some
from photon.store.served import LOCKS
from photon.version import photon_version

#: Of run.json. 3: a state has its roles, clock and order of merges (photon.federation.layout).
RUN_FORMAT = 3


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


def read_record(folder: Path) -> dict[str, Any]:
    """What a run wrote down when it began: run.json.

    Raises:
        RunNotFoundError: no run there.
        ResumeMismatchError: another version's, whose run file and checkpoints this one can't read.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(one.parent.name for one in folder.glob("*/run.json"))
        hint = "Name a folder that `photon simulate` or `photon train` made."
        hint = f"There are runs in it: {some(inside, 8)}." if inside else hint
        raise RunNotFoundError(f"no run in {folder}: {path} does not exist", hint=hint) from None
    except (OSError, ValueError) as error:
        raise RunNotFoundError(f"can't read {path}: {error}") from error
    if record.get("format") != RUN_FORMAT:
        begun = record.get("photon_version", "another version")
        raise ResumeMismatchError(
            f"{folder} is a run of format {record.get('format')}, begun by Photon {begun}; "
            f"this is Photon {photon_version()}, which reads format {RUN_FORMAT}",
            hint="Finish or export it with the version that began it. A new run may start from the "
            'exported model: model.path, and model.init = "pretrained".',
        )
    return record
