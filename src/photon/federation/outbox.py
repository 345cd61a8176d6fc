"""What leaves a node: its update, encoded, with error feedback.

e <- 0; every round: send C(delta + e), e <- beta (delta + e - decoded). What a codec leaves out of
one update is part of the next (EF-SGD, arXiv 1901.09847; beta as in SparseLoCo, arXiv 2508.15706).
A silo that was not asked, or whose update was refused, for a rounds adds beta^a e: what was left
out of a step from weights long gone counts for less. With beta = 1 nothing fades, however old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from photon.aggregation import square_sum
from photon.compression import build_codec
from photon.config import LinkConfig
from photon.errors import CheckpointCorruptError
from photon.federation.tasks import WEIGHTS, FitTask, Receipt, Update
from photon.link import Entry, TensorFile, plain_entries, write_tensors

_RESIDUAL, _MEMORY = "residual/", "memory/"

#: The way to an update, a tensor at a time.
Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass
class Feedback:
    """What a silo keeps for its codec from round to round.

    Attributes:
        residual: by tensor name, what was left out of its updates so far.
        memory: by tensor name, what a codec that learns keeps.
    """

    residual: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Outbox:
    """Encodes a silo's updates, one after another.

    Weights' tensors go through the run's codec; averaged optimizer state as it is, in fp32.
    Feedback is FOLDER/<silo>/feedback-000012.safetensors, committed as node states are: when a
    checkpoint names its round.

    Args:
        config: the run's.
        folder: of the silos' kept states.
    """

    def __init__(self, config: LinkConfig, folder: Path) -> None:
        self._codec = build_codec(config.update_codec)
        self._spec = config.update_spec
        self._feeds_back = config.feeds_back
        self._decay = config.feedback_decay
        self._folder = folder

    def pack(self, task: FitTask, tensors: Tensors) -> Update:
        """The update that answers a task, encoded, if not fp32; keeps what was left out of it.

        Args:
            task: where it names a node_round, that round's feedback is added.
            tensors: of the update; walked more than once.

        Raises:
            NonFiniteError: the update holds NaN or infinity, and is encoded.
            DiskFullError: no room for the new feedback.
        """
        receipt = Receipt(task.round, task.silo)
        if self._spec == "fp32":
            return Update(receipt, tensors)
        old, state_lost = Feedback(), False
        if task.node_round is not None and self._keeps:
            try:
                old = self._load(task.silo, task.node_round, task.round - task.node_round - 1)
            except CheckpointCorruptError:
                state_lost = True

        def corrected() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors():
                left = old.residual.get(name)
                yield name, tensor if left is None else tensor + left

        codec = self._codec.fitted(
            lambda: ((name, tensor) for name, tensor in corrected() if name.startswith(WEIGHTS))
        )
        new, entries = Feedback(memory=old.memory), []
        lost = given = 0.0
        for name, tensor in corrected():
            if not name.startswith(WEIGHTS):
                entries += plain_entries([(name, tensor)])
                continue
            parts = codec.encode(tensor, new.memory.setdefault(name, {}))
            entries.append(Entry(name, tensor.shape, self._spec, parts))
            if self._feeds_back:
                left = tensor - codec.decode(parts, tensor.shape)
                lost += square_sum(name, left)
                given += square_sum(name, tensor)
                new.residual[name] = left.mul_(self._decay)
        self._save(task.silo, task.round, new)
        share = (math.sqrt(lost / given) if given else 0.0) if self._feeds_back else None
        return Update.of(replace(receipt, left_out=share, state_lost=state_lost), entries)

    def _load(self, silo: str, node_round: int, missed: int) -> Feedback:
        feedback, fading = Feedback(), self._decay ** max(0, missed)
        with TensorFile(feedback_path(self._folder, silo, node_round)) as file:
            tensors = file.read()
        for name, tensor in tensors.items():
            if name.startswith(_RESIDUAL):
                faded = tensor if fading == 1 else tensor.mul_(fading)
                feedback.residual[name.removeprefix(_RESIDUAL)] = faded
            else:
                owner, _, key = name.removeprefix(_MEMORY).rpartition("/")
                feedback.memory.setdefault(owner, {})[key] = tensor
        return feedback

    def _save(self, silo: str, number: int, feedback: Feedback) -> None:
        if not self._keeps:
            return
        tensors = {_RESIDUAL + name: tensor for name, tensor in feedback.residual.items()}
        for owner, kept in feedback.memory.items():
            tensors |= {f"{_MEMORY}{owner}/{key}": tensor for key, tensor in kept.items()}
        path = feedback_path(self._folder, silo, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)

    @property
    def _keeps(self) -> bool:
        return self._feeds_back or self._codec.learns


def feedback_path(folder: Path, silo: str, number: int) -> Path:
    """Where a silo's feedback after a round lies."""
    return folder / silo / f"feedback-{number:06d}.safetensors"
