"""A whole run over Flower: two sites, and the weights of the same run on one machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
from bridged import Bridged, needs_flower

from deployment.federation import Federation, Plan
from photon.membership.roster import ROSTER_FILE, Roster

SILOS = ["lab-a", "lab-b"]
PLAN = Plan(preset="tiny", rounds=3, steps=4, more='control = "flower"')


@pytest.mark.flower
@needs_flower
@pytest.mark.timeout(900)
def test_a_run_over_flower_trains_what_one_machine_simulates(tmp_path, prepare_text) -> None:
    data = prepare_text(tmp_path / "text", dict.fromkeys(SILOS, 16))
    with contextlib.ExitStack() as ends:
        federation = ends.enter_context(Federation(tmp_path / "federation", data, SILOS, PLAN))
        photon = (sys.executable, "-m", "photon.cli.main")
        alone = subprocess.run(
            [*photon, "simulate", federation.run_file, "--run-dir", tmp_path / "alone", "--quiet"]
        )
        assert alone.returncode == 0
        federation.begin()
        roster = ends.enter_context(Roster(federation.home / ROSTER_FILE))
        # Both are here, both are asked, and the desk gives neither its question.
        both = lambda: len(roster.letters.unanswered()) == 2  # noqa: E731
        federation.wait("both are asked", both, within_s=240)
        sites = {silo: federation.node_home(silo) for silo in SILOS}
        flower = ends.enter_context(Bridged(tmp_path / "flower", federation.home, sites))
        federation.wait("the run is over", lambda: federation.over, within_s=400)
        flower.await_log("superlink", "Finished task")  # the app ends with the run
        assert federation.serving is not None
        federation.serving.wait(60)
    here, there = (
        json.loads((folder / "summary.json").read_text())
        for folder in (tmp_path / "alone", federation.run)
    )
    assert there["weights_sha256"] == here["weights_sha256"]
    assert (there["rounds"], here["rounds"]) == (PLAN.rounds, PLAN.rounds)
    assert subprocess.run([*photon, "audit", federation.run]).returncode == 0
