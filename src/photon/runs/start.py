"""Starting and resuming runs: what the CLI and `import photon` call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from photon.config import RunConfig
from photon.config.clock import ClockConfig
from photon.config.load import load_clock
from photon.errors import ConfigError, ResumeMismatchError
from photon.federation import CheckpointStore
from photon.openmp import warn_of_spinning
from photon.runs.changes import check_overrides, config_to_go_on_with, leave_for_next
from photon.runs.folder import RunResult, finished_summary, only_process
from photon.runs.session import Session
from photon.store.run_folder import read_record, require_unused
from photon.telemetry import Listener
from photon.telemetry.events import Kind
from photon.training import Seat


def simulate(
    config: RunConfig,
    *,
    clock: ClockConfig | str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Run a whole federation on this machine.

    Args:
        config: the run file.
        clock: by which time is simulated while learning is real; a file of such, or its content.
        run_dir: the run folder; runs/<run.name> by default.
        listener: told every event; `photon.show_progress()` shows them.
        overwrite: replace a run that is in the folder already.

    Raises:
        PhotonError: see docs/errors.md; all checks that can be made are made before training.
    """
    if clock is not None and not isinstance(clock, ClockConfig):
        clock = load_clock(clock)
    return _start("simulate", config, None, run_dir, listener, overwrite, clock)


def train(
    config: RunConfig,
    *,
    silos: Sequence[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Train without a federation, on the pooled text of some silos: the centralised baseline.

    Args:
        silos: whose text; all by default. With a subset the default batch is that many times
            local.batch_size, so one silo alone takes the steps it would take in the federation.
    """
    return _start("train", config, silos, run_dir, listener, overwrite)


def resume(
    folder: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    listener: Listener | None = None,
) -> RunResult:
    """Continue a run from its newest good checkpoint, to the same weights as if never stopped.

    Args:
        folder: the run folder.
        overrides: of keys that leave the maths alone, or, on record, of keys that rounds to come
            may have otherwise (more `federation.rounds`, another `local.lr`): see
            photon.runs.changes. Schedules are then those of the new run file, read at the clock
            as it stands.

    Raises:
        RunNotFoundError: no run there.
        ResumeMismatchError: config or data are not those the run started with.
        ModelMismatchError: the checkpoint is of another model.
        CheckpointCorruptError: no checkpoint passes its hashes.
    """
    folder = Path(folder)
    record = read_record(folder)
    overrides = [overrides] if isinstance(overrides, str) else overrides
    check_overrides(overrides)
    config = config_to_go_on_with(folder, overrides)
    done = max(CheckpointStore(folder / "checkpoints", 1).rounds(), default=0)
    if config.most_rounds < done:
        raise ResumeMismatchError(
            f"federation.rounds = {config.federation.rounds}, and {done} rounds are done already",
            hint="Nothing that was trained is taken back; name that many or more.",
        )
    if record["kind"] == "serve":
        if overrides:
            with only_process(folder, served=True):
                leave_for_next(folder, config)
        raise ResumeMismatchError(
            f"the silos of {folder} are elsewhere"
            + ("; the run goes on with the new values" if overrides else ""),
            hint=f"Bring its services up again: `photon serve --resume {folder}`.",
        )
    finished = finished_summary(folder, config)
    if finished is not None:
        return RunResult(folder, finished)
    run = Session(record["kind"], config, record["silos"], folder, listener, begun=True)
    if Seat.from_environment().rank:
        run.follow()
        return RunResult(folder, {})
    _warn_if_slow(run)
    return run.execute(record)


def _start(
    kind: Kind,
    config: RunConfig,
    silos: Sequence[str] | None,
    run_dir: str | os.PathLike[str] | None,
    listener: Listener | None,
    overwrite: bool,
    clock: ClockConfig | None = None,
) -> RunResult:
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"a run needs a RunConfig, not {config!r:.80}",
            hint="photon.load_config(PATH) reads one, photon.build_config(TABLES) makes one.",
        )
    folder = Path(run_dir) if run_dir is not None else Path("runs") / config.run.name
    silos = [silos] if isinstance(silos, str) else silos
    chosen = list(silos) if silos is not None else None
    if Seat.from_environment().rank:
        Session(kind, config, chosen, folder, None).follow()
        return RunResult(folder, {})
    require_unused(folder, overwrite=overwrite)
    run = Session(kind, config, chosen, folder, listener, clock=clock)
    _warn_if_slow(run)
    return run.execute(None)


def _warn_if_slow(run: Session) -> None:
    if run.config.compute.device == "cpu":
        warn_of_spinning()
