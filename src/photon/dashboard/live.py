"""The progress of a run in the terminal: a live view, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from photon.dashboard import wording
from photon.dashboard.frame import Frame
from photon.dashboard.progress import RunProgress
from photon.telemetry import Event, Listener, events

#: Seconds between two renderings while nothing but steps goes by.
_FRAME_S = 0.2
#: The view lives in the training process: it may spend this share of one core, over any while.
_BUDGET = 0.004
#: Seconds of rendering it may save up, so that a change of phase shows at once.
_SAVINGS_S = 0.05
#: A log says something at least so often while a node trains, if run.log_every lets it.
_LINE_S = 10.0


def progress_view(console: Console | None = None, *, label: Callable[[], str] = str) -> Listener:
    """The live view on a terminal, plain lines in a pipe or CI. Standard error by default.

    Args:
        label: gives what a plain line begins with.
    """
    if console is None:
        console = _StandardError(stderr=True)
    # CI systems set FORCE_COLOR to have colours in logs, which makes rich believe in a terminal.
    real = console.file.isatty() or not os.environ.get("FORCE_COLOR")
    return LiveView(console) if console.is_interactive and real else PlainView(console, label=label)


class _StandardError(Console):
    """Raises where rich would end the process: a view is no reason to."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError at hand


class LiveView:
    """A listener that redraws one frame in place.

    Events are folded as they come (microseconds). Rendering takes a few milliseconds, so it is
    rationed: at most 5 frames a second, and over time no more than 0.4% of one core, however many
    events there are. There is no thread: a frame is drawn on an event, and at close.

    Args:
        console: where to; its height caps the number of silos shown.
        clock: seconds; tests put their own.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.progress = RunProgress()
        self.frames = 0
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._gone = False
        self._drawn_s = float("-inf")
        self._earned_s = clock()
        self._savings_s = _SAVINGS_S

    def on_event(self, event: Event) -> None:
        self.progress.fold(event)
        if self._gone:
            return
        try:
            if self._live is None:
                self._start()
                self._draw()
            elif self._may_draw(not isinstance(event, events.LocalProgress | events.LocalFinished)):
                self._draw()
        except OSError:
            # The terminal is gone (a dropped connection). Training goes on without an audience.
            self._gone = True
            self.close()

    def close(self) -> None:
        """Draws the last frame and leaves it on the screen; closing twice does no harm."""
        live, self._live = self._live, None
        if live is None:
            return
        with contextlib.suppress(OSError):
            live.stop()  # Draws once more.

    def _start(self) -> None:
        # A redirected standard output (--json > file) must not end up in the view's console.
        self._live = Live(
            Frame(self.progress),
            console=self._console,
            auto_refresh=False,
            transient=False,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()

    def _may_draw(self, milestone: bool) -> bool:
        now_s = self._clock()
        earned_s = (now_s - self._earned_s) * _BUDGET
        self._savings_s = min(_SAVINGS_S, self._savings_s + earned_s)
        self._earned_s = now_s
        # Steps leave half of the savings to milestones.
        floor_s = 0.0 if milestone else _SAVINGS_S / 2
        return now_s - self._drawn_s >= _FRAME_S and self._savings_s > floor_s

    def _draw(self) -> None:
        if self._live is None:
            return
        begin_s = self._clock()
        self._live.refresh()
        self._drawn_s = self._clock()
        self._savings_s -= self._drawn_s - begin_s
        self.frames += 1


class PlainView(Listener):
    """A listener that prints one readable line per milestone, and some on the way, for logs.

    Args:
        label: gives what a line begins with.
    """

    def __init__(self, console: Console, *, label: Callable[[], str] = str) -> None:
        self.progress = RunProgress()
        self._console = console
        self._label = label
        self._told_s = 0.0
        self._waits_for: str | None = None

    def on_event(self, event: Event) -> None:
        self.progress.fold(event)
        line = self._line(event)
        if line is not None:
            self._told_s = self.progress.now_s
            with contextlib.suppress(OSError):  # nobody reads it any more; training goes on
                self._console.print(
                    wording.one_line(self._label() + line),
                    markup=False,
                    highlight=False,
                    emoji=False,
                    soft_wrap=True,
                )

    def _line(self, event: Event) -> str | None:
        match event:
            case events.RunStarted():
                return _describe_start(event)
            # Of one rank there was nothing to choose.
            case events.ComputeChosen() if event.ranks > 1:
                return (
                    f"node {event.worker} trains with {event.strategy} on "
                    f"{wording.several(event.ranks, 'rank')}: {event.reason}"
                )
            case events.LocalProgress() if self.progress.now_s - self._told_s >= _LINE_S:
                return f"{self._round(event.round)} {event.silo}: {self._describe_step(event)}"
            case events.Standing():
                told, self._waits_for = self._waits_for, event.waits_for
                return f"waits {event.waits_for}" if event.waits_for not in (None, told) else None
            case events.Notice():
                where = f"{self._round(event.round)} {event.silo}".rstrip()
                return f"{where}: {event.text}"
            case events.UpdateDropped():
                return f"{self._round(event.round)} dropped {event.silo}: {event.reason}"
            case events.WorkerLost():
                return (
                    f"{self._round(event.round)} lost worker {event.worker} while it trained "
                    f"{event.silo}: {event.reason}"
                )
            case events.Evaluated(silo=None):
                when = self._round(event.round) if event.round else "before training"
                return f"{when} evaluated: {self._describe_evaluation(event)}"
            case events.RoundFinished():
                return f"{self._round(event.round)} finished: {self._describe_round(event)}"
            case events.RunStopped():
                return f"run stopped in round {event.round}: {event.reason}; it can be resumed"
            case events.RunFinished():
                progress = self.progress
                return (
                    f"run finished: {wording.count(progress.total_tokens)} tokens in "
                    f"{wording.duration(progress.now_s)}"
                )
        return None

    def _round(self, number: int) -> str:
        total = str(self.progress.rounds or "?")
        return f"round {number:>{len(total)}}/{total}"

    def _describe_step(self, event: events.LocalProgress) -> str:
        parts = [f"step {event.step}/{self.progress.local_steps}"]
        if event.loss is not None:
            parts.append(f"loss {wording.decimal(event.loss)}")
        if event.tokens_per_s is not None:
            parts.append(f"{wording.count(event.tokens_per_s)} tokens/s")
        return ", ".join(parts)

    def _describe_evaluation(self, event: events.Evaluated) -> str:
        before = self.progress.evaluation_before
        was = f" (was {wording.perplexity(before.perplexity)})" if before is not None else ""
        return (
            f"perplexity {wording.perplexity(event.perplexity, 'diverged')}{was}, "
            f"loss {wording.decimal(event.loss)}, "
            f"{wording.decimal(event.bits_per_byte)} bits per byte"
        )

    def _describe_round(self, event: events.RoundFinished) -> str:
        row = self.progress.history[-1]
        parts = []
        if row.train_loss is not None:
            parts.append(f"train loss {wording.decimal(row.train_loss)}")
        parts.append(f"{wording.count(event.tokens)} tokens")
        moved = {"up": event.bytes_up, "down": event.bytes_down}
        parts += [f"{way} {wording.size(number)}" for way, number in moved.items() if number]
        parts.append(wording.duration(event.round_s))
        if event.dropped:
            parts.append(f"dropped {', '.join(event.dropped)}")
        left_s = self.progress.left_s
        if left_s:
            parts.append(f"about {wording.duration(left_s)} left")
        return ", ".join(parts)


def _describe_start(event: events.RunStarted) -> str:
    silos = wording.several(len(event.silos), "silo")
    resumed = event.resumed_from_round
    again = f", resumed after round {resumed}" if resumed is not None else ""
    return (
        f"{event.kind} {event.run}: {wording.count(event.parameters)} parameters, {silos}, "
        f"{wording.several(event.rounds, 'round')} of {event.local_steps} local steps, "
        f"{event.device} {event.precision}{again}"
    )
