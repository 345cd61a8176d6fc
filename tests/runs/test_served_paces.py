"""A slow silo holds nobody for a day: served rounds close as the pace says."""

from __future__ import annotations

import json
import time

import pytest

from photon.engines.remote import messenger
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged, UpdateDropped

LATE = ("federation.rounds=4", 'federation.optimizer_state="keep"', "eval.every=0")


@pytest.fixture(autouse=True)
def prompt(monkeypatch):
    monkeypatch.setattr(messenger, "_IDLE_S", 0.05)  # who lost its task is asked again


def slow(served, silo: str, until):
    """One silo answers only once `until()` is true."""

    def answer(which, ask, times):
        if which.name != silo or not ask.fit or until():
            return which.answer(ask)
        served.wire.fired.append((silo, ask.round))
        return None

    served.wire.fault = answer


def merged(served):
    return {
        event.round: event.participants for event in read_history(served.folder).of(RoundMerged)
    }


def test_a_quorum_closes_a_round_without_the_slow(make_served):
    served = make_served(*LATE, 'federation.pace="quorum"', "federation.quorum=2")
    slow(served, "red", lambda: False)
    started = time.monotonic()
    summary = served.go_on().summary
    assert time.monotonic() - started < 120  # and not federation.deadline_s
    assert all(who == ["blue", "green"] for who in map(sorted, merged(served).values()))
    dropped = read_history(served.folder).of(UpdateDropped)
    assert {event.silo for event in dropped} == {"red"}
    assert "had not answered when round 1 closed" in dropped[0].reason
    assert summary["tokens_lost"] > 0
    assert served.wire.fired
    assert (served.audit().rounds, served.audit().updates) == (4, 8)
    assert served.roster.tasks.open_for("red") == []


@pytest.mark.parametrize("pace", ["quorum", "buffered"])
def test_a_late_update_of_a_served_run_is_merged_and_audited(pace, make_served):
    served = make_served(
        *LATE,
        "federation.rounds=8",  # time enough for who is asked again every 0.05 s
        "federation.max_staleness=8",
        f'federation.pace="{pace}"',
        "federation.quorum=2",
        'federation.late="merge"',
    )
    slow(served, "red", lambda: len(merged(served)) >= 2)
    served.go_on()
    found = merged(served)
    late = [number for number, who in found.items() if "red" in who]
    assert min(late) > 2
    report = served.audit()
    assert report.updates == sum(len(who) for who in found.values())
    assert read_history(served.folder).of(UpdateDropped) == []
    state = json.loads((max((served.folder / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["tokens_lost"] == 0
