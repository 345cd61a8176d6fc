"""A served run in one process: a run folder, real trainers for silos, and a post that is a call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import silos_in_process

from photon.config import write_resolved
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import ROSTER_FILE, Roster
from photon.membership.verification import verify_audit
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
        """As another process would."""
        with self.here():
            return continue_run(self.folder, self.wire)

    @contextmanager
    def here(self):
        """The silos that are not quiet say all the time that they are here."""
        over = threading.Event()
        self._be_here()
        telling = threading.Thread(target=self._tell, args=(over,))
        telling.start()
        try:
            yield
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
