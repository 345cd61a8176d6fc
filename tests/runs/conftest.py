"""Served runs in one process: a run folder, real trainers for silos, and a post that is a call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import silos_in_process

from photon.config import write_resolved
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import ROSTER_FILE, Facts, Presence, Roster
from photon.membership.verification import verify_audit
from photon.runs import fleet as fleet_module
from photon.runs import simulate
from photon.runs.fleet import Draws, JoinedFleet
from photon.runs.serving import continue_run
from photon.store.contract import FolderStore
from photon.store.served import Serving
from photon.telemetry import read_history
from photon.telemetry.events import RoundStarted

RUN_ID = "0" * 31 + "9"
SMALL = (
    "local.steps=2",
    "federation.rounds=3",
    "eval.max_tokens=500",
    "eval.every=3",
    "serve.min_silos=3",
)


class Served:
    """A run folder as `photon serve` leaves it, its silos, and the post to them."""

    def __init__(self, config, folder: Path, names=("blue", "green", "red")) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        store = FolderStore(folder / "store")
        data = Path(config.data.path)
        key = NodeKey.create(folder / "home" / AGGREGATOR_KEY_FILE)
        self.silos = {
            name: silos_in_process.Silo(folder / "silos", name, data, key) for name in names
        }
        for silo in self.silos.values():
            silo.store = store
        write_resolved(config, self.folder / "serve.toml")
        self.serving = Serving(RUN_ID, str(folder / "home"), str(folder / "store"), {})
        self.serving.write(self.folder)
        self.roster = Roster(folder / "home" / ROSTER_FILE)
        silos_in_process.join_all(self.roster, self.silos)
        self.wire = silos_in_process.Wire(self.silos, self.roster)
        #: Held while it is said that one silo is here; hold it to say that one is not.
        self.telling = threading.Lock()
        #: Called again and again while the run goes on.
        self.watch: Callable[[], None] = lambda: None

    def go_on(self):
        """As another process would; the silos that are not quiet say all the time that they are."""
        over = threading.Event()
        self._be_here()
        telling = threading.Thread(target=self._tell, args=(over,))
        telling.start()
        try:
            return continue_run(self.folder, self.wire)
        finally:
            over.set()
            telling.join()

    def _tell(self, over: threading.Event) -> None:
        while not over.wait(0.5):
            self.watch()
            self._be_here()

    def _be_here(self) -> None:
        for name in sorted(self.silos):
            with self.telling:
                if name not in self.wire.quiet:
                    self.wire.be_here(name)

    def asked(self, number):
        return sorted(ask.silo for ask in self.wire.asked if ask.round == number and ask.fit)

    def lines(self):
        text = (self.folder / "audit.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def audit(self):
        report = verify_audit(self.folder)
        report.require_good()
        return report

    @property
    def rounds_told(self):
        return [event.round for event in read_history(self.folder).of(RoundStarted)]


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
            roster.seen(name, Presence("idle", boot=name))
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
