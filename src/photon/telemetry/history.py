"""Reading a run's events back: as a list, and as one history without superseded rounds."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from photon.errors import RunError, RunNotFoundError, first_fault
from photon.telemetry.events import Event, RunFinished, RunStarted, parse_event

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, repr=False)
class RunHistory:
    """A run as it counts: rounds that a resume took back are left out.

    Attributes:
        folder: the run folder.
        events: in order.
        superseded: how many events belonged to rounds that a resume ran again.
    """

    folder: Path
    events: list[Event] = field(default_factory=list)
    superseded: int = 0

    def __repr__(self) -> str:
        kinds = Counter(type(event).__name__ for event in self.events)
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        return f"RunHistory({str(self.folder)!r}: {counts or 'no events'})"

    @classmethod
    def of_events(cls, folder: Path, events: Iterable[Event]) -> RunHistory:
        """Takes events as written and leaves out those of rounds that a later resume ran again."""
        kept: list[Event] = []
        superseded = 0
        for event in events:
            if isinstance(event, RunStarted) and event.resumed_from_round is not None:
                before = len(kept)
                kept = [old for old in kept if getattr(old, "round", 0) <= event.resumed_from_round]
                superseded += before - len(kept)
                # A run that was extended is no longer finished.
                kept = [old for old in kept if not isinstance(old, RunFinished)]
            kept.append(event)
        return cls(folder, kept, superseded)

    def of(self, kind: type[E]) -> list[E]:
        """All events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def started(self) -> RunStarted:
        """The newest start; raises RunNotFoundError when there is none."""
        starts = self.of(RunStarted)
        if not starts:
            raise RunNotFoundError(f"{self.folder}: events.jsonl has no run_started event")
        return starts[-1]

    @property
    def summary(self) -> dict[str, Any] | None:
        """What summary.json holds; None while the run is not finished."""
        finished = self.of(RunFinished)
        return finished[-1].summary if finished else None

    def table(self, kind: type[Event]) -> dict[str, list[Any]]:
        """Columns of one kind of event, ready for pandas.DataFrame or a plot."""
        rows = self.of(kind)
        return {name: [getattr(row, name) for row in rows] for name in kind.model_fields}


def read_events(folder: str | os.PathLike[str]) -> Iterator[Event]:
    """Every event in DIR/events.jsonl as written; a line cut by a kill is passed over.

    Raises:
        RunNotFoundError: no such file, or it can't be read.
        RunError: a whole line that is not what its event should be.
    """
    path = Path(folder) / "events.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise RunNotFoundError(
            f"no run in {folder}: {path} does not exist",
            hint="Name a folder that `photon simulate`, `photon train` or `photon serve` made.",
        ) from None
    except OSError as error:
        raise RunNotFoundError(f"no run in {folder}: {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        try:
            event = parse_event(record) if isinstance(record, dict) else None
        except ValidationError as error:
            raise RunError(
                f"{path}, line {number}: event {record['event']!r} is bad: {first_fault(error)}",
                hint="it was written by another version of Photon, or changed by hand",
            ) from error
        if event is not None:
            yield event


def read_history(folder: str | os.PathLike[str]) -> RunHistory:
    """A run's events without the rounds that a later resume ran again."""
    return RunHistory.of_events(Path(folder), read_events(folder))
