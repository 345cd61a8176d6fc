"""The processes of one node: who is there, and what rank 0 says to the others.

A node is one process or several ("ranks"), one per device. torchrun starts them, or Photon does;
either way RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who is
who. Only rank 0 speaks to the link; the others follow what it announces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from photon.errors import RankLostError, RankMismatchError

#: A rank waits this long for the others to start before it gives up.
JOIN_S = 300.0

#: Followers wait for rank 0's next announcement as long as a federation may pause; a rank that
#: dies closes its sockets, which ends the wait at once.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Seat:
    """One process's place among the ranks of its node.

    Attributes:
        rank: 0 .. world_size - 1, over all machines of the node.
        local_rank: place among the ranks of this machine; picks the device.
        world_size: ranks of the node.
        local_world_size: ranks of this machine.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Seat:
        """The seat that torchrun (or Photon) gave this process; alone without one."""
        asked = os.environ
        rank, local_rank = int(asked.get("RANK", 0)), int(asked.get("LOCAL_RANK", 0))
        world_size = int(asked.get("WORLD_SIZE", 1))
        return cls(rank, local_rank, world_size, int(asked.get("LOCAL_WORLD_SIZE", world_size)))

    @property
    def machines(self) -> int:
        """Machines of the node, all with as many ranks as this one."""
        return max(1, self.world_size // self.local_world_size)


class Ranks:
    """The process group of a node. Alone, every method is free and touches no network."""

    def __init__(
        self,
        seat: Seat,
        control: dist.ProcessGroup | None = None,
        checkpoints: dist.ProcessGroup | None = None,
    ) -> None:
        self.seat = seat
        self._control = control
        #: A group of its own for snapshots: they are written while announcements go on.
        self.checkpoints = checkpoints

    @classmethod
    def alone(cls) -> Ranks:
        return cls(Seat())

    @classmethod
    def join(cls, seat: Seat, device: torch.device, *, collective_s: float) -> Ranks:
        """Meet the other ranks; alone if there is one.

        Args:
            device: on CUDA gradients move by NCCL, on CPU by gloo; announcements always by gloo.
            collective_s: a collective of the training step that takes longer fails.

        Raises:
            RankLostError: the others did not come within JOIN_S.
        """
        if seat.world_size == 1:
            return cls.alone()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                backend,
                rank=seat.rank,
                world_size=seat.world_size,
                timeout=timedelta(seconds=max(collective_s, JOIN_S)),
                device_id=device if device.type == "cuda" else None,
            )
            control, checkpoints = (
                dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2)
            )
        except (RuntimeError, ValueError) as error:
            raise RankLostError(
                f"rank {seat.rank} of {seat.world_size} did not meet the others at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}",
                hint="Check that all ranks were started with the same MASTER_ADDR, MASTER_PORT and "
                "WORLD_SIZE, and can reach each other.",
            ) from error
        assert isinstance(control, dist.ProcessGroup)
        assert isinstance(checkpoints, dist.ProcessGroup)
        return cls(seat, control, checkpoints)

    @property
    def leader(self) -> bool:
        """Whether this is rank 0, the node's voice."""
        return self.seat.rank == 0

    @property
    def size(self) -> int:
        return self.seat.world_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of the training step's collectives; None alone."""
        return dist.group.WORLD if self.size > 1 else None

    def announce(self, message: Any) -> Any:
        """Rank 0's message, on every rank; raises RankLostError if another rank is gone."""
        if self.size == 1:
            return message
        box = [message]
        with naming_lost_ranks("an announcement of rank 0"):
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on unless every rank knows the same facts.

        Raises:
            RankMismatchError: on every rank, naming the fact and who holds which value.
        """
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        with naming_lost_ranks("comparing config and data"):
            dist.all_gather_object(everyone, dict(facts), group=self._control)
        for name in facts:
            held = [theirs[name] for theirs in everyone]
            if any(value != held[0] for value in held):
                listing = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(held))
                raise RankMismatchError(
                    f"the ranks of this node disagree on {name} ({listing})",
                    hint="Every rank needs the same run file, prepared data and version of Photon.",
                )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average over ranks, in place."""
        self.sum_(tensor)
        if self.size > 1:
            tensor /= self.size
        return tensor

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over ranks, in fp64."""
        if self.size == 1:
            return list(numbers)
        box = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(box, group=self._control)
        return box.tolist()

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.size == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._control)
        return int(box)

    def close(self) -> None:
        """Leave the process group; threads of gloo still there at exit would abort the process."""
        if self.size > 1 and dist.is_initialized():
            self._control = self.checkpoints = None
            dist.destroy_process_group()


@contextmanager
def naming_lost_ranks(doing: str) -> Iterator[None]:
    """Turn a broken collective into an error that says what was going on."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, as does a mistake in a model; only their words differ.
        words = ("connection closed by peer", "connection reset", "gloo", "nccl", "broken pipe")
        said = any(word in str(error).lower() for word in words)
        if not said and not isinstance(error, dist.DistError):
            raise
        gist = str(error).strip().splitlines()[0]
        raise RankLostError(
            f"a rank of this node was lost during {doing}: {gist}",
            hint="Its own message says why; for want of memory the system kills without one.",
        ) from error
