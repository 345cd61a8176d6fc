"""The live view's frame, its rationing, and the plain lines."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from photon.dashboard import PlainView, progress_view
from photon.dashboard.frame import Frame, change
from photon.dashboard.live import LiveView
from photon.dashboard.progress import RunProgress
from photon.telemetry.events import (
    ComputeChosen,
    LocalFinished,
    LocalProgress,
    Notice,
    RoundFinished,
    RunStarted,
    Standing,
    UpdateDropped,
    WorkerLost,
)


def draw(events, *, width=80, height=30):
    """The lines of the frame after these events."""
    progress = RunProgress()
    for event in events:
        progress.fold(event)
    console = Console(
        width=width, height=height, force_terminal=True, record=True, file=io.StringIO()
    )
    console.print(Frame(progress), end="")
    lines = console.export_text().splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) < height
    return lines


def until(events, kind, nth=1):
    """Events up to and with the n-th of a kind."""
    taken = []
    for event in events:
        taken.append(event)
        nth -= isinstance(event, kind)
        if nth == 0:
            return taken
    raise AssertionError("the stream has no such event")


def row(lines, name):
    return next(line for line in lines if name in line and "photon" not in line)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_frame_shows_the_run_the_silos_and_their_losses(stream, width):
    made = stream()
    events = until(made.whole(), LocalProgress, 16 + 6)  # round 2, second silo, second report
    lines = draw(events, width=width)
    text = "\n".join(lines)

    assert "photon simulate presidents" in lines[0]
    assert "1.1M parameters" in lines[0]
    assert "4 silos" in lines[0]
    assert "1/6" in lines[1]
    assert "Round 2 training" in text
    done, training, waiting = (row(lines, n) for n in ("democratic", "republican", "judicial"))
    if width >= 80:
        last = events[-1]
        assert "done" in done
        assert "32/32" in done
        assert "training" in training
        assert "16/32" in training
        assert f"loss  {last.loss:.3f}" in training
        assert "16.4k tokens/s" in training
        assert "0/32" in waiting
    assert "waiting" in waiting


def test_bars_are_as_long_as_the_work_done(stream):
    lines = draw(until(stream().whole(), LocalProgress, 2), width=120)
    bar = re.search(r"[━─]+", row(lines, "democratic"))
    assert bar is not None
    assert bar.group().count("━") == len(bar.group()) / 2


def test_the_last_evaluation_its_change_totals_and_history_are_there(stream):
    lines = draw(until(stream().whole(), RoundFinished, 2), width=100)
    held_out, totals = row(lines, "Held-out"), row(lines, "Totals")
    assert "perplexity 172 ▼ 61.2" in held_out
    assert "loss 5.145" in held_out
    assert "round 2" in held_out
    assert "524k tokens · 35.2 MB up · 35.2 MB down · 13.5k tokens/s" in totals
    assert lines[-1].split()[:7] == ["2", "5.195", "172", "17.6", "MB", "17.6", "MB"]
    assert "19 s" in lines[-1]


def test_the_time_left_is_the_mean_round_times_the_rounds_left(stream):
    events = until(stream().whole(), RoundFinished, 2)
    progress = RunProgress()
    for event in events:
        progress.fold(event)
    assert progress.left_s == pytest.approx(4 * events[-1].round_s, rel=0.02)
    assert "1:17 left" in draw(events)[1]


def test_no_time_left_is_invented_before_a_round_is_over(stream):
    assert "time left after a round" in draw(until(stream().whole(), LocalProgress))[1]


def test_a_dropped_update_shows_its_reason(stream):
    events = until(stream(dropped={1: "judicial"}).whole(), UpdateDropped)
    line = row(draw(events), "judicial")
    assert "dropped" in line
    assert "3 values that are not finite" in line


def test_a_lost_worker_sends_its_silo_back_to_waiting(stream):
    events = until(stream(lost={1: "judicial"}).whole(), WorkerLost)
    line = row(draw(events, width=100), "judicial")
    assert "waiting" in line
    assert "worker lost" in line


@pytest.mark.parametrize("height", [10, 16, 24, 50])
def test_many_clients_are_cut_to_the_terminal_and_only_the_sampled_show(stream, height):
    made = stream(silos=[f"client-{i:02d}" for i in range(64)], sample=24, per_silo=False)
    lines = draw(until(made.whole(), LocalFinished, 24 + 9), height=height)
    shown = [line for line in lines if "client-" in line]
    if height < 50:
        more = row(lines, "… and ")
        assert int(re.search(r"(\d+) more", more).group(1)) == 24 - len(shown)
    else:
        assert len(shown) == 24
    sampled = {f"client-{(6 + i) % 64:02d}" for i in range(24)}
    assert {re.search(r"client-\d\d", line).group() for line in shown} <= sampled


def test_names_that_are_long_wide_or_hostile_do_not_break_the_layout(stream):
    names = ["x" * 90, "東京大学病院東京大学病院東京大学病院", "[bold red]two\nlines\x1b[2J", "[/]"]
    lines = draw(until(stream(silos=names).whole(), LocalProgress, 14), width=80)
    assert any("xxx…" in line for line in lines)
    assert any("[/]" in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_a_resumed_run_starts_where_it_stood(stream):
    made = stream()
    events = list(made.resumed(stop_in=4))
    at = next(i for i, e in enumerate(events) if isinstance(e, RunStarted) and i)
    lines = draw(events[at : at + 3], width=120)
    assert "resumed after round 3" in lines[0]
    assert "3/6" in lines[1]


def test_a_stop_and_an_end_are_said(stream):
    made = stream()
    events = until(made.whole(), RoundFinished)
    assert "Stopped in round 2 interrupted by Ctrl-C" in "\n".join(draw([*events, made.stopped(2)]))
    assert "finished" in draw(stream().whole())[1]


def test_a_train_run_and_an_empty_run_draw(stream):
    made = stream(silos=["centralised"], kind="train", per_silo=False)
    assert "photon train presidents" in draw(until(made.whole(), LocalProgress))[0]
    assert draw([]) == ["Photon starting"]


def test_a_diverged_perplexity_is_words(stream):
    made = stream(first_loss=float("inf"), rounds=2)
    assert "diverged" in row(draw(made.whole()), "Held-out")
    assert change(3.0, 3.0) == "= 0.00"


def test_a_line_is_cut_by_cells_and_the_cut_is_marked(stream):
    title = "photon simulate 東京"
    for width, shown in ((20, "photon simulate 東 …"), (21, "photon simulate 東京…")):
        assert draw([stream(run="東京").started()], width=width)[0] == shown
    told = draw([stream(run="東京").started()], width=120)[0]
    assert told.startswith(title)
    assert "…" not in told


class Clock:
    """A clock that drawing moves on."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_rendering_is_rationed_over_time_and_at_most_five_a_second(stream):
    clock = Clock()
    console = Console(width=80, height=30, force_terminal=True, file=io.StringIO())
    view = LiveView(console, clock=clock)
    made = stream(rounds=200, log_every=1)
    view.on_event(made.started())
    live = view._live
    refresh, drawn_at = live.refresh, []

    def slow_refresh():
        refresh()
        drawn_at.append(clock.now_s)
        clock.now_s += 0.003  # What a slow machine may need for a frame.

    live.refresh = slow_refresh
    began_s = clock.now_s
    for number in range(1, made.rounds + 1):
        for event in made.round(number):
            clock.now_s += 0.01
            view.on_event(event)
    passed_s = clock.now_s - began_s
    assert passed_s > 200
    gaps = [b - a for a, b in itertools.pairwise(drawn_at)]
    assert min(gaps) >= 0.2
    assert len(drawn_at) * 0.003 <= 0.004 * passed_s + 0.05 + 0.003
    assert len(drawn_at) > 0.8 * passed_s  # And yet the view moves.
    view.close()


def test_the_last_frame_stays_on_the_screen_and_closing_twice_is_fine(stream):
    file = io.StringIO()
    view = LiveView(Console(width=100, height=30, force_terminal=True, file=file))
    for event in stream().whole():
        view.on_event(event)
    view.close()
    view.close()
    last = file.getvalue().rsplit("photon simulate", 1)[1]
    assert "6/6" in last
    assert "finished" in last


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_a_stream_that_takes_nothing_does_not_end_the_run(stream, monkeypatch, terminal, fault):
    class Gone(io.StringIO):
        def write(self, text):
            raise fault

        def isatty(self):
            return terminal

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr", Gone())
    view = progress_view()
    assert isinstance(view, LiveView if terminal else PlainView)
    for event in stream(rounds=2).whole():
        view.on_event(event)
    view.close()


def test_plain_lines_say_what_happened(stream):
    file = io.StringIO()
    view = PlainView(Console(file=file, width=40))
    made = stream(rounds=3, dropped={3: "judicial"}, lost={2: "republican"})
    for event in made.whole():
        view.on_event(event)
    view.on_event(made.stopped(3))
    view.close()
    assert file.getvalue().splitlines() == [
        "simulate presidents: 1.1M parameters, four silos, three rounds of 32 local steps, "
        "cpu fp32",
        "before training evaluated: perplexity 812, loss 6.700, 2.148 bits per byte",
        "round 1/3 independent: step 16/32, loss 5.941, 16.4k tokens/s",
        "round 1/3 evaluated: perplexity 233 (was 812), loss 5.450, 1.747 bits per byte",
        "round 1/3 finished: train loss 5.500, 262k tokens, up 17.6 MB, down 17.6 MB, 19 s, "
        "about 39 s left",
        "round 2/3 lost worker 1 while it trained republican: exit code -9 (killed)",
        "round 2/3 independent: step 16/32, loss 5.426, 16.4k tokens/s",
        "round 2/3 evaluated: perplexity 172 (was 233), loss 5.145, 1.649 bits per byte",
        "round 2/3 finished: train loss 5.195, 262k tokens, up 17.6 MB, down 17.6 MB, 19 s, "
        "about 19 s left",
        "round 3/3 independent: step 16/32, loss 5.217, 16.4k tokens/s",
        "round 3/3 dropped judicial: update has 3 values that are not finite",
        "round 3/3 evaluated: perplexity 152 (was 172), loss 5.022, 1.610 bits per byte",
        "round 3/3 finished: train loss 5.072, 197k tokens, up 17.6 MB, down 17.6 MB, 19 s, "
        "dropped judicial",
        "run finished: 721k tokens in 57 s",
        "run stopped in round 3: interrupted by Ctrl-C; it can be resumed",
    ]


@pytest.mark.parametrize(("log_every", "lines"), [(1, 16), (16, 8), (32, 4)])
def test_a_log_tells_how_a_round_goes_as_often_as_the_run_is_told_to(stream, log_every, lines):
    file = io.StringIO()
    view = PlainView(Console(file=file, width=200))
    # A step of a silo takes 1.25 s: a line after ten of them, or at each report if that is later.
    for event in stream(rounds=1, round_s=200.0, log_every=log_every).whole():
        view.on_event(event)
    told = [line for line in file.getvalue().splitlines() if "tokens/s" in line]
    assert len(told) == lines
    words = r"round 1/1 democratic: step \d+/32, loss \d\.\d{3}, 1\.6k tokens/s"
    assert re.fullmatch(words, told[0])


def test_lines_of_a_log_may_begin_with_a_clock_and_tell_only_what_moved(stream):
    file, clock = io.StringIO(), iter(range(100))
    view = PlainView(Console(file=file, width=200), label=lambda: f"{next(clock):02} | ")
    none = {"bytes_down": 0, "total_bytes_down": 0}
    events = [
        event.model_copy(update=none) if isinstance(event, RoundFinished) else event
        for event in stream(rounds=1).whole()
    ]
    for event in events:
        view.on_event(event)
    lines = file.getvalue().splitlines()
    assert [line[:5] for line in lines] == [f"{i:02} | " for i in range(len(lines))]
    assert "up 17.6 MB, 19 s" in file.getvalue()
    assert "17.6 MB up · " in (frame := "".join(draw(events)))
    assert "0 B down" not in frame


def served(event):
    """The event as a silo elsewhere tells it: how far it is, and no figures."""
    if not isinstance(event, LocalProgress):
        return event
    nothing = dict.fromkeys(("loss", "lr", "gradient_norm", "tokens_per_s"), float("nan"))
    return LocalProgress(**vars(event) | nothing)


def test_figures_that_nobody_has_are_no_words(stream):
    events = [served(event) for event in stream(log_every=1).whole()]
    file = io.StringIO()
    view = PlainView(Console(file=file, width=200))
    for event in events:
        view.on_event(event)
    lines = draw(until(events, LocalProgress, 3))
    assert "3/32" in row(lines, "democratic")
    for text in ("\n".join(lines), file.getvalue()):
        assert not re.search(r"\b(nan|undefined|None|inf)", text, re.IGNORECASE)
    assert "step " in file.getvalue()


def test_a_run_that_stopped_and_waits_for_silos_says_what_for(stream):
    made = stream()
    events = [*until(made.whole(), RoundFinished), made.stopped(2)]
    waits = Standing(waits_for="for 4 silos for round 2, here: judicial", away=["republican"])
    lines = "\n".join(draw([*events, waits]))
    assert "Waits for 4 silos for round 2, here: judicial" in lines
    assert "waiting" in lines
    assert "topped" not in lines
    nothing = Standing(waits_for=None, away=[])
    assert "Waits" not in "\n".join(draw([*events, waits, made.started(resumed_from_round=1)]))
    assert "Stopped in round 2" in "\n".join(draw([*events, nothing]))
    assert "Stopped in round 2" in "\n".join(draw([*events, waits, made.stopped(2), nothing]))
    file = io.StringIO()
    view = PlainView(Console(file=file, width=200))
    for event in [*events, waits, waits, nothing]:
        view.on_event(event)
    assert file.getvalue().count("waits for 4 silos for round 2") == 1


def test_a_silo_that_is_gone_is_no_longer_said_to_be_done(stream):
    events = until(stream().whole(), LocalFinished)
    gone = Standing(waits_for=None, away=["democratic", "judicial"])
    lines = draw([*events, gone])
    assert "away" in row(lines, "democratic")
    assert "done" not in row(lines, "democratic")
    assert "away" not in row(lines, "republican")
    back = Standing(waits_for=None, away=[])
    assert "done" in row(draw([*events, gone, back]), "democratic")


def test_silos_with_long_names_can_be_told_apart(stream):
    codes = ("de", "en", "fr", "ja", "pt", "zh")
    names = [f"debian-descriptions-of-packages-{code}" for code in codes]
    lines = draw(until(stream(silos=names).whole(), LocalProgress))
    assert [len([line for line in lines if f"-{code} " in line]) for code in codes] == [1] * 6


def test_the_console_decides_which_view(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(progress_view(Console(force_terminal=True)), LiveView)
    assert isinstance(progress_view(Console(file=io.StringIO())), PlainView)
    assert progress_view() is not None
    monkeypatch.setenv("FORCE_COLOR", "1")  # A log with colours is not a screen.
    assert isinstance(progress_view(Console(file=io.StringIO())), PlainView)
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_view(Console(force_terminal=True)), PlainView)


def test_a_log_tells_how_a_node_trains_and_what_it_changed(stream):
    file = io.StringIO()
    view = PlainView(Console(file=file, width=200))
    view.on_event(stream().started())
    reason = "a copy is too large for a device"
    view.on_event(
        ComputeChosen(
            worker=0, ranks=1, strategy="single", reason="one", device="cpu", precision="fp32"
        )
    )
    view.on_event(
        ComputeChosen(
            worker=1, ranks=8, strategy="fsdp", reason=reason, device="cuda", precision="bf16"
        )
    )
    view.on_event(Notice(round=2, silo="judicial", text="out of memory; going on with 4"))
    lines = file.getvalue().splitlines()
    assert lines[1] == f"node 1 trains with fsdp on eight ranks: {reason}"
    assert lines[2].endswith("judicial: out of memory; going on with 4")
    view.on_event(Notice(round=3, silo="", text="local.lr = 0.1 (was 0.2)"))
    assert file.getvalue().endswith("round 3/6: local.lr = 0.1 (was 0.2)\n")
