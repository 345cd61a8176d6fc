"""Several ranks of one node as real processes on this machine."""

from __future__ import annotations

import json
import runpy
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def run_ranks(
    forks: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Any]]:
    """Runs programs/NAME.py in `world` processes, as torchrun would start them.

    Each is given a JSON of arguments and prints one JSON line; returned in order of rank.
    """

    def run(program: str, world: int, arguments: Any, *, timeout_s: float = 400.0) -> list[Any]:
        port = free_port()
        folder = tmp_path_factory.mktemp(program)
        processes = []
        for rank in range(world):
            seat = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            given = {
                "environment": {name: str(value) for name, value in seat.items()},
                "argv": [str(PROGRAMS / f"{program}.py"), json.dumps(arguments)],
                "out": str(folder / f"out-{rank}"),
                "error": str(folder / f"error-{rank}"),
            }
            process = forks.Process(
                target=runpy.run_path,
                args=(str(PROGRAMS / "seated.py"), given, "__main__"),
            )
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        answers: list[Any] = []
        try:
            for rank, process in enumerate(processes):
                process.join(max(1.0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"{program} took longer than {timeout_s:g} s"
                error = (folder / f"error-{rank}").read_text()
                if process.exitcode:
                    raise AssertionError(f"rank {rank} of {program} failed:\n{error[-3000:]}")
                out = (folder / f"out-{rank}").read_text()
                answers.append(json.loads(out.strip().splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return answers

    return run
