"""The engine of a federation some of whose participants are groups, which work in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from photon.config import RunConfig
from photon.config.children import inside
from photon.federation import Answer, Engine, FitTask, Task, Version
from photon.federation.group import Group
from photon.telemetry import Event
from photon.telemetry.events import RoundStarted


class GroupEngine:
    """Hands a group's tasks to the group and all others to the engine below.

    A group works when nobody else does: its members are behind the same engine.
    """

    def __init__(self, engine: Engine, groups: Mapping[str, Group]) -> None:
        self._engine, self._groups = engine, groups
        self.processes, self.settle, self.close = engine.processes, engine.settle, engine.close
        self._waiting: deque[tuple[FitTask, Version]] = deque()
        self._out: set[Task] = set()

    @property
    def now_s(self) -> float:
        return self._engine.now_s

    def submit(self, task: Task, version: Version) -> None:
        if isinstance(task, FitTask) and task.silo in self._groups:
            self._waiting.append((task, version))
        else:
            self._out.add(task)
            self._engine.submit(task, version)

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        if self._out or not self._waiting:
            came = self._engine.arrivals(timeout_s)
            self._out.difference_update(task for task, _ in came)
            return came
        task, version = self._waiting.popleft()
        return [(task, self._groups[task.silo].fit(task, version))]

    def cancel(self, task: Task) -> str:
        self._waiting = deque(one for one in self._waiting if one[0] != task)
        self._out.discard(task)
        return self._engine.cancel(task)


def with_groups(
    engine: Engine,
    config: RunConfig,
    silo_tokens: Mapping[str, int],
    folder: Path,
    on_event: Callable[[Event], None],
) -> Engine:
    """An engine that reaches groups too, at any depth; see `Group` for the arguments."""
    groups: dict[str, Group] = {}
    for name, child in config.federation.children.items():
        below = with_groups(engine, inside(config, child), silo_tokens, folder, on_event)
        groups[name] = Group(name, config, silo_tokens, below, folder, on_event)
    return GroupEngine(engine, groups) if groups else engine


def in_the_round(on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Tells events from inside groups under the number of the run's round, which they are part of.

    Nothing is trained outside the newest round: groups go with synchronous rounds only.
    """
    current = 0

    def tell(event: Event) -> None:
        nonlocal current
        if isinstance(event, RoundStarted):
            current = event.round
        elif getattr(event, "silo", None):
            event = event.model_copy(update={"round": current})
        on_event(event)

    return tell
