"""A run on disk: one atomic checkpoint a round, hashed, the oldest pruned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from photon.errors import CheckpointCorruptError, RunNotFoundError
from photon.link import TensorFile, write_tensors
from photon.store.disk import file_sha256, put_whole, sync_to_disk, writing

FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Everything but tensors that the next round needs.

    Sampling, data order, dropout and schedule are functions of (seed, round, step), so no RNG
    state is among it.

    Attributes:
        round: rounds completed.
        global_step: the server's clock.
        node_rounds: silo -> round after which its newest committed node state was saved.
        cursors: silo -> first sequence of its stream that it was not asked to train on yet.
        model_fingerprint: of the shapes that the tensors belong to.
        data_sha256: of the prepared data the run started with.
        outer_update_bytes: of the newest outer update on the wire; 0 where whole states travel.
        merged_norm: how large updates usually are, by the newest round (norm_bound.usual_norm).
        merged_lr_sum: the learning rates of that round's steps, added up.
        speeds: local steps a second, by silo: a running mean of what was measured.
        merged: silo -> round of the task whose update the newest round merged.
        quorum_s: after how long a quorum had answered: a running mean.
        in_flight: tasks that were handed in and not answered, as `Federation.in_flight` has them.
        clock: of an engine whose time is simulated.
        tokens_lost: were trained, or were to be, and not merged.
        good_s, exposed_s: of all silos together, on updates that were merged: in local steps, and
            with the version and the update on their way while nothing was trained.
        bytes_inside: that groups' members received and sent.
        energy: fields of the Spent of all answers and of the aggregator; energy_untold: answers
            without figures; witness_j: the joules of `energy`, counted another way.
        first_loss: of the global model before the first round.
        epsilon: silo -> what its text has spent in this run (fields of an Epsilon); None: no bound.
        ranges: by tensor, the largest magnitude that sealed updates may have next (photon.secure).
        clip_norm: that they are clipped to next, where that adapts; 0 before the first round.
    """

    round: int = 0
    global_step: int = 0
    model_fingerprint: str = ""
    data_sha256: str = ""
    node_rounds: dict[str, int] = field(default_factory=dict)
    cursors: dict[str, int] = field(default_factory=dict)
    total_tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    local_train_s: float = 0.0
    elapsed_s: float = 0.0
    outer_update_bytes: int = 0
    merged_norm: float = 0.0
    merged_lr_sum: float = 0.0
    speeds: dict[str, float] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    quorum_s: float = 0.0
    in_flight: list[dict[str, Any]] = field(default_factory=list)
    clock: dict[str, Any] = field(default_factory=dict)
    tokens_lost: int = 0
    good_s: float = 0.0
    exposed_s: float = 0.0
    bytes_inside: int = 0
    energy: dict[str, Any] = field(default_factory=dict)
    energy_untold: int = 0
    witness_j: float = 0.0
    first_loss: float | None = None
    ranges: dict[str, float] = field(default_factory=dict)
    clip_norm: float = 0.0
    epsilon: dict[str, Any] = field(default_factory=dict)


class CheckpointStore:
    """DIR/checkpoints/round-000012/{state.json, <group>.safetensors}.

    A folder of that name is complete: it is written under another name, flushed to disk and
    renamed. state.json holds the sha256 of every tensor file.

    Args:
        folder: DIR/checkpoints.
        keep: newest checkpoints kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, state: RunState, groups: Mapping[str, Mapping[str, Tensor]]) -> int:
        """Write a checkpoint and prune old ones; returns its payload bytes.

        Raises:
            DiskFullError: no room; the checkpoints that were there stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / _name(state.round)
        partial = self.folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        size = 0
        try:
            with writing("a checkpoint", final):
                partial.mkdir()
                for group, tensors in groups.items():
                    size += write_tensors(partial / f"{group}.safetensors", tensors)
                hashes = {
                    f"{group}.safetensors": file_sha256(partial / f"{group}.safetensors")
                    for group in groups
                }
                record = {"format": FORMAT, "files": hashes, **asdict(state)}
                put_whole(partial / "state.json", json.dumps(record, indent=1).encode())
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                sync_to_disk(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.rounds()[: -self._keep]:
            shutil.rmtree(self.folder / _name(old), ignore_errors=True)
        return size

    def rounds(self) -> list[int]:
        """Rounds with a complete checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name[6:]) for path in self.folder.glob("round-*") if path.is_dir())

    def states(self, *numbers: int) -> list[RunState]:
        """Of the checkpoints after these rounds, as far as they can be read."""
        found = []
        for number in numbers:
            try:
                found.append(self._read_state(number)[0])
            except CheckpointCorruptError:
                continue
        return found

    def load(self, number: int) -> tuple[RunState, dict[str, dict[str, Tensor]]]:
        """The checkpoint after a round.

        Raises:
            CheckpointCorruptError: it is missing, or not what was written.
        """
        state, hashes = self._read_state(number)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, expected in hashes.items():
            path = self.folder / _name(number) / name
            if not path.is_file():
                raise CheckpointCorruptError(f"{path} is missing")
            found = file_sha256(path)
            if found != expected:
                raise CheckpointCorruptError(
                    f"{path} has sha256 {found[:12]}..., its state.json says {expected[:12]}..."
                )
            with TensorFile(path) as file:
                groups[path.stem] = file.read()
        return state, groups

    def load_latest(self) -> tuple[RunState, dict[str, dict[str, Tensor]], list[str]]:
        """The newest checkpoint whose files pass their hashes.

        Returns:
            its state, its tensor groups, and what was wrong with newer ones (empty mostly).

        Raises:
            RunNotFoundError: there is none at all.
            CheckpointCorruptError: none passes.
        """
        problems: list[str] = []
        for number in reversed(self.rounds()):
            try:
                return *self.load(number), problems
            except CheckpointCorruptError as error:
                problems.append(error.message)
        if not problems:
            raise RunNotFoundError(f"no checkpoint under {self.folder}")
        raise CheckpointCorruptError(
            "no checkpoint of this run can be read:\n" + "\n".join(problems),
            hint="Restore the run folder from a backup, or start the run again.",
        )

    def _read_state(self, number: int) -> tuple[RunState, dict[str, str]]:
        path = self.folder / _name(number) / "state.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, hashes = record.pop("format"), record.pop("files")
            if version != FORMAT:
                raise ValueError(f"format {version}, this Photon reads {FORMAT}")
            return RunState(**record), hashes
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointCorruptError(f"can't read {path}: {error}") from error


def _name(number: int) -> str:
    return f"round-{number:06d}"
