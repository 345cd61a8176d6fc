"""The folder of a served run: made, opened again, and how far its run has come. No torch."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from photon.config import RunConfig, load_run_config, write_resolved
from photon.deploy.freeing import note_leftover
from photon.errors import RunExistsError, RunNotFoundError
from photon.store.served import LOCKS, RUN_FILE, SERVE_FILE, Serving

#: Keys that a start may change, as they begin.
_MAY_CHANGE = ("serve.", "comply.", "data.path=")
#: How much of the end of events.jsonl is read for the round that a run is in.
_TAIL_BYTES = 1 << 18


def prepare_run(config: RunConfig, folder: Path, *, overwrite: bool = False) -> None:
    """Make a run folder for a new run: the run file, whose paths are whole, and its id.

    Called while the run is held (`Aggregator.run`): what is there may be another's, at work.

    Raises:
        RunExistsError: the folder holds a run, or something else.
    """
    if (folder / "run.json").exists() or (folder / SERVE_FILE).exists():
        if not overwrite:
            raise RunExistsError(
                f"{folder} already holds a run",
                hint=f"Go on with it: `photon serve --resume {folder}`; or choose another "
                "--run-dir, or replace it with --overwrite.",
            )
        # Before the folder goes, which alone says what is its in the store.
        with contextlib.suppress(RunNotFoundError):
            note_leftover(
                Path(config.serve.home).absolute(),
                Serving.read(folder),
                keep_last_state=False,
                grant_s=config.serve.grant_s,
            )
        for path in folder.iterdir():
            if path.name not in LOCKS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif folder.exists() and any(path.name not in LOCKS for path in folder.iterdir()):
        raise RunExistsError(
            f"{folder} is not empty and holds no run", hint="Choose another --run-dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config, folder / RUN_FILE)
    Serving(secrets.token_hex(16), config.serve.home, "", {}).write(folder)


def reopen_run(folder: Path, overrides: list[str] | None = None) -> RunConfig:
    """The run file of a run that was served before; some of it may change (_MAY_CHANGE).

    It is read only; what changed is written once the run is held (`Aggregator.run`).

    Raises:
        RunNotFoundError: no served run there.
    """
    if not (folder / SERVE_FILE).exists():
        raise RunNotFoundError(
            f"no served run in {folder}: there is no {folder / SERVE_FILE}",
            hint="Name the run folder of an earlier `photon serve`.",
        )
    # Of the data itself nothing changes: its sha256 is compared before the run goes on.
    changed = [one for one in overrides or [] if not one.strip().startswith(_MAY_CHANGE)]
    if changed:
        raise RunExistsError(
            f"{changed[0].partition('=')[0].strip()} can't change in a run that has begun",
            hint="Only data.path and keys of [serve] and [comply] can; else start a new run.",
        )
    return with_whole_paths(load_run_config(folder / RUN_FILE, overrides or []))


def progress_of(folder: Path) -> dict[str, Any]:
    """The newest round of a run and its last evaluation, from the end of its events."""
    found: dict[str, Any] = {}
    try:
        with (folder / "events.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return found
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            name = event.get("event")
            if name == "round_started":
                found["in_round"] = event["round"]
                found["participants"] = event["participants"]
            elif name == "round_finished":
                found["round"] = event["round"]
                found["in_round"] = None
                found["dropped"] = event.get("dropped", [])
            elif name == "evaluated" and event.get("silo") is None:
                found["perplexity"] = event["perplexity"]
            elif name in ("run_stopped", "run_finished"):
                found["last"] = event.get("reason", "finished")
    return found


def with_whole_paths(config: RunConfig) -> RunConfig:
    """The same, with paths that hold wherever a process of the run starts."""
    paths = {
        "data": ("path",),
        "serve": ("home", "certificate", "key", "ca", "parent"),
        "comply": ("cards", "law"),
    }
    whole: dict[str, Any] = {}
    for name, keys in paths.items():
        section = getattr(config, name)
        given = {key: getattr(section, key) for key in keys if getattr(section, key) is not None}
        whole[name] = {key: str(Path(value).absolute()) for key, value in given.items()}
    return config.having(**whole)


def how_it_ended(folder: Path) -> str:
    """For every silo's screen: what came out, and where it is."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        rounds, perplexity = summary["rounds"], summary["global_perplexity"]
    except (OSError, ValueError, LookupError, TypeError):
        return "the run is over"
    came_to = "diverged" if perplexity is None else f"held-out perplexity {perplexity:.4g}"
    return f"the run is over: {rounds} rounds, {came_to}; its operator has the model"
