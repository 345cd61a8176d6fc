"""The mailbox between an aggregator and its participants."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from photon.federation.tasks import (
    EvalReceipt,
    EvalTask,
    FitTask,
    GlobalState,
    Residual,
    SecureReceipt,
    SecureTask,
    StateRef,
    Task,
    Update,
)
from photon.link import Carrier


@dataclass(frozen=True, eq=False)
class Version:
    """A global state that does not change any more, until a server takes its next step.

    Attributes:
        number: merges behind it; the state after round `number` of a run.
        tensors: see GlobalState.
        publish: puts it into a store, under a folder there, and says what was put. An engine whose
            participants see the aggregator's memory or disk has no use for it.
        bytes_down: what a participant that holds the version of this number (None: none) gets to
            have this one, on the wire, to the byte.
        once: fp32 tensors by name that no version of the run changes: what is frozen, and what
            personal parts begin with.
        once_sha256: of those; who holds them by it need not be given them again.
        residuals: for this one participant, to merge with its members' updates.
    """

    number: int
    tensors: GlobalState
    publish: Callable[[Carrier, str], StateRef] | None = None
    bytes_down: Callable[[int | None], int] = lambda held: 0
    once: Mapping[str, Tensor] = field(default_factory=dict)
    once_sha256: str = ""
    residuals: Sequence[Residual] = ()


#: To a task: an update, scores, or None where there will be none and the engine has said why.
Answer = Update | EvalReceipt | SecureReceipt | None


class Participant(Protocol):
    """Who answers tasks, a node most often: a version goes down, an update comes back."""

    def fit(self, task: FitTask, version: Version) -> Update:
        """Take the task's local steps from the version.

        A loss or an update that is not finite is a receipt with a failure, not an exception: the
        round goes on. What is kept may still be on its way to disk; `settle` waits for it.
        """
        ...

    def evaluate(self, task: EvalTask, version: Version) -> EvalReceipt:
        """Score the version on held-out text."""
        ...

    def agree(self, task: SecureTask) -> SecureReceipt:
        """Do a phase of secure aggregation."""
        ...

    def settle(self) -> None:
        """Wait until all that was kept is on disk.

        Raises:
            DiskFullError: no room for it.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Engine(Protocol):
    """Carries tasks to participants and answers back. Every engine passes one contract suite."""

    @property
    def processes(self) -> int:
        """Training processes that work at the same time."""
        ...

    @property
    def now_s(self) -> float:
        """By the clock that time limits go by; it may be a simulated one."""
        ...

    def submit(self, task: Task, version: Version) -> None:
        """Hand in a task that starts from this version.

        Those handed in first are done first, scores before training.
        """
        ...

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        """Answers to tasks that were handed in, each once, in the order in which they came.

        Args:
            timeout_s: how long to wait for the first; for as long as it takes by default.

        Returns:
            empty where none came in time, or none is to come.
        """
        ...

    def cancel(self, task: Task) -> str:
        """Nobody wants the answer any more; work on it may go on for a while.

        Returns:
            what was last heard of it, to end a sentence with; mostly nothing.
        """
        ...

    def settle(self) -> None:
        """Wait until all that silos keep, of the tasks answered so far, is on disk."""
        ...

    def close(self) -> None:
        """End every process and remove what was exchanged."""
        ...


class Mailbox:
    """An engine whose answers are taken by who waits for them; others' are kept meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._kept: list[tuple[Task, Answer]] = []

    def take(
        self, wanted: Container[Task], timeout_s: float | None = None
    ) -> list[tuple[Task, Answer]]:
        """Answers to any of these tasks, as `Engine.arrivals` gives them."""
        ours = [one for one in self._kept if one[0] in wanted]
        self._kept = [one for one in self._kept if one[0] not in wanted]
        until_s = None if timeout_s is None else self.engine.now_s + timeout_s
        while not ours:
            left_s = None if until_s is None else max(0.0, until_s - self.engine.now_s)
            came = self.engine.arrivals(left_s)
            if not came:
                break
            ours += [one for one in came if one[0] in wanted]
            self._kept += [one for one in came if one[0] not in wanted]
        return ours

    def in_task_order(self, tasks: Sequence[Task], version: Version) -> Iterator[Answer]:
        """Hand tasks in, and take the answers in the order of tasks, whoever was faster."""
        for task in tasks:
            self.engine.submit(task, version)
        waiting, here = dict.fromkeys(tasks), dict[Task, Answer]()
        try:
            for task in tasks:
                while task not in here:
                    came = dict(self.take(waiting))
                    assert came, f"the engine has no answer to {task}"
                    here |= came
                    for one in came:
                        del waiting[one]
                yield here.pop(task)
        finally:  # nobody may want the rest
            for task in waiting:
                self.engine.cancel(task)
            for answer in here.values():
                if isinstance(answer, Update):
                    answer.let_go()


def fitted(engine: Engine, tasks: Sequence[FitTask], version: Version) -> Iterator[Update]:
    """Updates in the order of tasks; each is let go when the next is asked for."""
    for answer in Mailbox(engine).in_task_order(tasks, version):
        assert isinstance(answer, Update)
        try:
            yield answer
        finally:
            answer.let_go()
    engine.settle()
