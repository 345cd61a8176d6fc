"""Silos in this process: real trainers, keys and a roster, and a post that carries Asks to them.

Tests of engines and of served runs import it (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from memory_store import MemoryStore

from photon.config import load_node_config
from photon.data import open_data
from photon.errors import UnknownMemberError
from photon.federation.envelopes import Ask, Reply, encoded
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.membership.roster import Facts, Presence, Roster
from photon.membership.signing import RECEIPT, sign_document
from photon.silo.policy import read_membership
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.site import Site
from photon.silo.trainer import SiloTrainer
from photon.store.contract import Store
from photon.store.transfer import Transfer
from photon.training import Seat
from photon.version import photon_version

#: What a fault makes of a question: an answer, words that there will be none, or silence.
Answer = SignedReply | str | None


class Silo:
    """A node's home with its trainer, which has pinned the key of an aggregator."""

    def __init__(self, folder: Path, name: str, data: Path, aggregator: NodeKey) -> None:
        self.name = name
        self.home = folder / name
        self.home.mkdir(parents=True)
        self.key = NodeKey.create(self.home / "node.key")
        self.store: Store = MemoryStore()
        self._data = data
        record = {
            "name": name,
            "address": "127.0.0.1:1",
            "ca_fingerprint": "sha256:" + "0" * 64,
            "aggregator_key": aggregator.public_pem,
        }
        (self.home / "membership.json").write_text(json.dumps(record))
        (self.home / "node.toml").write_text(
            f'[data]\npath = "{data}"\n[compute]\nthreads = 1\n[disk]\nmin_free_gib = 0.0\n'
            '[policy]\nmodel_paths = ["*"]\n'
        )
        self.start()

    def start(self, *overrides: str) -> None:
        """As after a restart of the node."""
        node = load_node_config(self.home / "node.toml", overrides)
        site = Site(self.home, node, read_membership(self.home))
        self.trainer = SiloTrainer(
            site, self.key, lambda _: Transfer(self.store), Reporter(None), Team(Seat())
        )

    def take_key(self, path: Path) -> NodeKey:
        """A new key, from now on."""
        self.key = NodeKey.create(path)
        self.start()
        return self.key

    @property
    def facts(self) -> Facts:
        data = open_data(self._data)
        tokens = data.silos[self.name].train_tokens
        return Facts(data.sha256, data.tokenizer_sha256, tokens, photon_version())

    def answer(self, ask: Ask) -> SignedReply:
        """The trainer's; without the task's name, as a post brings it."""
        return replace(self.trainer.answer(ask, lambda: math.inf), task_id="")

    def sign(self, reply: Reply | bytes, key: NodeKey | None = None) -> SignedReply:
        """Anything, signed by the silo's key or by another."""
        text = reply if isinstance(reply, bytes) else encoded(reply)
        key = key or self.key
        return SignedReply("", text, sign_document(key, RECEIPT, text), key.fingerprint)


class Wire:
    """A post to silos in this process: one answer a look, the newest question first."""

    def __init__(self, silos: Mapping[str, Silo], roster: Roster) -> None:
        self.silos = silos
        self.roster = roster
        self.asked: list[Ask] = []
        self.fired: list[str] = []
        self.quiet: set[str] = set()
        #: By silo, where it is another process than at first.
        self.boots: dict[str, str] = {}
        self.fault: Callable[[Silo, Ask, int], Answer] = lambda silo, ask, _: silo.answer(ask)
        self._waiting: dict[str, Ask] = {}

    def times(self, silo: str) -> int:
        """That a silo was asked."""
        return sum(ask.silo == silo for ask in self.asked)

    def push(self, task: str, message: bytes) -> str:
        silo = task.rpartition("/")[2]
        if silo not in self.silos:
            raise UnknownMemberError(f"{silo} is not connected")
        self.asked.append(self.silos[silo].trainer.read(message))
        one = f"message-{len(self.asked)}"
        self._waiting[one] = self.asked[-1]
        return one

    def pull(self, ids: Collection[str]) -> dict[str, SignedReply | str]:
        for name in set(self.silos) - self.quiet:
            self.be_here(name)
        for one in sorted(set(ids) & set(self._waiting), key=lambda one: int(one[8:]))[::-1]:
            ask = self._waiting.pop(one)
            answer = self.fault(self.silos[ask.silo], ask, self.times(ask.silo))
            if answer is not None:
                return {one: answer}
        return {}

    def wait(self, timeout_s: float) -> None:
        time.sleep(0.0 if self._waiting else min(timeout_s, 0.2))

    def be_here(self, name: str, **what) -> None:
        """What a silo tells the desk."""
        self.roster.all_seen(
            {
                name: (
                    Presence(**({"state": "idle", "boot": self.boots.get(name, name)} | what)),
                    time.time(),
                )
            }
        )


def join_all(roster: Roster, silos: Mapping[str, Silo]) -> None:
    """Make members of them, and say that they are here."""
    for name, silo in silos.items():
        roster.redeem(roster.invite(name, 60), name, silo.key.public_pem, silo.facts)
        roster.all_seen({name: (Presence("idle", boot=name), time.time())})
