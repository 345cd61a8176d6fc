"""Scores as an engine gives them, for tests of engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from photon.federation import Engine, EvalReceipt, EvalTask, Mailbox, Version


def scored(engine: Engine, tasks: Sequence[EvalTask], version: Version) -> Iterator[EvalReceipt]:
    """Scores in the order of tasks, of those that were answered."""
    for answer in Mailbox(engine).in_task_order(tasks, version):
        if isinstance(answer, EvalReceipt):
            yield answer
