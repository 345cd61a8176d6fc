"""One file that an aggregator can be brought up from again elsewhere, made while it runs.

A tar archive: home/ and run/ as they lay, and last backup.json, which names every file's sha256 and
what is not in it. What is in one backup fits together whatever goes on meanwhile: the newest
checkpoint is opened first, so that roster, audit log and events, which are read after it, know of
its round; what they know of later ones a resume takes back, as after a checkpoint that was lost.

Invariant: nothing is written under a home's name before every byte of the archive was compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import TypeAdapter

from photon.config import load_run_config, write_resolved
from photon.deploy.supervisor import runner
from photon.errors import DeployError, RunExistsError
from photon.membership.roster import ROSTER_FILE, RUN_SETTING, Roster, roster_at
from photon.membership.roster_file import ROSTER_FILES
from photon.store.disk import require_disk, sync_to_disk, writing
from photon.store.served import LOCKS, RUN_FILE, SERVE_FILE, Serving
from photon.version import photon_version

MANIFEST = "backup.json"
#: In a home: Supervisor's record, and what a start makes anew.
_HOME_LEFT_OUT = {"serve.json", "logs", "door", "store"}
#: In a run folder: besides locks and checkpoints, what a resume does not read.
_RUN_LEFT_OUT = {*LOCKS, "arrivals", "tensorboard", "checkpoints"}
_ENDS_LEFT_OUT = (".lock", ".sock", "-wal", "-shm", ".partial")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Backup:
    """backup.json.

    Attributes:
        made_at: seconds since the epoch.
        run: the run folder's name; None of a home that has served none.
        round: of the checkpoint in it; 0 before the first.
        references: what the run needs and the file does not hold, by what it is.
        files: sha256 of each file in it.
    """

    made_at: float
    photon_version: str
    run: str | None
    round: int
    references: dict[str, str]
    files: dict[str, str]


def back_up(home: Path, out: Path, *, with_store: bool = False) -> Backup:
    """Write a home, and the run that it served last, to one file that only this user may read.

    Args:
        home: of an aggregator, which may run meanwhile.
        out: must not be there.
        with_store: with the embedded store's objects; nobody may serve from the home then.

    Raises:
        MembershipError: no aggregator's home.
        DeployError: there is such a file, or the store is in use.
        DiskFullError: no room; nothing is left behind.
    """
    if out.exists():
        raise DeployError(f"{out} is there already", hint="Name another file.")
    if with_store and runner(home / "serve.json") is not None:
        raise DeployError(
            f"the store in {home} is in use, and its files can't be copied whole",
            hint="Stop serving first (`photon stop`); or leave --with-store away: states are then "
            "published again from the checkpoint, and silos send again what they finished.",
        )
    with roster_at(home) as roster:
        served = roster.setting(RUN_SETTING)
    run = Path(served) if served is not None and (Path(served) / SERVE_FILE).exists() else None
    partial = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        with writing("the backup", out), contextlib.ExitStack() as ends:
            file = ends.enter_context(os.fdopen(os.open(partial, _NEW, 0o600), "wb"))
            tar = ends.enter_context(tarfile.open(fileobj=file, mode="w|"))
            number, checkpoint = _newest_checkpoint(run, ends) if run is not None else (0, {})
            made = Backup(time.time(), photon_version(), run and run.name, number, {}, {})
            _add_roster(tar, home, made)
            _add_checkpoint(tar, checkpoint, made)
            if run is not None:
                made.references.update(_references(run))
                if with_store and not load_run_config(run / RUN_FILE).serve.store:
                    del made.references["store"]
                _add_folder(tar, run, "run", _RUN_LEFT_OUT, made)
            left_out = _HOME_LEFT_OUT - {"store"} if with_store else _HOME_LEFT_OUT
            _add_folder(tar, home, "home", left_out, made, but=run)
            _add_bytes(tar, MANIFEST, json.dumps(asdict(made), indent=1).encode(), None)
        sync_to_disk(partial)
        os.link(partial, out)  # unlike a rename, it replaces nothing
        sync_to_disk(out.absolute().parent)
    except FileExistsError as error:
        raise DeployError(f"{out} is there already", hint="Name another file.") from error
    finally:
        partial.unlink(missing_ok=True)
    return made


def restore(file: Path, home: Path, run: Path | None = None) -> tuple[Backup, Path | None]:
    """Bring a home, and its run folder, back from a backup; all of it is compared first.

    Args:
        home: to be made; may be an empty folder.
        run: likewise; runs/NAME by default.

    Returns:
        what the backup says, and where its run is.

    Raises:
        DeployError: the file is damaged or none of ours, or the home is in use; nothing is changed.
        RunExistsError: the run's folder is in use, likewise.
        DiskFullError: no room.
    """
    made = verified(file)
    place = None if made.run is None else (run or Path("runs") / Path(made.run).name).absolute()
    home = home.absolute()
    if place is not None and (place.is_relative_to(home) or home.is_relative_to(place)):
        raise DeployError(f"{place} and {home} lie in each other", hint="Choose another --run-dir.")
    if runner(home / "serve.json") is not None:
        raise DeployError(f"a `photon serve` runs in {home}", hint="Choose another --home.")
    if home.exists() and any(home.iterdir()):
        raise DeployError(f"{home} is not empty", hint="Choose another --home.")
    if place is not None and place.exists() and any(place.iterdir()):
        raise RunExistsError(f"{place} is not empty", hint="Choose another --run-dir.")
    folders = {"home": home} if place is None else {"home": home, "run": place}
    for folder in folders.values():
        require_disk(folder, file.stat().st_size, "what the backup holds", "Free space.")
    fresh = {kind: to.with_name(f".{to.name}.restoring") for kind, to in folders.items()}
    try:
        for new in fresh.values():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True, mode=0o700)
        with writing("what the backup holds", home):
            for name, one, mode in _members(file):
                kind, _, rest = name.partition("/")
                if kind in fresh:
                    _write(fresh[kind] / rest, one, mode)
        with Roster(fresh["home"] / ROSTER_FILE) as roster:
            roster.set_setting(RUN_SETTING, str(place) if place is not None else None)
        if place is not None:
            new = fresh["run"]
            replace(Serving.read(new), home=str(home)).write(new)
            config = load_run_config(new / RUN_FILE, [f"serve.home={home}"])
            write_resolved(config, new / RUN_FILE)
        for kind in reversed(folders):  # the home last: whoever finds it finds the run
            fresh[kind].rename(folders[kind])  # over an empty folder, or none
    finally:
        for new in fresh.values():
            shutil.rmtree(new, ignore_errors=True)
    return made, place


def verified(file: Path) -> Backup:
    """What a backup says of itself, once each byte in it was compared.

    Raises:
        DeployError: it is damaged, or none.
    """
    found: dict[str, str] = {}
    last = b""
    try:
        for name, one, _ in _members(file):
            if name == MANIFEST:
                last = one.read()
                continue
            top, *rest = PurePosixPath(name).parts or ("",)
            if top not in ("home", "run") or not rest or ".." in rest or name in found:
                raise ValueError(f"an entry {name[:200]!r}")
            found[name] = hashlib.file_digest(one, "sha256").hexdigest()
        made = TypeAdapter(Backup).validate_json(last)
    except (OSError, ValueError, TypeError, tarfile.TarError, EOFError) as error:
        raise DeployError(
            f"{file} is no whole backup of an aggregator: {error}",
            hint="Nothing was changed. Copy it again from where it was made, and compare.",
        ) from error
    if wrong := sorted(name for name, _ in found.items() ^ made.files.items()):
        raise DeployError(
            f"{file} is damaged: {wrong[0]} is not what was backed up",
            hint="Nothing was changed. Use another copy.",
        )
    return made


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def _newest_checkpoint(
    run: Path, ends: contextlib.ExitStack
) -> tuple[int, Mapping[str, IO[bytes]]]:
    """Its round, and its files, open: what is removed meanwhile can be read to its end."""
    while folders := sorted((run / "checkpoints").glob("round-*")):
        newest = folders[-1]
        with contextlib.suppress(FileNotFoundError):  # pruned just now: there is a newer one
            opened: dict[str, IO[bytes]] = {
                f"run/checkpoints/{newest.name}/{path.name}": ends.enter_context(path.open("rb"))
                for path in sorted(newest.iterdir())
            }
            if newest.exists():
                return int(newest.name.removeprefix("round-")), opened
    return 0, {}


def _add_checkpoint(
    tar: tarfile.TarFile, checkpoint: Mapping[str, IO[bytes]], made: Backup
) -> None:
    """With the hashes that it says of itself compared: a backup of a damaged one is none."""
    hashes: dict[str, str] = {}
    for name, file in checkpoint.items():
        _add(tar, name, file, made)
        if name.endswith("/state.json"):
            file.seek(0)
            under = name.removesuffix("state.json")
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                hashes = {f"{under}{one}": sha for one, sha in json.load(file)["files"].items()}
    if checkpoint and not (hashes and hashes.items() <= made.files.items()):
        raise DeployError(
            f"the checkpoint of round {made.round} changed meanwhile, or is damaged",
            hint="Try again. If it is so again, see `photon audit RUN`.",
        )


def _references(run: Path) -> dict[str, str]:
    config = load_run_config(run / RUN_FILE)
    names = ("certificate", "key", "ca")
    own = {name: getattr(config.serve, name) for name in names}
    store = config.serve.store or "the embedded one, in the old home"
    return {"data": config.data.path, "store": store} | {
        name: value for name, value in own.items() if value is not None
    }


def _add_roster(tar: tarfile.TarFile, home: Path, made: Backup) -> None:
    """As it is at one moment, whoever writes to it."""
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=home) as folder:  # private, as home is
        with roster_at(home) as roster, roster.together():  # nobody else writes meanwhile
            for name in ROSTER_FILES:
                with (
                    contextlib.closing(sqlite3.connect(home / name, timeout=30)) as source,
                    contextlib.closing(sqlite3.connect(Path(folder) / name)) as target,
                ):
                    source.backup(target)
                    target.execute("PRAGMA journal_mode = DELETE")  # one file
        for name in ROSTER_FILES:
            (Path(folder) / name).chmod(0o600)
            with (Path(folder) / name).open("rb") as file:
                _add(tar, f"home/{name}", file, made)


def _add_folder(
    tar: tarfile.TarFile,
    folder: Path,
    under: str,
    left_out: set[str],
    made: Backup,
    but: Path | None = None,
) -> None:
    for path in sorted(folder.rglob("*")):
        within = path.relative_to(folder)
        name = f"{under}/{within.as_posix()}"
        ours = within.parts[0] in left_out or path.name.endswith(_ENDS_LEFT_OUT)
        inside = but is not None and path.absolute().is_relative_to(but.absolute())
        if ours or inside or within.parts[0].startswith(".") or name in made.files:
            continue
        if not path.is_file() or path.is_symlink():
            continue
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if path.suffix == ".jsonl":  # it grows, by whole lines
                data = file.read()
                _add_bytes(tar, name, data[: data.rfind(b"\n") + 1], made)
            else:
                _add(tar, name, file, made)


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], made: Backup) -> None:
    state = os.fstat(file.fileno())
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = state.st_size, state.st_mode & 0o777, int(state.st_mtime)
    hashed = _Hashed(file)
    tar.addfile(info, hashed)  # type: ignore[arg-type]
    made.files[name] = hashed.sha256.hexdigest()


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes, made: Backup | None) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
    tar.addfile(info, io.BytesIO(data))
    if made is not None:
        made.files[name] = hashlib.sha256(data).hexdigest()


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def _members(file: Path) -> Iterator[tuple[str, Any, int]]:
    """Each file of an archive: its name, its bytes to read, its mode. Nothing else is in one."""
    with tarfile.open(file, mode="r|") as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            if content is None:
                raise ValueError(f"an entry {info.name[:200]!r} that is no file")
            yield info.name, content, info.mode & 0o777


def _write(path: Path, content: IO[bytes], mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, _NEW, mode), "wb") as file:
        shutil.copyfileobj(content, file, _CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())
