"""What a silo keeps between tasks: data cursor and, if the run says so, inner-optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from photon.errors import CheckpointCorruptError
from photon.link import TensorFile, write_tensors


@dataclass(frozen=True)
class NodeState:
    """A silo's own state after a task.

    Attributes:
        cursor: index of the first sequence of its stream that it has not trained on.
        optimizer: inner-optimizer tensors; empty when the run resets or averages them.
    """

    cursor: int = 0
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


class NodeStateStore:
    """FOLDER/<silo>/round-000012.safetensors, one file a task, written whole or not at all.

    A state is committed when a checkpoint names its round; until then the older one stays, so
    that a killed round is simply run again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, silo: str, node_round: int | None) -> NodeState:
        """The state saved after `node_round`; a fresh one for None.

        Raises:
            CheckpointCorruptError: that file is missing or unreadable.
        """
        if node_round is None:
            return NodeState()
        path = self._path(silo, node_round)
        with TensorFile(path) as file:
            try:
                cursor = int(file.metadata["cursor"])
            except (KeyError, ValueError) as error:
                raise CheckpointCorruptError(f"{path} holds no data cursor") from error
            return NodeState(cursor, file.read())

    def save(self, silo: str, round_number: int, state: NodeState) -> None:
        path = self._path(silo, round_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, state.optimizer, {"cursor": str(state.cursor)})

    def prune(self, needed: Mapping[str, set[int]]) -> None:
        """Remove the states that no kept checkpoint names."""
        for path in self._folder.glob("*/round-*.safetensors"):
            if int(path.stem[6:]) not in needed.get(path.parent.name, set()):
                path.unlink(missing_ok=True)

    def _path(self, silo: str, round_number: int) -> Path:
        return self._folder / silo / f"round-{round_number:06d}.safetensors"
