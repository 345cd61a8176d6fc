"""One frame of the live view, drawn as styled lines: about a millisecond.

rich's tables and progress bars measure and wrap every cell; at this frame's size that costs several
times as much, in the process that trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from photon.dashboard import wording
from photon.dashboard.progress import RoundRow, RunProgress, SiloProgress

#: A line: texts with their styles.
Line = list[tuple[str, str]]

#: Of a silo's state: its mark, its style, and its place where there is no room for all.
_STATES = {
    "waiting": ("·", "dim", 3),
    "training": ("▸", "cyan", 1),
    "done": ("✓", "green", 2),
    "dropped": ("✗", "yellow", 0),
    "away": ("?", "yellow", 0),
}
_HISTORY_ROWS = 5
_WIDEST = 120


class Frame:
    """A rich renderable of where a run stands; always within the width and height it is given."""

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(20, min(options.max_width, _WIDEST))
        # One row stays free: a full screen would scroll the frame's top out of reach.
        for line in frame_lines(self._progress, width, max(8, console.size.height - 1)):
            text = Text.assemble(*line)
            text.truncate(min(width, options.max_width), overflow="ellipsis")
            yield from text.render(console, "\n")


def frame_lines(progress: RunProgress, width: int, height: int) -> list[Line]:
    """All lines of a frame; silos, then past rounds, give way when the terminal is low."""
    header = list(_header(progress, width))
    footer = [*_evaluation(progress), *_totals(progress)]
    rows = list(progress.history)[-_HISTORY_ROWS:]
    room = height - len(header) - len(footer) - 3
    if room < len(rows) + min(len(progress.silos), 4) + 3:
        rows = rows[-1:]
    history = list(_history(rows, progress, width))
    room -= len(history)
    silos = list(_silos(progress, width, max(2, room)))
    blocks = [header, silos, footer, history]
    lines: list[Line] = []
    for block in blocks:
        if block and lines:
            lines.append([])
        lines.extend(block)
    return lines[:height]


def bar(share: float, cells: int) -> Line:
    """A progress bar of so many cells."""
    full = round(min(1.0, max(0.0, share)) * cells)
    return [("━" * full, "cyan"), ("─" * (cells - full), "bright_black")]


def _header(progress: RunProgress, width: int) -> Iterator[Line]:
    started = progress.started
    if started is None:
        yield [("Photon ", "bold"), ("starting", "dim")]
        return
    facts = [
        f"{wording.count(started.parameters)} parameters",
        f"{len(started.silos)} {'silo' if len(started.silos) == 1 else 'silos'}",
        f"{started.device} {started.precision}",
    ]
    if started.resumed_from_round is not None:
        facts.append(f"resumed after round {started.resumed_from_round}")
    yield [
        (f"photon {started.kind} ", "dim"),
        (wording.one_line(started.run), "bold"),
        ("  " + " · ".join(facts), "dim"),
    ]
    done = f" {progress.rounds_done}/{progress.rounds} "
    times = f"  {wording.clock(progress.now_s)} elapsed · {_left(progress)}"
    label = "Rounds "
    cells = max(8, width - len(label) - len(done) - len(times))
    share = 1.0 if progress.finished else progress.share_done
    yield [(label, "bold"), *bar(share, cells), (done, "bold"), (times, "dim")]


def _left(progress: RunProgress) -> str:
    if progress.finished:
        return "finished"
    if progress.waits_for is not None:
        return "waiting"
    if progress.stopped is not None:
        return "stopped"
    left_s = progress.left_s
    return "time left after a round" if left_s is None else f"{wording.clock(left_s)} left"


def _silos(progress: RunProgress, width: int, room: int) -> Iterator[Line]:
    if progress.waits_for is not None:
        yield [("Waits ", "bold"), (wording.one_line(progress.waits_for), "")]
        return
    if progress.stopped is not None:
        yield [
            (f"Stopped in round {progress.stopped.round} ", "yellow"),
            (wording.one_line(progress.stopped.reason), ""),
        ]
        return
    if progress.finished or not progress.silos:
        return
    yield [(f"Round {progress.round} ", "bold"), (progress.phase, "dim")]
    silos = list(progress.silos.values())
    shown = silos
    if len(silos) > room - 1:
        chosen = sorted(silos, key=lambda s: _STATES[_state(s, progress)][2])[: max(1, room - 2)]
        shown = [silo for silo in silos if silo in chosen]
    names = wording.distinct((silo.name for silo in silos), max(10, width // 4))
    widest = max(cell_len(name) for name in names.values())
    for silo in shown:
        name = set_cell_size(names[silo.name], widest)
        yield _silo_line(silo, name, _state(silo, progress), progress.local_steps, width)
    if len(shown) < len(silos):
        counts = Counter(_state(silo, progress) for silo in silos if silo not in shown)
        parts = [f"{number} {state}" for state, number in counts.items()]
        yield [(f"  … and {counts.total()} more ({', '.join(parts)})", "dim")]


def _state(silo: SiloProgress, progress: RunProgress) -> str:
    return "away" if silo.name in progress.away and silo.state != "dropped" else silo.state


def _silo_line(silo: SiloProgress, name: str, state: str, local_steps: int, width: int) -> Line:
    mark, style, _ = _STATES[state]
    shown = (name, "" if state != "waiting" else "dim")
    line: Line = [(f"  {mark} ", style), shown, (f"  {state:<8}  ", style)]
    if silo.note and state in ("dropped", "waiting"):
        return [*line, (wording.one_line(silo.note), "dim")]
    digits = len(str(local_steps))
    steps = f" {silo.step:>{digits}}/{local_steps}"
    loss = f"  loss {wording.decimal(silo.loss):>6}"
    rest = f"{loss}  {wording.count(silo.tokens_per_s):>5} tokens/s"
    used = 4 + cell_len(name) + 12 + len(steps) + len(rest)
    cells = max(4, min(40, width - used))
    share = silo.step / local_steps if local_steps else 0.0
    return [*line, *bar(share, cells), (steps, ""), (rest, "")]


def _evaluation(progress: RunProgress) -> Iterator[Line]:
    last, before = progress.evaluation, progress.evaluation_before
    if last is None:
        return
    line: Line = [
        ("Held-out  ", "bold"),
        ("perplexity ", "dim"),
        (wording.perplexity(last.perplexity, "diverged"), "bold"),
    ]
    if before is not None and last.perplexity is not None and before.perplexity is not None:
        side = "green" if last.perplexity < before.perplexity else "yellow"
        line.append((" " + change(last.perplexity, before.perplexity), side))
    line += [
        ("   loss ", "dim"),
        (wording.decimal(last.loss), ""),
        ("   bits per byte ", "dim"),
        (wording.decimal(last.bits_per_byte), ""),
        (f"   round {last.round}", "dim"),
    ]
    yield line


def change(now: float, before: float) -> str:
    """How a perplexity moved, with an arrow: `▼ 4.2`."""
    difference = now - before
    arrow = "▼" if difference < 0 else "▲" if difference > 0 else "="
    return f"{arrow} {wording.perplexity(abs(difference))}"


def _totals(progress: RunProgress) -> Iterator[Line]:
    if not progress.total_tokens:
        return
    speed, last = progress.tokens_per_s, progress.history[-1].finished
    moved = {"up": last.total_bytes_up, "down": last.total_bytes_down}
    parts = [f"{wording.count(last.total_tokens)} tokens"]
    parts += [f"{wording.size(number)} {way}" for way, number in moved.items() if number]
    if speed is not None:
        parts.append(f"{wording.count(speed)} tokens/s")
    if progress.updates_dropped:
        parts.append(f"{progress.updates_dropped} dropped")
    if progress.workers_lost:
        parts.append(f"{progress.workers_lost} workers lost")
    yield [("Totals    ", "bold"), (" · ".join(parts), "")]


def _history(rows: list[RoundRow], progress: RunProgress, width: int) -> Iterator[Line]:
    if not rows:
        return
    digits = max(5, len(str(progress.rounds)))
    roomy = width >= 72
    head = f"{'Round':>{digits}}  train loss  perplexity"
    if roomy:
        head += f"  {'up':>9}  {'down':>9}  {'time':>12}  dropped"
    yield [(head, "dim")]
    for done, train_loss, perplexity in rows:
        loss = wording.decimal(train_loss)
        text = f"{done.round:>{digits}}  {loss:>10}  {wording.perplexity(perplexity):>10}"
        if not roomy:
            yield [(text, "")]
            continue
        up, down = wording.size(done.bytes_up), wording.size(done.bytes_down)
        text += f"  {up:>9}  {down:>9}  {wording.duration(done.round_s):>12}"
        dropped = f"  {len(done.dropped) or '–':>7}"
        yield [(text, ""), (dropped, "yellow" if done.dropped else "dim")]
