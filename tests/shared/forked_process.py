"""A program in a process forked from one that has imported PyTorch and Photon, as if started anew.

Starting it takes no five seconds of imports.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


class ForkedProcess:
    """With the part of Popen's interface that tests use.

    Args:
        forks: forks a process that has imported Photon and done nothing else (the fixture).
        program: run as the main module.
        given: its globals; "out" and "error" name the files that it prints to.
    """

    def __init__(self, forks: ForkServerContext, program: Path, given: Mapping[str, Any]) -> None:
        self._out, self._error = Path(given["out"]), Path(given["error"])
        whole = (str(program), dict(given), "__main__")
        self._process = forks.Process(target=runpy.run_path, args=whole)
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
