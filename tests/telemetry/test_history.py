"""Reading a run back: superseded rounds, tables, and files that are not right."""

from __future__ import annotations

import json

import pytest

from photon.errors import RunError, RunNotFoundError
from photon.telemetry import read_events, read_history
from photon.telemetry.events import (
    Evaluated,
    LocalProgress,
    RoundFinished,
    RunFinished,
    RunStarted,
    RunStopped,
)


def test_a_straight_run_is_read_as_written(begin, one_round, write_lines):
    events = [begin(), *one_round(1), *one_round(2), RunFinished(summary={"rounds": 2})]
    history = read_history(write_lines(events))
    assert history.events == events
    assert history.superseded == 0
    assert history.started == events[0]
    assert history.summary == {"rounds": 2}


def test_rounds_after_the_checkpoint_are_superseded_by_the_resume(begin, one_round, write_lines):
    first = list(one_round(3))
    lost = [*first[:5], RunStopped(round=3, reason="interrupted")]
    folder = write_lines(
        [begin(), *one_round(1), *one_round(2), *lost, begin(resumed_from_round=2)]
    )
    write_lines([*one_round(3, shift=0.5), *one_round(4)])
    history = read_history(folder)
    assert history.superseded == len(lost)
    assert [event.round for event in history.of(RoundFinished)] == [1, 2, 3, 4]
    losses = [event.loss for event in history.of(LocalProgress) if event.round == 3]
    assert losses == [7.5] * 8
    assert history.started.resumed_from_round == 2
    assert len(history.of(RunStarted)) == 2
    assert history.summary is None


def test_a_second_resume_may_go_further_back(begin, one_round, write_lines):
    folder = write_lines([begin(), *one_round(1), *one_round(2), *one_round(3)])
    write_lines([begin(resumed_from_round=2), *one_round(3, shift=0.1)])
    write_lines([begin(resumed_from_round=1), *one_round(2, shift=0.2)])
    history = read_history(folder)
    finished = [event.round for event in history.of(RoundFinished)]
    assert finished == [1, 2]
    assert history.of(Evaluated)[-1].loss == 9 - 2 + 0.2


def test_a_resume_before_the_first_checkpoint_keeps_what_came_before_round_one(
    begin, one_round, evaluation, write_lines
):
    folder = write_lines([begin(), evaluation(0, 9.0), *list(one_round(1))[:3]])
    write_lines([begin(resumed_from_round=0), *one_round(1)])
    history = read_history(folder)
    assert history.superseded == 3
    assert [event.round for event in history.of(Evaluated) if event.silo is None] == [0, 1]


def test_a_finished_run_that_is_extended_is_finished_no_longer(begin, one_round, write_lines):
    done = [begin(), *one_round(1), RunFinished(summary={"rounds": 1})]
    assert read_history(write_lines(done)).summary == {"rounds": 1}
    history = read_history(write_lines([begin(resumed_from_round=1), *one_round(2)]))
    assert history.summary is None
    assert history.superseded == 0


def test_a_table_has_a_column_per_field(begin, one_round, write_lines):
    history = read_history(write_lines([begin(), *one_round(1), *one_round(2)]))
    table = history.table(RoundFinished)
    assert list(table) == list(RoundFinished.model_fields)
    assert table["round"] == [1, 2]
    assert table["total_tokens"] == [2000, 4000]
    assert history.table(RunStopped)["reason"] == []


def test_lines_that_are_no_events_are_passed_over(begin, tmp_path, write_lines):
    folder = write_lines([begin()])
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n\n"text"\nnull\n{"event": "from_the_future"}\n{}\n\xff\n{"ev')
    assert list(read_events(folder)) == [begin()]


def test_a_whole_line_that_breaks_the_schema_is_named(begin, write_lines):
    folder = write_lines([begin()])
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "run_stopped", "round": "soon", "reason": "?"}) + "\n")
    with pytest.raises(RunError, match=r"events\.jsonl, line 2: event 'run_stopped' .* round"):
        read_history(folder)


def test_no_file_and_no_start_are_no_run(tmp_path, one_round, write_lines):
    with pytest.raises(RunNotFoundError, match=r"no run in .*\nName a folder that"):
        read_history(tmp_path)
    with pytest.raises(RunNotFoundError, match="no run_started"):
        _ = read_history(write_lines(one_round(1))).started
