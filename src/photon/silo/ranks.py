"""The ranks of a site's node: who they are, how they start, and which run they train next.

Under torchrun, or whatever sets its variables, the ranks are there already. Alone on a machine
with several devices, or with compute.processes, rank 0 starts the others itself. A node is built
anew for each run, by every rank at the same time: rank 0 tells the others what to build.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from photon.config import ComputeConfig
from photon.environment import given
from photon.errors import RankLostError
from photon.training import Seat, ranks_of_a_node

log = logging.getLogger(__name__)

#: A rank waits so long for the others to start.
_JOIN = timedelta(seconds=300)

#: Followers ask anew after so long; between two runs of a federation there may be months.
_WAIT = timedelta(hours=1)

#: Set for ranks that rank 0 started: its process id.
_STARTED_BY = "PHOTON_RANK_OF"

_PR_SET_PDEATHSIG = 1


class Team:
    """The ranks of one node, as one of them sees them.

    Args:
        seat: this process's.
        store: between the ranks; None alone.
    """

    def __init__(self, seat: Seat, store: Any = None) -> None:
        self.seat = seat
        self._store = store
        self._number = 0

    @classmethod
    def gather(
        cls,
        compute: ComputeConfig,
        command: Sequence[str],
        on_loss: Callable[[int, int], None],
    ) -> Team:
        """Find the ranks that were started, or start as many as [compute] says.

        Args:
            compute: the site's.
            command: starts another process like this one.
            on_loss: told, in another thread, of a rank that was started here and ended, and of its
                exit code. It ends this process.

        Raises:
            RankLostError: the others can't be reached.
            DeviceError: the site names a device that is not here.
        """
        seat = Seat.from_environment()
        if seat.world_size == 1:
            count = ranks_of_a_node(compute, workers=0)
            if count == 1:
                return cls(seat)
            seat = Seat(0, 0, count, count)
            os.environ.update(_variables(seat, _free_port()))
            team = cls(seat, _meet(seat))  # it listens before the others call
            for rank in range(1, count):
                _start(Seat(rank, rank, count, count), command, on_loss)
            return team
        _end_with_starter()
        return cls(seat, _meet(seat))

    @property
    def leader(self) -> bool:
        """Whether this is rank 0, which alone speaks to anybody."""
        return self.seat.rank == 0

    def begin(self, order: dict[str, Any]) -> None:
        """Rank 0: have the others build a node, which joins this process's next one.

        Raises:
            RankLostError: they can't be reached.
        """
        if self.seat.world_size == 1:
            return
        port = _free_port()
        self._number += 1
        with _lost_if_broken():
            self._store.set(f"order/{self._number}", json.dumps({"port": port, "order": order}))
        _meet_at(port)

    def orders(self) -> Iterator[dict[str, Any]]:
        """The other ranks: what rank 0 has them build, one after another.

        Raises:
            RankLostError: rank 0 is gone.
        """
        while True:
            self._number += 1
            key = f"order/{self._number}"
            with _lost_if_broken():
                while True:
                    with contextlib.suppress(dist.DistStoreError):  # nothing yet
                        self._store.wait([key], _WAIT)
                        break
                told = json.loads(self._store.get(key))
            _meet_at(told["port"])
            yield told["order"]


def _meet(seat: Seat) -> Any:
    """A store that all ranks reach: torchrun's own, or one that rank 0 opens."""
    opened = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with _lost_if_broken():
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=seat.rank == 0 and not opened,
            timeout=_JOIN,
            wait_for_workers=False,
        )
    # torchrun's store outlives the ranks that it starts again.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"photon-silo/{start}", store)


def _meet_at(port: int) -> None:
    """The next process group meets on a port of its own: a group leaves its traces in a store."""
    os.environ["MASTER_PORT"] = str(port)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


@contextlib.contextmanager
def _lost_if_broken() -> Iterator[None]:
    """Turn a broken store into an error that says so."""
    try:
        yield
    except dist.DistError as error:
        gist = str(error).strip().splitlines()[0]
        raise RankLostError(
            f"the ranks of this node don't reach each other: {gist}",
            hint="All ranks need the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, as torchrun "
            "sets them. If one ended, its own message says why.",
        ) from error


def _start(seat: Seat, command: Sequence[str], on_loss: Callable[[int, int], None]) -> None:
    variables = _variables(seat, int(os.environ["MASTER_PORT"]))
    process = subprocess.Popen(
        list(command), env=given() | variables | {_STARTED_BY: str(os.getpid())}
    )
    log.info("rank %d of %d is process %d", seat.rank, seat.world_size, process.pid)

    def watch() -> None:
        on_loss(seat.rank, process.wait())

    threading.Thread(target=watch, name=f"photon-rank-{seat.rank}", daemon=True).start()


def _end_with_starter() -> None:
    """Where rank 0 or torchrun started this rank: end when it is gone, even if it was killed.

    Left alone, a rank 0 would hold the node's home against the one that takes its place.
    """
    starter = os.environ.get(_STARTED_BY)
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if (starter is None and not launched) or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if starter is not None and os.getppid() != int(starter):  # gone before it could be noticed
        os._exit(1)


def _variables(seat: Seat, port: int) -> dict[str, str]:
    return {
        "RANK": str(seat.rank),
        "LOCAL_RANK": str(seat.local_rank),
        "WORLD_SIZE": str(seat.world_size),
        "LOCAL_WORLD_SIZE": str(seat.local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    # On every address of this machine: ranks of another one may call, too.
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
