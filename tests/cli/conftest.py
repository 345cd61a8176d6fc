"""The command as a process that can be killed, without five seconds of imports for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from forked_process import ForkedProcess

FORKED = Path(__file__).parent / "programs" / "forked.py"


@pytest.fixture
def photon(
    forks: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ForkedProcess]]:
    """Starts `photon WORDS`; what still runs when the test ends is killed.

    With file_limit_bytes, the kernel refuses to write more into one file. With starts_fork_server,
    it starts a fork server of Python's own, as ever; else the one of its workers is forked too.
    """
    started: list[ForkedProcess] = []

    def start(
        *words: Any, file_limit_bytes: int | None = None, starts_fork_server: bool = False
    ) -> ForkedProcess:
        folder = tmp_path_factory.mktemp("photon")
        given = {
            "words": [str(word) for word in words],
            "out": str(folder / "out"),
            "error": str(folder / "error"),
            "file_limit_bytes": file_limit_bytes,
            "starts_fork_server": starts_fork_server,
        }
        started.append(ForkedProcess(forks, FORKED, given))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
