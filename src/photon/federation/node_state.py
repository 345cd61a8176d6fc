"""What silos keep between tasks: inner-optimizer state, if the run says so, and their own parts."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from photon.aggregation.attention import taken_up
from photon.aggregation.edit import module_of
from photon.config import RunConfig
from photon.config.parts import PartsConfig
from photon.errors import CheckpointCorruptError, ModelMismatchError
from photon.federation.engine import Version
from photon.federation.layout import Layout
from photon.federation.outbox import feedback_path
from photon.federation.tasks import OPTIMIZER, WEIGHTS, EvalTask, FitTask, section
from photon.store.disk import writing
from photon.training import (
    Allocate,
    PendingSnapshot,
    Ranks,
    Trainer,
    local_part,
    read_snapshot,
    write_snapshot,
)

#: Of a personal tensor beside its inner-optimizer state, "<parameter>.<key>".
PERSONAL = ".personal"
#: Of a key tensor that is kept: as it is, and as it was when the newest task began.
KEY, ANCHOR = ".key", ".anchor"
#: Inner-optimizer tensors as this rank holds them.
State = Mapping[str, Tensor]


class _Packed:
    """A state as copies in host memory: this rank's parts, with the whole tensors' shapes."""

    def __init__(self, state: State) -> None:
        self._parts = {
            name: (tensor.shape, local_part(tensor).to("cpu", copy=True))
            for name, tensor in state.items()
        }

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for _, part in self._parts.values())

    def unpacked(self, allocate: Allocate) -> State:
        tensors: dict[str, Tensor] = {}
        for name, (shape, part) in self._parts.items():
            tensors[name] = allocate(name, shape, part.dtype)
            local_part(tensors[name]).copy_(part)
        return tensors


class NodeStates:
    """FOLDER/<silo>/round-000012/, one snapshot a task, there whole or not at all.

    A state is committed when a checkpoint names its round; until then the older one stays, so
    that a killed round is simply run again. Memory: one state on its way to disk, and the newest
    ones up to a bound.

    Args:
        folder: on storage that all ranks of the node see.
        trainer: whose ranks write and read, and whose parameters say how tensors are cut.
        cache_bytes: of host memory on each rank for states that are on disk already.
    """

    def __init__(self, folder: Path, trainer: Trainer, cache_bytes: int) -> None:
        self._folder = folder
        self._trainer = trainer
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Path, _Packed] = OrderedDict()
        self._pending: PendingSnapshot | None = None

    def load(self, silo: str, node_round: int) -> State:
        """The state saved after `node_round`.

        Raises:
            CheckpointCorruptError: that snapshot is missing or unreadable.
        """
        self.settle()
        path = _path(self._folder, silo, node_round)
        if path in self._cache:
            return self._cache[path].unpacked(self._allocate)
        return read_node_state(
            self._folder, silo, node_round, allocate=self._allocate, ranks=self._trainer.ranks
        )

    def save(self, silo: str, round_number: int, state: State) -> None:
        """Begin to write a state; it is on disk once `settle` returned.

        Raises:
            DiskFullError: no room for this state or the one before.
        """
        self.settle()
        path = _path(self._folder, silo, round_number)
        with writing("a silo's state", path):
            self._pending = write_snapshot(path, state, self._trainer.ranks)
        self._remember(path, state)

    def settle(self) -> None:
        """Wait until what `save` began is on disk.

        Raises:
            DiskFullError: no room.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with writing("a silo's state", pending.path):
                pending.finish()

    def _remember(self, path: Path, state: State) -> None:
        if not self._cache_bytes:
            return
        # A silo's older states are never asked for again, but after a resume, from disk.
        for other in [other for other in self._cache if other.parent == path.parent]:
            del self._cache[other]
        self._cache[path] = _Packed(state)
        while sum(packed.bytes for packed in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)

    def _allocate(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self._trainer.placed.empty(name.rpartition(".")[0], shape, dtype)


class Kept:
    """Personal tensors and, if the run says so, key tensors and the inner optimizer's state.

    Of each silo: taken up by a trainer for a task, and left for the silo's next one.

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
        self._parts = config.parts
        self._personal = layout.personal
        self._key = layout.named("key") if config.parts.own_key else ()
        self._anchor: dict[str, Tensor] = {}
        self._optimizer_state = config.federation.optimizer_state

    def take_up(self, task: FitTask, version: Version | None, score: Callable[[], float]) -> bool:
        """Personal tensors and inner-optimizer state for a task's local steps.

        Args:
            score: loss of the trainer's weights on text that the task will train on; of all ranks.

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
        kept = self._read(task) if keeps or self._own else {}
        if kept is not None and keeps:
            parts = (PERSONAL, KEY, ANCHOR)
            state = {name: one for name, one in kept.items() if not name.endswith(parts)}
            try:
                optimizer.load_state_tensors(state)
            except ModelMismatchError:
                kept = None
        found = bool(self._trainer.ranks.least(kept is not None))
        if self._optimizer_state != "average" and not (found and keeps):
            optimizer.reset()
        self._place(kept if found else None, version, self._parts, score)
        self._anchor = {name: self._trainer.weights()[name].clone() for name in self._key}
        return found

    def personalise(self, task: EvalTask, version: Version | None) -> None:
        """Tensors to score with: the silo's own, as far as it has any.

        With key_down = "best" they are as its newest task left them.
        """
        if self._own:
            kept = self._read(task)
            found = bool(self._trainer.ranks.least(kept is not None))
            self._place(kept if found else None, version, self._parts.for_scores)

    def leave(self, task: FitTask) -> None:
        """Begin to write what the silo keeps of a task; it is on disk once `settle` returned.

        Raises:
            DiskFullError: no room for this state or the one before.
        """
        weights = self._trainer.weights()
        kept = {name + PERSONAL: weights[name] for name in self._personal}
        kept |= {name + KEY: weights[name] for name in self._key}
        kept |= {name + ANCHOR: tensor for name, tensor in self._anchor.items()}
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
        own = [name + PERSONAL for name in self._personal] + [name + KEY for name in self._key]
        return kept if all(name in kept for name in own) else None

    @property
    def _own(self) -> bool:
        return bool(self._personal or self._key)

    def _place(
        self,
        kept: dict[str, Tensor] | None,
        version: Version | None,
        parts: PartsConfig,
        score: Callable[[], float] | None = None,
    ) -> None:
        """Give personal and key tensors the silo's values, or those that every silo begins with."""
        if self._personal and kept:
            self._trainer.placed.put({name: kept[name + PERSONAL] for name in self._personal})
        elif self._personal:
            first = version and {name: version.once[name] for name in self._personal}
            self._trainer.load_weights(first, self._personal)
        if not self._key:
            return
        above = version and {name: version.tensors[WEIGHTS + name] for name in self._key}
        taken, own = above, None
        if kept:
            own, anchor = (  # as they are, and as they were when the newest task began; whole
                dict(self._trainer.whole({name: kept[name + end] for name in self._key}))
                for end in (KEY, ANCHOR)
            )
            taken = above and taken_up(parts, anchor, own, above)
        self._trainer.load_weights(taken, self._key)
        if own and score is not None and parts.key_down == "best":
            self._choose([taken, own, above] if above else [None] * 3, score)

    def _choose(self, ways: Sequence[dict[str, Tensor] | None], score: Callable[[], float]) -> None:
        """Of each layer what is in place, its own, or the version's, whichever scores best."""
        best, modules = score(), dict[str, list[str]]()
        for name in self._key:
            modules.setdefault(module_of(name), []).append(name)

        def put(way: int, names: Sequence[str]) -> None:
            values = ways[way]
            self._trainer.load_weights(values and {name: values[name] for name in names}, names)

        for names in modules.values():
            chosen = 0
            for way in (1, 2):
                put(way, names)
                if (found := score()) < best:
                    best, chosen = found, way
            put(chosen, names)


def read_node_state(
    folder: Path,
    silo: str,
    node_round: int,
    *,
    allocate: Allocate = lambda _, shape, dtype: torch.empty(shape, dtype=dtype),
    ranks: Ranks | None = None,
) -> State:
    """The state a silo saved after a round; by default whole, in this process.

    Args:
        folder: of NodeStates.
        allocate: makes the tensors that are read into.
        ranks: that read it together.

    Raises:
        CheckpointCorruptError: that snapshot is missing or unreadable.
    """
    try:
        return read_snapshot(_path(folder, silo, node_round), allocate, ranks or Ranks.alone())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(
            f"the state of silo {silo} after round {node_round} can't be read: {error}"
        ) from error


def prune_node_states(folder: Path, needed: Mapping[str, Container[int]]) -> None:
    """Remove the states, and the feedback, that no kept checkpoint names.

    Args:
        folder: of NodeStates.
        needed: silo -> rounds.
    """
    for path in (*folder.glob("*/round-*"), *folder.glob("*/feedback-*.safetensors")):
        if int(path.stem.rpartition("-")[2]) in needed.get(path.parent.name, set()):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def drop_node_state(folder: Path, silo: str, number: int) -> None:
    """Remove what a silo kept after a round, if it did."""
    shutil.rmtree(_path(folder, silo, number), ignore_errors=True)
    feedback_path(folder, silo, number).unlink(missing_ok=True)


def _path(folder: Path, silo: str, round_number: int) -> Path:
    return folder / silo / f"round-{round_number:06d}"
