"""Federations that are members of another, in this process, with silos of their own."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import silos_in_process

from photon.config import ServeConfig, load_node_config
from photon.config.children import ChildConfig
from photon.data import open_data
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import ROSTER_FILE, Facts, Roster
from photon.membership.verification import verify_audit
from photon.runs.child import ServedFederation
from photon.silo.policy import read_membership
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.site import Site
from photon.silo.trainer import SiloTrainer
from photon.store.contract import FolderStore, Store
from photon.store.served import Serving
from photon.store.transfer import Transfer
from photon.training import Seat
from photon.version import photon_version


class Region:
    """As silos_in_process.Silo, with members in the place of text."""

    def __init__(
        self, folder: Path, name: str, served: ChildConfig, data: Path, above: NodeKey, run_id: str
    ) -> None:
        self.name, self.folder, self.served = name, folder / name, served
        self.run, self.home = self.folder / "run", self.folder / "home"
        self.run.mkdir(parents=True)
        key = NodeKey.create(self.home / AGGREGATOR_KEY_FILE)
        self.silos: dict[str, Any] = {
            one: silos_in_process.Silo(self.folder / "silos", one, data, key)
            for one in served.silos
        }
        for number, (one, child) in enumerate(served.children.items()):
            inner = f"{number}{run_id[1:]}"
            self.silos[one] = Region(self.folder, one, child, data, key, inner)
        for silo in self.silos.values():
            silo.store = FolderStore(self.folder / "store")
        Serving(run_id, str(self.home), str(self.folder / "store"), {}).write(self.run)
        self.roster = Roster(self.home / ROSTER_FILE)
        silos_in_process.join_all(self.roster, self.silos)
        self.wire = silos_in_process.Wire(self.silos, self.roster)
        self.key = NodeKey.create(self.home / "node.key")
        self.serve: dict[str, Any] = {"silos": [*self.silos], "min_silos": len(self.silos)}
        self.store: Store = FolderStore(self.folder / "nowhere")
        opened = open_data(data)
        tokens = sum(one.facts.train_tokens for one in self.silos.values())
        self.facts = Facts("7" * 64, opened.tokenizer_sha256, tokens, photon_version())
        record = {
            "name": name,
            "address": "127.0.0.1:1",
            "ca_fingerprint": "sha256:" + "0" * 64,
            "aggregator_key": above.public_pem,
            "data_sha256": self.facts.data_sha256,
        }
        (self.home / "membership.json").write_text(json.dumps(record))
        shutil.copytree(opened.tokenizer_file.parent, self.home / "tokenizer")  # as invited
        (self.home / "node.toml").write_text(
            f'[data]\npath = "{self.home}"\n[compute]\nthreads = 1\n[disk]\nmin_free_gib = 0.0\n'
            '[policy]\nmodel_paths = ["*"]\n'
        )
        self.start()

    def start(self, *overrides: str) -> None:
        """As another process, in the place of one that was killed."""
        self.let_go()
        node = load_node_config(self.home / "node.toml", overrides)
        serve = ServeConfig(child=self.served, **self.serve)
        self.own = own = ServedFederation(self.name, self.run, serve, self.roster, self.wire)
        site = Site(self.home, node, read_membership(self.home), own)
        self.trainer = SiloTrainer(
            site, self.key, lambda _: Transfer(self.store), Reporter(None), Team(Seat())
        )

    def let_go(self) -> None:
        if hasattr(self, "trainer"):
            self.trainer._let_go()
            self.own.ends.close()
            self.own.ends.close()

    def close(self) -> None:
        for below in self.silos.values():
            if isinstance(below, Region):
                below.close()
        self.let_go()
        self.roster.close()

    def answer(self, ask):
        for name in self.silos.keys() - self.wire.quiet:
            self.wire.be_here(name)
        return replace(self.trainer.answer(ask, lambda: math.inf), task_id="")

    def audit(self):
        report = verify_audit(self.run)
        report.require_good()
        return report
