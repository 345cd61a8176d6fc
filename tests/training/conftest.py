"""Several ranks of one node as real processes on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """Runs programs/NAME.py in `world` processes, as torchrun would start them.

    Each is given a JSON of arguments and prints one JSON line; returned in order of rank. With
    `check=False` a rank that failed gives {"exit": code, "stderr": text}.
    """

    def run(
        program: str,
        world: int,
        arguments: Any,
        *,
        machines: int = 1,
        check: bool = True,
        timeout_s: float = 200.0,
    ) -> list[Any]:
        port = free_port()
        local = world // machines
        processes = []
        for rank in range(world):
            seat = {
                "RANK": rank,
                "LOCAL_RANK": rank % local,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": local,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(PROGRAMS / f"{program}.py"), json.dumps(arguments)],
                    env={**os.environ, **{name: str(value) for name, value in seat.items()}},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        deadline = time.monotonic() + timeout_s
        answers: list[Any] = []
        try:
            for rank, process in enumerate(processes):
                out, error = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                if process.returncode and check:
                    raise AssertionError(f"rank {rank} of {program} failed:\n{error[-3000:]}")
                if process.returncode:
                    answers.append({"exit": process.returncode, "stderr": error})
                else:
                    answers.append(json.loads(out.strip().splitlines()[-1]))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        return answers

    return run
