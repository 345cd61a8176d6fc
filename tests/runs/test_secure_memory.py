"""What an aggregator's disk, store, logs and memory hold of single updates and of secrets: nothing.

The loop is a process of its own; a member drops out, another gives wrong keys. What is looked for
was noted at the silos: each update before and after the codec made numbers of it, what masks come
from, shares. The same search finds all of a run without secure aggregation.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from aggregator_process import LOG, aggregating, among, memory
from served_in_process import RUN_ID, SMALL, Served

from photon.federation import stages
from photon.federation.envelopes import Reply, parse_reply
from photon.federation.secure_rounds import COHORTS_FILE
from photon.secure.documents import Cohort, Revealed, read
from photon.secure.member import SHARED, Party, Seal

DROPS, LIES = ("c", 2), ("b", 3)


class Watched:
    """A served run whose aggregator is looked into while it waits for the last silo of a phase."""

    def __init__(self, config, folder: Path, monkeypatch) -> None:
        self.run, self.folder = Served(config, folder, names=tuple("abcde")), folder
        self.secure = config.privacy.secure_aggregation
        #: By what they are, whose, and of which round: bytes that the aggregator must not have.
        self.needles: dict[tuple[str, ...], bytes] = {}
        self.in_memory: set[tuple[str, ...]] = set()
        self.in_files: set[tuple[str, ...]] = set()
        self.fired: list[str] = []
        self.asked: Counter[tuple[str, int]] = Counter()
        self.run.wire.fault = self._answer
        pack, encode = stages.pack, Seal.encode

        def packed(link, kept, task, tensors, seal=None):
            for _, tensor in tensors():
                if tensor.numel() > 2000:
                    self.note("delta", task.silo, task.round, tensor)
            return pack(link, kept, task, tensors, seal)

        def encoded(seal, name, tensor):
            parts, said = encode(seal, name, tensor)
            if tensor.numel() > 2000:
                cohort, about = seal._cohort, (seal._party.name, seal._cohort.round)
                whole, _ = seal._numbers.whole(tensor, seal._weight, cohort.ranges[name])
                words = whole.int() & ((1 << cohort.bits) - 1)
                self.note("fed back", *about, tensor)
                self.note("said", *about, said)
                for kind in (torch.int16, torch.int32, torch.float32):
                    self.note(f"q {kind}", *about, whole.to(kind))
                    self.note(f"words {kind}", *about, words.to(kind))
            return parts, said

        monkeypatch.setattr(stages, "pack", packed)
        monkeypatch.setattr(Seal, "encode", encoded)

    def note(self, what, silo, number, tensor) -> None:
        """24 values of an update, as different as there are any."""
        rows = tensor.flatten()[: tensor.numel() // 32 * 32].view(-1, 32)[:, :24]
        distinct = (rows.sort(1).values.diff(dim=1) != 0).sum(1)
        if (what, silo, str(number)) not in self.needles and int(distinct.max()) > 5:
            row = rows[int(distinct.argmax())].contiguous()
            self.needles[what, silo, str(number)] = row.numpy().tobytes()

    def note_secrets(self, number: int) -> None:
        """Of a round that is under way, but for what its sum is opened with."""
        kept = json.loads((self.run.folder / COHORTS_FILE).read_text())["rounds"][str(number)]
        cohort = read(json.dumps(kept["cohort"]), Cohort, COHORTS_FILE)
        for name in cohort.names:
            record = Party(self.run.silos[name].home / "nodes" / RUN_ID, name).read(number)
            assert record is not None
            kind, holders = SHARED[(name, number) == DROPS], sorted(cohort.holders[name])
            shares = record.shares(kind, cohort, [cohort.place(one) for one in holders])
            whole = {"all": bytes.fromhex(record.secret), "box": record.derived("box")}
            for what, secret in {**whole, kind: record.derived(kind)}.items():
                self.needles[what, name, str(number)] = secret
                self.needles[f"{what}, hex", name, str(number)] = secret.hex().encode()
            for holder, share in zip(holders, shares, strict=True):
                self.needles[f"{kind} share of {holder}", name, str(number)] = share.to_bytes(33)

    def _answer(self, silo, ask, times):
        at, answer = (ask.kind, ask.round), silo.answer(ask)
        self.asked[at] += 1
        looks = (("unmask", 2), ("fit", 3)) if self.secure else [("fit", 1)]
        if at in looks and self.asked[at] == 4:
            if self.secure:
                self.note_secrets(ask.round)
            self._look()
        if (silo.name, *at) == (DROPS[0], "fit", DROPS[1]) and self.secure:
            self.fired.append("dropped")
            record = json.loads(answer.text) | {"fit": {"failure": "its machine is gone"}}
            return silo.sign(json.dumps(record).encode())
        if (silo.name, *at) == (LIES[0], "unmask", LIES[1]):
            self.fired.append("lied")
            reply = parse_reply(answer.text)
            told = read(reply.secure, Revealed, silo.name)
            lies = dict(zip(told.keys, reversed(told.keys.values()), strict=True))
            told = Revealed(cohort=told.cohort, keys=lies)
            lie = reply.model_copy(update={"secure": told.text})
            return silo.sign(Reply.model_validate(lie.model_dump()))
        return answer

    def _look(self) -> None:
        self.in_memory.update(*map(among(self.needles), memory(self.pid)))

    def go_on(self) -> None:
        run = self.run
        with run.here(), aggregating(run.folder, run.wire) as (self.pid, go_on):
            go_on()
            self._look()
        assert (self.folder / "home" / LOG).is_file()
        found = among(self.needles)
        for part in ("run", "home", "store"):
            for path in (self.folder / part).rglob("*"):
                if path.is_file():
                    self.in_files |= found(path.read_bytes())


def test_nothing_of_one_silo_is_anywhere(make_config, five_silos, tmp_path, monkeypatch):
    options = (*SMALL, "serve.min_silos=5", "eval.per_silo=false")
    config = make_config(five_silos, *options, "privacy.secure_aggregation=true")
    watched = Watched(config, tmp_path, monkeypatch)
    watched.go_on()
    assert set(watched.fired) == {"dropped", "lied"}
    kinds = {what for what, *_ in watched.needles}
    assert kinds >= {"delta", "fed back", "q torch.int16", "words torch.float32", "all", "box"}
    assert {what for what, *_ in watched.needles if "share" in what} >= {
        *(f"mask share of {one}" for one in "abcde"),
        *(f"own share of {one}" for one in "abde"),
    }
    assert watched.in_memory == set()
    assert watched.in_files == set()
    log = (watched.run.folder / "events.jsonl").read_text()
    assert "b gave no key to its share of what a dealt" in log


def test_the_search_finds_single_updates_without_secure_aggregation(
    make_config, five_silos, tmp_path, monkeypatch
):
    options = (*SMALL, "serve.min_silos=5", "eval.per_silo=false", "federation.rounds=1")
    config = make_config(five_silos, *options)
    watched = Watched(config, tmp_path, monkeypatch)
    watched.go_on()
    assert watched.in_memory
    assert watched.in_files >= {("delta", silo, "1") for silo in "abcde"}
