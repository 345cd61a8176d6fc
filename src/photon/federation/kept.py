"""What silos keep between their tasks, taken up by a trainer and left for the next one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from photon.config import RunConfig
from photon.errors import CheckpointCorruptError, ModelMismatchError
from photon.federation.engine import Version
from photon.federation.layout import Layout
from photon.federation.node_state import NodeStates
from photon.federation.tasks import OPTIMIZER, EvalTask, FitTask, section
from photon.training import Trainer

#: Of a personal tensor beside its inner-optimizer state, "<parameter>.<key>".
PERSONAL = ".personal"


class Kept:
    """Personal tensors and, if the run says so, the inner optimizer's state, of each silo.

    Args:
        folder: of NodeStates.
        trainer: of this rank; all ranks call the same methods together. A `version` is rank 0's,
            and None on the others.
        layout: of its model.
    """

    def __init__(self, folder: Path, trainer: Trainer, layout: Layout, config: RunConfig) -> None:
        cache_bytes = int(config.compute.state_cache_gib * 2**30)
        self._states = NodeStates(folder, trainer, cache_bytes)
        self._trainer = trainer
        self._personal = layout.personal
        self._optimizer_state = config.federation.optimizer_state

    def take_up(self, task: FitTask, version: Version | None) -> bool:
        """Personal tensors and inner-optimizer state for a task's local steps.

        Returns:
            Whether what the silo kept, if the task names any, was there. If not, it begins anew.
        """
        optimizer, keeps = self._trainer.optimizer, self._optimizer_state == "keep"
        if self._optimizer_state == "average":
            averaged = section(version.tensors, OPTIMIZER) if version is not None else None
            if self._trainer.ranks.size > 1:
                averaged = self._trainer.placed.spread(averaged)
            assert averaged is not None
            optimizer.load_state_tensors(
                averaged, steps_taken=task.global_step if averaged else None
            )
            return True
        kept = self._read(task) if keeps or self._personal else {}
        if kept is not None and keeps:
            state = {name: one for name, one in kept.items() if not name.endswith(PERSONAL)}
            try:
                optimizer.load_state_tensors(state)
            except ModelMismatchError:
                kept = None
        found = bool(self._trainer.ranks.least(kept is not None))
        if not (found and keeps):
            optimizer.reset()
        self._place(kept if found else None, version)
        return found

    def personalise(self, task: EvalTask, version: Version | None) -> None:
        """Personal tensors to score with: the silo's own, as far as it has any."""
        if self._personal:
            kept = self._read(task)
            found = bool(self._trainer.ranks.least(kept is not None))
            self._place(kept if found else None, version)

    def leave(self, task: FitTask) -> None:
        """Begin to write what the silo keeps of a task; it is on disk once `settle` returned.

        Raises:
            DiskFullError: no room for this state or the one before.
        """
        weights = self._trainer.weights()
        kept = {name + PERSONAL: weights[name] for name in self._personal}
        if self._optimizer_state == "keep":
            kept |= self._trainer.optimizer.state_tensors()
        if kept or self._optimizer_state == "keep":
            self._states.save(task.silo, task.round, kept)

    def settle(self) -> None:
        """As `NodeStates.settle`."""
        self._states.settle()

    def _read(self, task: FitTask | EvalTask) -> dict[str, Tensor] | None:
        """What the silo kept after the round that a task names; None where it is gone."""
        if task.silo is None or task.node_round is None:
            return {}
        try:
            kept = dict(self._states.load(task.silo, task.node_round))
        except CheckpointCorruptError:
            return None
        return kept if all(name + PERSONAL in kept for name in self._personal) else None

    def _place(self, kept: dict[str, Tensor] | None, version: Version | None) -> None:
        """Give personal tensors the silo's values, or those that every silo begins with."""
        if not self._personal:
            return
        if not kept:
            first = version and {name: version.once[name] for name in self._personal}
            self._trainer.load_weights(first, self._personal)
            return
        self._trainer.placed.put({name: kept[name + PERSONAL] for name in self._personal})
