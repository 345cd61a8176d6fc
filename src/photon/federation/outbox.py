"""What leaves a node: its update, encoded, with error feedback.

e <- 0; every round: send C(delta + e), e <- beta (delta + e - decoded). What a codec leaves out of
one update is part of the next (EF-SGD, arXiv 1901.09847; beta as in SparseLoCo, arXiv 2508.15706).
A silo that was not asked, or whose update was refused, for a rounds adds beta^a e: what was left
out of a step from weights long gone counts for less. With beta = 1 nothing fades, however old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from photon.aggregation import square_sum
from photon.compression import build_codec
from photon.config import LinkConfig
from photon.errors import CheckpointCorruptError
from photon.federation.tasks import WEIGHTS, FitTask, Receipt, Update, section
from photon.link import Entry, TensorFile, plain_entries, write_tensors
from photon.secure.member import Seal

#: Of what is kept: what was left out of a tensor's updates so far, and what a codec that learns
#: keeps of it, "memory/<tensor>/<key>".
_RESIDUAL, _MEMORY = "residual/", "memory/"

#: The way to an update, a tensor at a time.
Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


def pack(
    link: LinkConfig, folder: Path, task: FitTask, tensors: Tensors, seal: Seal | None = None
) -> Update:
    """The update that answers a task, encoded, if not fp32; keeps what was left out of it.

    Weights' tensors go through the run's codec; averaged optimizer state as it is, in fp32.
    Feedback is FOLDER/<silo>/feedback-000012.safetensors, committed as node states are: when a
    checkpoint names its round.

    Args:
        folder: of the silos' kept states.
        task: where it names a node_round, that round's feedback is added.
        tensors: of the update; walked more than once.
        seal: what encodes it and masks it, in the place of the run's codec.

    Raises:
        PolicyError: see Seal.leave.
        NonFiniteError: the update holds NaN or infinity, and is encoded.
        DiskFullError: no room for the new feedback.
    """
    receipt, spec = Receipt(task.round, task.silo), link.update_spec
    if spec == "fp32" and seal is None:
        return Update(receipt, tensors)
    codec = build_codec(link.update_codec if seal is None else "fp32")
    feeds_back = link.feeds_back
    if seal is not None:  # before noise on the sum it would pass the clip
        feeds_back = link.error_feedback is not False and seal.clip is None
    keeps, state_lost = feeds_back or codec.learns, False
    old, new = dict[str, Tensor](), dict[str, Tensor]()
    if task.node_round is not None and keeps:
        try:
            with TensorFile(feedback_path(folder, task.silo, task.node_round)) as file:
                old = file.read()
        except CheckpointCorruptError:
            state_lost = True
        missed = max(0, task.round - task.node_round - 1)
        for left in section(old, _RESIDUAL).values():
            left.mul_(link.feedback_decay**missed)

    def corrected() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors():
            left = old.get(_RESIDUAL + name)
            yield name, tensor if left is None else tensor + left

    codec = codec.fitted(
        lambda: ((name, tensor) for name, tensor in corrected() if name.startswith(WEIGHTS))
    )
    entries: list[Entry] = []
    lost = given = 0.0
    for name, tensor in corrected():
        if not name.startswith(WEIGHTS):
            entries += plain_entries([(name, tensor)])
            continue
        if seal is not None:
            parts, decoded = seal.encode(name, tensor)
            entries.append(Entry(name, tensor.shape, seal.codec, parts))
        else:
            memory = section(old, f"{_MEMORY}{name}/")
            parts = codec.encode(tensor, memory)
            decoded = codec.decode(parts, tensor.shape) if feeds_back else tensor
            entries.append(Entry(name, tensor.shape, spec, parts))
            new |= {f"{_MEMORY}{name}/{key}": kept for key, kept in memory.items()}
        if feeds_back:
            left = tensor - decoded
            lost += square_sum(name, left)
            given += square_sum(name, tensor)
            new[_RESIDUAL + name] = left.mul_(link.feedback_decay)
    if keeps:
        path = feedback_path(folder, task.silo, task.round)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, new)
    if seal is not None:
        seal.leave([dict(entry.parts) for entry in entries])
    share = (math.sqrt(lost / given) if given else 0.0) if feeds_back else None
    return Update.of(replace(receipt, left_out=share, state_lost=state_lost), entries)


def feedback_path(folder: Path, silo: str, number: int) -> Path:
    """Where a silo's feedback after a round lies."""
    return folder / silo / f"feedback-{number:06d}.safetensors"
