"""A remote engine with its silos in this process: a roster, a store, a post, and honest answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import silos_in_process
from memory_store import MemoryStore

from photon.data import open_data
from photon.engines.local import LocalEngine
from photon.engines.remote import Asker, Depot, RemoteEngine
from photon.engines.remote.errand import Errand
from photon.federation import FitTask, Node, NodeSettings, Version, fitted
from photon.federation.broadcast import Broadcast
from photon.federation.envelopes import RunPart, dictated
from photon.federation.layout import initial_model, layout_of
from photon.federation.tasks import WEIGHTS
from photon.link import tensors_sha256
from photon.membership.chain import BEGINNING
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster
from photon.models import model_fingerprint

RUN_ID = "0" * 31 + "7"


def ask_again_at_once(patch: pytest.MonkeyPatch) -> None:
    """Who gave no good answer is asked again as often as ever, but without pauses."""
    again = Errand.again

    def at_once(errand: Errand, now_s: float, because: str) -> None:
        again(errand, now_s, because)
        errand.next_s = now_s

    patch.setattr(Errand, "again", at_once)


class Federated:
    """A run's silos, its state, and a node in this process to hold them against."""

    def __init__(self, config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.data = open_data(config.data.path)
        model = initial_model(config, self.data)
        layout = layout_of(model)
        self.once = layout.once_of(model)
        self.state = {
            WEIGHTS + name: model.get_parameter(name).detach().clone() for name in layout.merged
        }
        self.key = NodeKey.create(folder / "aggregator.key")
        self.silos = {
            name: silos_in_process.Silo(folder / "silos", name, self.data.path, self.key)
            for name in sorted(self.data.silos)
        }
        self.run = RunPart(
            id=RUN_ID,
            silos=sorted(self.silos),
            config=dictated(config),
            model=model_fingerprint(model),
            tokenizer=self.data.tokenizer_sha256,
            vocab_size=self.data.vocab_size,
            eos_id=self.data.eos_id,
        )
        self.local = LocalEngine(Node(NodeSettings(config, folder / "local"), lambda _: None))
        self.broadcast = Broadcast(config.link, config.run.name)
        self.last: str | None = None
        self.version = self._version(0)

    def tasks(self, number=1, node_round=None):
        steps = self.config.local.steps
        return [
            FitTask(self.config.run.name, number, silo, (number - 1) * steps, steps, node_round)
            for silo in sorted(self.silos)
        ]

    def publish(self, number):
        def put(carrier, folder):
            found = self.broadcast.publish(carrier, folder, number, self.state, base=self.last)
            self.last = found.sha256
            once = self.broadcast.publish_once(carrier, folder, self.once) if self.once else None
            return replace(found, once=once)

        return put

    def move(self, number) -> None:
        """As if a round had been merged."""
        before = self.broadcast.keep(self.state)
        for place, tensor in enumerate(self.state.values()):
            tensor.mul_(1 - 1e-3 * (place % 3))
        self.broadcast.encode(number, self.state, before)
        self.version = self._version(number)

    def _version(self, number):
        once = {"once": self.once, "once_sha256": tensors_sha256(self.once)}
        return Version(number, self.state, self.publish(number), **once)


class Bench:
    """One engine with a roster, a store and a post of its own."""

    def __init__(self, federated: Federated, folder: Path, *overrides: str, remake=None) -> None:
        self.federated, self.folder = federated, folder
        config = federated.config
        self.config = remake(config.data.path, *overrides) if overrides else config
        self.silos = federated.silos
        self.told: list = []
        self.store = MemoryStore()
        for silo in self.silos.values():
            silo.store = self.store
        self.roster = Roster(folder / "home" / "members.sqlite")
        silos_in_process.join_all(self.roster, self.silos)
        self.wire = silos_in_process.Wire(self.silos, self.roster)
        self.engine = self.new_engine()

    def new_engine(self) -> RemoteEngine:
        federated = self.federated
        engine = RemoteEngine(
            federated.run,
            self.config,
            self.wire,
            self.roster,
            Depot(RUN_ID, self.config, self.store, self.folder / "arrivals"),
            Asker(federated.key, lambda: BEGINNING),
            federated.local,
            self.told.append,
        )
        federated.last = None
        return engine

    def answers(self, tasks=None):
        """By silo: the receipt, and the update's hash (None without one), in the order given."""
        found = {}
        tasks = self.federated.tasks() if tasks is None else tasks
        for update in fitted(self.engine, tasks, self.federated.version):
            tensors = {name: tensor.clone() for name, tensor in update.tensors()}
            digest = tensors_sha256(tensors) if tensors else None
            found[update.receipt.silo] = (update.receipt, digest)
        return found

    def on(self, silo, fault) -> None:
        """Let a fault answer for one silo; it counts as fired where it answers."""

        def at(which, ask, times):
            if which.name == silo:
                self.wire.fired.append(silo)
                return fault(which, ask, times)
            return which.answer(ask)

        self.wire.fault = at


def hashes(engine, tasks, version):
    return {
        update.receipt.silo: tensors_sha256({k: v.clone() for k, v in update.tensors()})
        for update in fitted(engine, tasks, version)
    }


def only_fails(answers, silo, kind, expected):
    """The failure of a silo, where the others gave what they always give."""
    receipt, digest = answers.pop(silo)
    assert receipt.failure is not None
    assert digest is None
    assert receipt.failure_code == kind.exit_code, receipt.failure
    assert {name: found for name, (_, found) in answers.items()} == {
        name: found for name, found in expected.items() if name != silo
    }
    assert all(one.failure is None for one, _ in answers.values())
    return receipt.failure


def calm_of(bench):
    return bench.federated.version
