"""A site with real data, and the aggregator's side of it: asks, states in a store, expectations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from memory_store import MemoryStore

from photon.config import RunConfig, load_node_config
from photon.config.node import NodeDataConfig
from photon.data import open_data
from photon.federation import Node, NodeSettings, Version
from photon.federation.broadcast import Broadcast
from photon.federation.envelopes import (
    Ask,
    EvalPart,
    FitPart,
    RunPart,
    dictated,
    parse_reply,
)
from photon.federation.layout import initial_model
from photon.federation.tasks import OPTIMIZER, WEIGHTS, EvalTask, update_header
from photon.link import write_parcel
from photon.membership.keys import NodeKey
from photon.membership.signing import RECEIPT, verify_document
from photon.models import model_fingerprint, trainable_parameters
from photon.silo.policy import own_part, read_membership
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.site import Site
from photon.silo.trainer import SiloTrainer
from photon.store.contract import FolderStore, Store
from photon.store.transfer import Transfer
from photon.training import InnerOptimizer, Seat
from photon.version import photon_version

NEVER = math.inf
RUN_ID = "0" * 31 + "1"


class Aggregator:
    """What an aggregator would ask, and what a node in this process answers to the same."""

    def __init__(self, config: RunConfig, store: Store, run_id: str = RUN_ID) -> None:
        self.config = config
        self.store = store
        self.carrier = Transfer(self.store)
        self.data = open_data(config.data.path)
        model = initial_model(config, self.data)
        self.state = {
            WEIGHTS + name: parameter.detach().clone()
            for name, parameter in trainable_parameters(model).items()
        }
        if config.federation.optimizer_state == "average":
            zeros = InnerOptimizer(model, config.local).initial_state()
            self.state |= {OPTIMIZER + name: tensor for name, tensor in zeros.items()}
        self.run = RunPart(
            id=run_id,
            silos=sorted(self.data.silos),
            config=dictated(config),
            model=model_fingerprint(model),
            tokenizer=self.data.tokenizer_sha256,
            vocab_size=self.data.vocab_size,
            eos_id=self.data.eos_id,
        )
        self.broadcast = Broadcast(config.link, config.run.name)
        self.number = 0
        self.ref = self.publish()

    def publish(self, **how):
        base = {"base": None} | how
        return self.broadcast.publish(
            self.carrier, f"{self.run.id}/global", self.number, self.state, **base
        )

    def move(self) -> None:
        """Another global state, as if a round had been merged."""
        before = self.broadcast.keep(self.state)
        for number, tensor in enumerate(self.state.values()):
            tensor.mul_(1 - 1e-3 * (number % 3))
        self.number += 1
        self.broadcast.encode(self.number, self.state, before)
        self.ref = self.publish(base=self.ref.sha256)
        if self.broadcast.lossy:
            self.ref = replace(self.ref, whole=None)

    def fit(self, silo: str = "red", number: int = 1, node_round: int | None = None, **fields):
        steps = self.config.local.steps
        part = FitPart(
            round=number,
            global_step=(number - 1) * steps,
            steps=steps,
            node_round=node_round,
            cursor=(number - 1) * steps * self.config.local.batch_size,
        )
        return self._ask("fit", silo, fit=part, **fields)

    def evaluation(self, silo: str = "red", number: int = 1, **fields) -> Ask:
        return self._ask("evaluate", silo, evaluate=EvalPart(round=number), **fields)

    def _ask(self, kind, silo, **fields) -> Ask:
        whole = {
            "photon_version": photon_version(),
            "run": self.run,
            "state": self.ref,
            "log_head": "0" * 64,
            "within_s": 3600.0,
        }
        return Ask(kind=kind, silo=silo, **whole | fields)

    def node(self, folder: Path, name: str = "red") -> Node:
        """One in this process, to compare with: a member with the text of silo "red"."""
        own = own_part(self.data, NodeDataConfig(path="", silo="red"), name)
        return Node(NodeSettings(self.config, folder), lambda _: None, data=own)

    def expected(self, node: Node, ask: Ask):
        """Receipt of the same task in this process, and the update as a parcel's Ref."""
        task = ask.fit_task(self.config.run.name)
        update = node.fit(task, Version(0, self.state))
        ref = write_parcel(
            Transfer(MemoryStore(), streams=1),
            f"{self.run.id}/silos/{ask.silo}",
            update_header(task, self.state),
            update.entries(),
            chunk_bytes=self.config.link.chunk_bytes,
        )
        node.settle()
        return update.receipt, ref

    def score(self, node: Node, silo: str):
        return node.evaluate(EvalTask(1, silo), Version(1, self.state))


class Bench:
    """A home with a trainer in this process."""

    def __init__(self, folder: Path, aggregator: Aggregator, *overrides: str, name="red") -> None:
        self.aggregator = aggregator
        self.home = make_home(folder / "home", name, folder / "aggregator.key")
        self.key = NodeKey.load(self.home / "node.key")
        path = folder / "node.toml"
        write_node_file(path, aggregator.config.data.path)
        self.node = load_node_config(path, overrides)
        self.reporter = Reporter(None)
        self.store = aggregator.store
        self.start()

    def start(self) -> None:
        """As after a restart."""
        site = Site(self.home, self.node, read_membership(self.home))
        self.trainer = SiloTrainer(
            site, self.key, lambda _: Transfer(self.store), self.reporter, Team(Seat())
        )

    def answer(self, ask: Ask, left_s: float = NEVER):
        """The reply, its signature checked."""
        signed = self.trainer.answer(ask, lambda: left_s)
        verify_document(self.key.public_pem, RECEIPT, signed.text, signed.signature)
        assert signed.task_id == ask.task_id
        reply = parse_reply(signed.text)
        reply.require_answer_to(ask)
        return reply

    def refusal(self, ask: Ask, left_s: float = NEVER):
        reply = self.answer(ask, left_s)
        assert reply.refused is not None
        return reply.refused


def make_home(home: Path, name: str, aggregator: Path) -> Path:
    """As joining leaves it, without certificates; with the key of an aggregator."""
    home.mkdir(parents=True)
    NodeKey.create(home / "node.key")
    record = {
        "name": name,
        "address": "127.0.0.1:1",
        "ca_fingerprint": "sha256:" + "0" * 64,
        "aggregator_key": NodeKey.load_or_create(aggregator).public_pem,
    }
    (home / "membership.json").write_text(json.dumps(record))
    return home


def write_node_file(path: Path, data: Path | str) -> None:
    path.write_text(
        f'[data]\npath = "{data}"\n[compute]\nthreads = 1\n[disk]\nmin_free_gib = 0.0\n'
    )


@pytest.fixture
def make_aggregator(three_silos, make_config, tmp_path):
    def make(
        *overrides: str,
        run_id: str = RUN_ID,
        data: Path = three_silos,
        store: Store | None = None,
    ) -> Aggregator:
        config = make_config(data, "run.log_every=1", *overrides, preset="tiny")
        return Aggregator(config, store or FolderStore(tmp_path / "store"), run_id)

    return make


@pytest.fixture
def aggregator(make_aggregator):
    return make_aggregator()


@pytest.fixture
def make_bench(tmp_path):
    def make(aggregator: Aggregator, *overrides: str, name: str = "red") -> Bench:
        return Bench(tmp_path, aggregator, *overrides, name=name)

    return make


@pytest.fixture
def bench(aggregator, make_bench):
    return make_bench(aggregator)


@pytest.fixture
def changed():
    """A copy of an ask with other fields; `run` takes fields of its RunPart."""

    def change(ask: Ask, *, run: dict | None = None, **fields) -> Ask:
        if run:
            fields["run"] = ask.run.model_copy(update=run)
        return ask.model_copy(update=fields)

    return change


@pytest.fixture
def fits(monkeypatch):
    """Tasks that reach a node."""
    seen = []
    fit = Node.fit

    def counted(self, task, state):
        seen.append(task)
        return fit(self, task, state)

    monkeypatch.setattr(Node, "fit", counted)
    return seen
