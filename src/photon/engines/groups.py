"""The engine of a federation some of whose participants are groups, which work in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from photon.config import RunConfig
from photon.config.children import inside, participants
from photon.federation import Answer, Engine, EvalTask, FitTask, FixedFleet, Task, Version
from photon.federation.checkpoint import RunState
from photon.federation.group import Group
from photon.federation.own_parts import as_seen, way_to
from photon.telemetry import Event
from photon.telemetry.events import RoundStarted


class GroupEngine:
    """Hands a group's tasks to the group and all others to the engine below.

    A group works when nobody else does: its members are behind the same engine.
    """

    def __init__(
        self, engine: Engine, groups: Mapping[str, Group], config: RunConfig, folder: Path
    ) -> None:
        self._engine, self._groups, self._config, self._folder = engine, groups, config, folder
        self._seen: dict[tuple[Version, Sequence[str]], Version] = {}
        self.processes, self.settle, self.close = engine.processes, engine.settle, engine.close
        self._waiting: deque[tuple[FitTask, Version]] = deque()
        self._out: dict[Task, Task] = {}  # as handed on, and as asked

    @property
    def now_s(self) -> float:
        return self._engine.now_s

    def submit(self, task: Task, version: Version) -> None:
        if isinstance(task, FitTask) and task.silo in self._groups:
            self._waiting.append((task, version))
            return
        handed = task
        if isinstance(task, EvalTask) and task.node_round is not None and task.silo:
            number, version = self._as_seen(task.silo, task.node_round, version)
            handed = replace(task, node_round=number)
        self._out[handed] = task
        self._engine.submit(handed, version)

    def _as_seen(self, silo: str, number: int, version: Version) -> tuple[int | None, Version]:
        """What a group's member scores with: the round that it knows, and the group's version."""
        way = tuple(way_to(self._config.federation.children, silo))
        if len(way) == 1:
            return number, version
        run = RunState(node_rounds={way[0]: number})
        state, own = as_seen(self._config.parts, self._folder, way, version.tensors, run)
        if (version, way[:-1]) not in self._seen:
            if all(seen is not version for seen, _ in self._seen):
                self._seen.clear()  # of versions of before
            self._seen[version, way[:-1]] = replace(version, tensors=state)
        return own, self._seen[version, way[:-1]]

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        if self._out or not self._waiting:
            came = self._engine.arrivals(timeout_s)
            return [(self._out.pop(task, task), answer) for task, answer in came]
        task, version = self._waiting.popleft()
        return [(task, self._groups[task.silo].fit(task, version))]

    def cancel(self, task: Task) -> str:
        self._waiting = deque(one for one in self._waiting if one[0] != task)
        self._out.pop(task, None)
        return self._engine.cancel(task)


def with_groups(
    engine: Engine,
    config: RunConfig,
    silo_tokens: Mapping[str, int],
    folder: Path,
    on_event: Callable[[Event], None],
    key: Sequence[str] = (),
    above: str = "",
) -> Engine:
    """An engine that reaches groups too, at any depth below a path; for arguments see `Group`.

    Args:
        silo_tokens: to train on, by silo of the data.
    """
    groups: dict[str, Group] = {}
    for name, child in config.federation.children.items():
        path, within = above + name, inside(config, child)
        below = with_groups(engine, within, silo_tokens, folder, on_event, key, f"{path}/")
        tokens = {silo: silo_tokens[silo] for silo in child.silos_of(name)}
        fleet = FixedFleet(participants(child.children, tokens))
        if child.nodes is not None:
            shares = {f"{name}.{j}": tokens[name] // child.nodes for j in range(child.nodes)}
            fleet = FixedFleet(shares, texts=(name,))
        groups[name] = Group(path, config, fleet, below, folder, on_event, key)
    return GroupEngine(engine, groups, config, folder) if groups else engine


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
