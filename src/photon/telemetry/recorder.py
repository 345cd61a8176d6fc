"""Sends events to whoever listens: the JSONL file, TensorBoard, the live view."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from photon.telemetry.events import Event, finite


class Listener(Protocol):
    """Something that is told every event, in order."""

    def on_event(self, event: Event) -> None: ...

    def close(self) -> None:
        """Put away what is open; by default nothing is."""


class Recorder:
    """Stamps events with the run's clock and hands them to listeners.

    Args:
        listeners: told in this order; the file goes first, so what a person saw is on disk.
        elapsed_s: seconds the run had already run before this process took it up.
    """

    def __init__(
        self,
        listeners: Sequence[Listener] = (),
        *,
        elapsed_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._listeners = list(listeners)
        self._clock = clock
        self._zero_s = clock() - elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds the run has run, over all its processes."""
        return self._clock() - self._zero_s

    def emit(self, event: Event) -> None:
        stamped = event.model_copy(update={"time_s": round(self.elapsed_s, 4)})
        for listener in self._listeners:
            listener.on_event(stamped)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


class JsonlWriter:
    """Appends events to a file, a line at a time, flushed: a killed run keeps every whole line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        # A kill may have cut the last line; closing it keeps the next event readable.
        if self._file.seek(0, 2):
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def on_event(self, event: Event) -> None:
        record = {"event": event.name, **event.model_dump(mode="json")}
        # JSON has no NaN, and an event can be copied past its checks.
        line = json.dumps(finite(record), separators=(",", ":"), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
