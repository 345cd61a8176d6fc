"""Served runs in one process: a run folder, real trainers for silos, and a post that is a call."""

from __future__ import annotations

import time

import pytest
from served_in_process import RUN_ID, SMALL, Served

from photon.membership.keys import NodeKey
from photon.membership.roster import Facts, Presence, Roster
from photon.runs import fleet as fleet_module
from photon.runs import simulate
from photon.runs.fleet import Draws, JoinedFleet


@pytest.fixture(scope="module")
def config(three_silos, make_config):
    return make_config(three_silos, *SMALL)


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory):
    """What the same run comes to in one process."""
    return simulate(config, run_dir=tmp_path_factory.mktemp("calm") / "run").summary


@pytest.fixture
def make_served(three_silos, make_config, tmp_path):
    """A served run of three silos, with changes to the run file."""
    made = []

    def make(*overrides: str) -> Served:
        folder = tmp_path / f"served-{len(made)}"
        folder.mkdir()
        made.append(Served(make_config(three_silos, *SMALL, *overrides), folder))
        return made[-1]

    yield make
    for run in made:
        run.roster.close()


@pytest.fixture(scope="session")
def served_run():
    """Makes one with other silos than three: see `Served`."""
    return Served


@pytest.fixture
def served(make_served):
    return make_served()


@pytest.fixture
def run_id():
    return RUN_ID


@pytest.fixture
def roster(tmp_path):
    with Roster(tmp_path / "home" / "members.sqlite") as roster:
        for number, name in enumerate(("blue", "green", "red"), 1):
            key = NodeKey.create(tmp_path / f"{name}.key")
            facts = Facts("d" * 64, "e" * 64, 100 * number, "0.1.0")
            roster.redeem(roster.invite(name, 60), name, key.public_pem, facts)
            roster.all_seen({name: (Presence("idle", boot=name), time.time())})
        yield roster


@pytest.fixture
def fleet(roster, three_silos, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module, "_LOOK_S", 0.02)

    def make(*overrides: str, run: str = RUN_ID, **told) -> JoinedFleet:
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        config = make_config(three_silos, *overrides)
        return JoinedFleet(roster, config, run, Draws(folder), **told)

    return make
