"""Another value for a key of a run that has begun: on purpose, and on record.

What was trained stays as it is; rounds to come follow the new run file. RUN/config.resolved.toml is
always the one that holds now, RUN/config.until-round-000003.toml one that held up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from photon.config import RunConfig, load_run_config, write_resolved
from photon.config.children import mechanisms
from photon.errors import ResumeMismatchError
from photon.store.disk import write_whole

RESOLVED = "config.resolved.toml"
#: What the next process of a served run is to go on with, if it is not what RESOLVED says.
_NEXT = "config.next.toml"

#: Changing these does not alter rounds that were run already. Device and threads change how later
#: rounds round, so a run that changes them no longer reaches the very same bits.
RESUMABLE_KEYS = (
    "federation.workers",
    "federation.silence_s",
    "federation.quorum",
    "run.keep_checkpoints",
    "run.log_every",
    "compute.device",
    "compute.threads",
    "eval.every",
    "data.path",
    "energy.network_kwh_per_gb",
    "energy.carbon_g_per_kwh",
)

#: What rounds to come may do otherwise: all that a run keeps (weights, optimizer states, cursors,
#: the clock) means the same under any value.
CHANGEABLE_KEYS = (
    "federation.rounds",
    "federation.sample",
    "federation.sampling",
    "federation.weighting",
    "federation.trim",
    "federation.clip_update_norm",
    "federation.anomaly_z",
    "federation.max_update_norm",
    "local.lr",
    "local.min_lr_ratio",
    "local.adamw_lr_ratio",
    "local.schedule",
    "local.warmup_steps",
    "local.decay_steps",
    "local.weight_decay",
    "local.clip_norm",
    "local.z_loss",
    "outer.lr",
    "outer.momentum",
    "outer.beta1",
    "outer.beta2",
    "outer.epsilon",
    "link.feedback_decay",
    "train.lr",
)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise ResumeMismatchError for a key whose change would make the run's state meaningless."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in RESUMABLE_KEYS + CHANGEABLE_KEYS:
            raise ResumeMismatchError(
                f"{key} can't change in a run that has begun: what the run keeps was made by it",
                hint="A resume may set, without changing the maths: "
                f"{', '.join(RESUMABLE_KEYS)}; and, on record, for the rounds to come: "
                f"{', '.join(CHANGEABLE_KEYS)}. For anything else start a new run.",
            )


def config_to_go_on_with(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file of a run's next process.

    Raises:
        ResumeMismatchError: other rounds, for which other noise would have been needed.
    """
    waiting = folder / _NEXT
    file = waiting if waiting.exists() else folder / RESOLVED
    config = load_run_config(file, overrides)
    if any(one.target_epsilon for one in mechanisms(config)):
        before, now = load_run_config(file).federation.rounds, config.federation.rounds
        if now != before:
            raise ResumeMismatchError(
                f"federation.rounds can't become {now}: noise was sized for "
                f"privacy.target_epsilon over {before}",
                hint="Start a new run; with privacy.noise_multiplier its rounds may change.",
            )
    return config


def leave_for_next(folder: Path, config: RunConfig) -> None:
    """Have the next process of a served run go on with this run file."""
    write_resolved(config, folder / _NEXT)


def changes(folder: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Values on record, by key, that are not what they were: (before, now)."""
    old, new = load_run_config(folder / RESOLVED).model_dump(), config.model_dump()
    changed: dict[str, tuple[Any, Any]] = {}
    for name in CHANGEABLE_KEYS:
        table, _, key = name.partition(".")
        if old[table][key] != new[table][key]:
            changed[name] = (old[table][key], new[table][key])
    return changed


def go_on_with(folder: Path, config: RunConfig, number: int, *, changed: bool) -> None:
    """Make `config` the run's.

    Args:
        number: rounds completed.
        changed: whether it differs on record: the old one is kept then, and the run not over.
    """
    if changed:
        until = folder / f"config.until-round-{number:06d}.toml"
        if not until.exists():  # else no round was run by what is changed again
            write_whole(until, (folder / RESOLVED).read_bytes(), "the run file of earlier rounds")
        (folder / "summary.json").unlink(missing_ok=True)
    write_resolved(config, folder / RESOLVED)
    (folder / _NEXT).unlink(missing_ok=True)
