"""A bar for each of several runs that go on at a time; lines with their names where no terminal is.

`photon.dashboard.progress_view` shows one run, and has the terminal to itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from photon.dashboard import PlainView
from photon.dashboard.progress import RunProgress
from photon.dashboard.wording import one_line, perplexity
from photon.telemetry import Event, Listener


@contextlib.contextmanager
def run_bars(console: Console, names: Mapping[str, str]) -> Iterator[dict[str, Listener]]:
    """Listeners by the keys of `names`, whose values are what a person reads.

    On a terminal a bar each, otherwise plain lines that begin with the run's name.
    """
    if not (console.is_interactive and console.file.isatty()):
        yield {key: PlainView(console, label=f"{name}: ".__str__) for key, name in names.items()}
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # silos' names
        BarColumn(),
        TextColumn("{task.fields[standing]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Listener] = {}
        for key, name in names.items():
            task = progress.add_task(one_line(name), total=1.0, start=False, standing="waiting")
            bars[key] = _Bar(progress, task)
        yield bars


@dataclass(frozen=True)
class _Bar(Listener):
    """One run's bar: how much of it is done, and the perplexity it has come to."""

    progress: Progress
    task: TaskID
    run: RunProgress = field(default_factory=RunProgress)

    def on_event(self, event: Event) -> None:
        if self.run.started is None:
            self.progress.start_task(self.task)
        self.run.fold(event)
        self.progress.update(self.task, completed=self.run.share_done, standing=self._standing())
        if self.run.finished:
            self.progress.stop_task(self.task)

    def _standing(self) -> str:
        told = f"round {self.run.round}/{self.run.rounds}"
        if self.run.evaluation is not None:
            told += f", perplexity {perplexity(self.run.evaluation.perplexity, 'diverged')}"
        return told
