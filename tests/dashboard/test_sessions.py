"""A run of several processes, cut short or cut up: what its report makes of its events."""

from __future__ import annotations

import re

import pytest
from pages import read, report

from photon.dashboard import write_report
from photon.dashboard.digest import phases_of, read_digest
from photon.dashboard.report import baseline_formula, headline
from photon.telemetry.events import (
    Evaluated,
    LocalProgress,
    Notice,
    RoundFinished,
    RoundStarted,
)


def test_a_stopped_run_says_so_first(folder, stream):
    made = stream(rounds=12)
    events = [e for e in made.whole() if getattr(e, "round", 0) <= 4][:-1]
    page = report(folder, [*events, made.stopped(5)])
    assert "This run was stopped in round 5 (interrupted by Ctrl-C)." in page.text
    assert "4 of 12 rounds are complete" in page.text
    assert "over 4 of 12 rounds" in page.text
    assert "run stopped" in page.text


def test_a_killed_run_is_unfinished(folder, stream):
    events = [e for e in stream(rounds=12).whole() if getattr(e, "round", 0) <= 4][:-1]
    page = report(folder, events)
    assert "its process ended without saying so" in page.text


def test_a_resumed_run_counts_each_round_once_and_lists_what_happened(folder, stream):
    straight = stream(dropped={2: "judicial"})
    resumed = stream(dropped={2: "judicial"})
    run = folder(resumed.resumed(stop_in=4))
    page = read(write_report(run))
    digest, whole = read_digest(run), read_digest(folder(straight.whole(), "straight"))
    assert [cost.round for cost in digest.rounds] == [1, 2, 3, 4, 5, 6]
    assert (digest.tokens, digest.bytes_up, digest.tasks) == (
        whole.tokens,
        whole.bytes_up,
        whole.tasks,
    )
    assert digest.silos["judicial"].training == whole.silos["judicial"].training
    assert digest.superseded > 0
    assert digest.state == "finished"
    kinds = [incident.kind for incident in digest.incidents]
    assert kinds == ["update dropped", "run stopped", "resumed"]
    assert "goes on after round 3" in page.text
    assert f"{digest.superseded} events of rounds that a resume ran again" in page.text


def test_an_incident_of_a_round_run_again_is_marked(folder, stream):
    made = stream(lost={4: "judicial"})
    events = list(made.resumed(stop_in=4))
    lost = next(e for e in stream(lost={4: "judicial"}).whole() if e.name == "worker_lost")
    at = next(i for i, e in enumerate(events) if e.name == "run_stopped")
    digest = read_digest(folder([*events[:at], lost, *events[at:]]))
    marks = [(i.kind, i.undone) for i in digest.incidents]
    assert marks == [
        ("worker lost", True),
        ("run stopped", False),
        ("resumed", False),
        ("worker lost", False),
    ]


def test_a_run_of_several_sessions_is_told_from_its_beginning(folder, stream):
    made = stream(dropped={3: "judicial"})
    events = list(made.resumed(stop_in=4))
    at = next(i for i, e in enumerate(events) if e.name == "run_started" and i)
    later = {"started_at": "2026-01-09T10:00:00+00:00", "time_s": 57.0}
    events[at] = events[at].model_copy(update=later)  # the clock of the checkpoint
    events[at - 1] = events[at - 1].model_copy(update={"time_s": 70.0})
    lost = next(e for e in stream(dropped={4: "republican"}).whole() if e.name == "update_dropped")
    run = folder([*events[: at - 1], lost, *events[at - 1 :]])
    page, digest = read(write_report(run)), read_digest(run)
    assert "Started 2026-01-02T03:04:05+00:00 Resumed one time, last 2026-01-09T10" in page.text
    times = [incident.time_s for incident in digest.incidents]
    assert times == sorted(times)
    # Every drop that is an incident counts, of a round that was run again, too.
    drops = {name: silo.dropped for name, silo in digest.silos.items() if silo.dropped}
    assert drops == {"judicial": 1, "republican": 1}


def test_what_a_silo_received_to_evaluate_counts_as_received(folder, stream):
    events = [
        e.model_copy(update={"bytes_down": 0})
        if e.name == "local_finished"
        else e.model_copy(update={"bytes_down": 4_400_000})
        if isinstance(e, Evaluated) and e.silo and e.round
        else e
        for e in stream(step_s={"forward_s": 1.0}).whole()
    ]
    page = report(folder, events)
    table = page.raw[page.raw.index("How silos trained") : page.raw.index("<h2>Incidents")]
    assert re.findall(r'<td class="n"[^>]*>([^<]*)</td>', table)[6] == "4.4 MB"


def test_silos_that_tell_no_steps_have_a_curve_of_rounds(folder, stream):
    whole = list(stream().whole())
    events = [e for e in whole if not isinstance(e, LocalProgress) or e.silo != "judicial"]
    silos = read_digest(folder(events)).silos
    assert [tokens for tokens, _ in silos["judicial"].training] == [
        262_144 * i for i in range(1, 7)
    ]
    assert len(silos["republican"].training) == 24  # four reports a round


def test_a_notice_of_the_run_itself_is_of_no_silo(folder, stream):
    note = Notice(round=2, silo="", text="local.lr = 0.1 (was 0.2)")
    run = folder([*stream().whole(), note])
    assert "notice – local.lr = 0.1 (was 0.2)" in read(write_report(run)).text
    assert "" not in read_digest(run).silos


def test_lines_that_are_missing_do_not_matter(folder, stream):
    whole = list(stream().whole())
    for kind in {type(e) for e in whole} - {type(whole[0])}:
        page = report(folder, [e for e in whole if type(e) is not kind])
        assert "1.1M parameters" in page.text


def test_bytes_per_step_formula_counts_only_finished_rounds(folder, stream):
    made = stream(rounds=12)
    events = [e for e in made.whole() if getattr(e, "round", 0) <= 4][:-1]
    begun = RoundStarted(round=5, global_step=128, participants=list(made.silos))
    digest = read_digest(folder([*events, begun]))
    assert digest.tasks == 16
    assert digest.baseline_bytes == 4 * 1_100_000 * 2 * 32 * 16
    assert "16 tasks" in baseline_formula(digest)
    assert "4 of 12" in headline(digest)
    assert "rounds 4 of 12" in read(write_report(digest.folder)).text


def test_time_adds_up_to_the_wall_clock(folder, stream):
    digest = read_digest(folder(stream().whole()))
    phases = dict(digest.phases_s)
    assert sum(phases.values()) == pytest.approx(max(digest.wall_s, sum(phases.values())))
    assert phases["local training"] == pytest.approx(6 * 16.0)
    assert all(phases_of(cost)["other"] >= 0 for cost in digest.rounds)


def test_workers_side_by_side_do_not_use_more_than_the_whole_round(folder, stream):
    events = [
        e.model_copy(update={"local_train_s": 64.0}) if isinstance(e, RoundFinished) else e
        for e in stream().whole()
    ]
    digest = read_digest(folder(events))
    assert all(phases_of(cost)["local training"] <= cost.round_s for cost in digest.rounds)
    assert digest.train_share <= 1.0


def test_a_run_first_evaluated_after_a_round_says_after_which(folder, stream):
    events = [e for e in stream().whole() if not isinstance(e, Evaluated) or e.round > 0]
    page = report(folder, events)
    assert "fell from 233 after round 1 to 118." in page.text
    assert "perplexity 118 233 after round 1" in page.text


def test_a_kill_between_checkpoint_and_last_line_of_a_round_loses_no_totals(folder, stream):
    made = stream()
    events = [e for e in made.whole() if not (isinstance(e, RoundFinished) and e.round == 3)]
    at = next(i for i, e in enumerate(events) if isinstance(e, RoundStarted) and e.round == 4)
    resumed = made.started(resumed_from_round=3)
    digest = read_digest(folder([*events[:at], resumed, *events[at:]]))
    assert digest.superseded == 0
    assert (digest.tokens, digest.bytes_up) == (made.tokens, made.bytes)
    assert digest.tasks == 24
    assert [p.tokens for p in digest.evaluations] == [262_144 * i for i in range(7)]
    assert read(write_report(digest.folder)).titles[0] == "Loss"
