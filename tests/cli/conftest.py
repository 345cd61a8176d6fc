"""The command as a process that can be killed, without five seconds of imports for each."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

FORKED = Path(__file__).parent / "programs" / "forked.py"


class Forked:
    """`photon WORDS` in a process of its own, with the part of Popen's interface that tests use.

    Args:
        forks: forks a process that has imported Photon and done nothing else.
        folder: empty; keeps what the process prints.
        words: of the command line.
        file_limit_bytes: the kernel refuses to write more into one file.
        starts_fork_server: of Python's own, as ever; else the one of workers is forked too.
    """

    def __init__(
        self,
        forks: ForkServerContext,
        folder: Path,
        words: tuple[Any, ...],
        file_limit_bytes: int | None = None,
        starts_fork_server: bool = False,
    ) -> None:
        self._out, self._error = folder / "out", folder / "error"
        given = {
            "words": [str(word) for word in words],
            "out": str(self._out),
            "error": str(self._error),
            "file_limit_bytes": file_limit_bytes,
            "starts_fork_server": starts_fork_server,
        }
        self._process = forks.Process(target=runpy.run_path, args=(str(FORKED), given, "__main__"))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        return self._error.read_text() if self._error.exists() else ""

    def poll(self) -> int | None:
        """Its exit code, -9 for SIGKILL; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 400.0) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"still running after {timeout:g} s: {self.stderr[-3000:]}"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


@pytest.fixture
def photon(
    forks: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Forked]]:
    """Starts `photon WORDS`; what still runs when the test ends is killed."""
    started: list[Forked] = []

    def start(*words: Any, **options: Any) -> Forked:
        process = Forked(forks, tmp_path_factory.mktemp("photon"), words, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
