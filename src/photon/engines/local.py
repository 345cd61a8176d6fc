"""The in-process engine: deterministic, no server, no copies; the test bed.

Under torchrun this is rank 0's engine, and the other ranks follow its node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from photon.federation import EvalReceipt, EvalTask, FitTask, Node, Update
from photon.federation.tasks import GlobalState, Publish


class LocalEngine:
    """One node in the aggregator's own process serves every silo in turn."""

    processes = 1

    def __init__(self, node: Node) -> None:
        self._node = node

    def offer(self, number: int, publish: Publish) -> None:
        """Not needed: its nodes see this machine's memory or disk."""

    def fit(self, tasks: Sequence[FitTask], state: GlobalState) -> Iterator[Update]:
        for task in tasks:
            yield self._node.fit(task, state)
        self._node.settle()

    def evaluate(self, tasks: Sequence[EvalTask], state: GlobalState) -> Iterator[EvalReceipt]:
        return self._node.evaluate(tasks, state)

    def close(self) -> None:
        self._node.close()
