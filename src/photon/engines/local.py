"""The in-process engine: deterministic, no server, no copies; the test bed.

Under torchrun this is rank 0's engine, and the other ranks follow its node.
"""

from __future__ import annotations

import time
from collections import deque

from photon.federation import Answer, FitTask, Participant, SecureTask, Task, Version


class LocalEngine:
    """One participant in the aggregator's own process serves every silo in turn."""

    processes = 1

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._waiting: deque[tuple[Task, Version]] = deque()

    @property
    def now_s(self) -> float:
        return time.monotonic()

    def submit(self, task: Task, version: Version) -> None:
        self._waiting.append((task, version))

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        """The next answer, worked out now; the tensors of the one before are not valid any more."""
        if not self._waiting:
            return []
        first = min(self._waiting, key=lambda one: isinstance(one[0], FitTask))
        self._waiting.remove(first)
        task, version = first
        if isinstance(task, FitTask):
            return [(task, self._participant.fit(task, version))]
        if isinstance(task, SecureTask):
            return [(task, self._participant.agree(task))]
        return [(task, self._participant.evaluate(task, version))]

    def cancel(self, task: Task) -> str:
        self._waiting = deque(one for one in self._waiting if one[0] != task)
        return ""

    def settle(self) -> None:
        self._participant.settle()

    def close(self) -> None:
        self._participant.close()
