"""A trainer without key and network: what its gateway does for it, through a folder alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from member_desk import RUN, Aggregator, fake_store

from photon.deploy.desk import DeskLimits
from photon.errors import ObjectMissingError, ProtocolError, UnknownMemberError, UnreachableError
from photon.federation.envelopes import SealedAsk, encoded, parse_reply
from photon.membership.keys import NodeKey
from photon.membership.records import Presence, SignedReply
from photon.membership.signing import RECEIPT, verify_document
from photon.silo import gateway as module
from photon.silo.desk_client import DeskClient
from photon.silo.gateway import CALLS, Calls, Gateway
from photon.silo.policy import read_membership
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.site import Site
from photon.silo.trainer import SiloTrainer
from photon.store.contract import FolderStore, Store
from photon.store.transfer import Transfer, Wanted
from photon.training import Seat

ASK = b'{"kind": "fit", "fit": {"round": 1}, "run": {"id": "%s"}, "silo": "blue"}' % RUN.encode()
MESSAGE = encoded(SealedAsk(ask=ASK.decode(), signature="not looked at here"))
ANSWER = json.dumps({"ask": hashlib.sha256(ASK).hexdigest(), "says": "é"}).encode()


class Place:
    """A desk, a member's gateway, and a folder that a trainer shares with it."""

    def __init__(self, folder: Path) -> None:
        self.desk = Aggregator(folder, fake_store(), limits=DeskLimits(poll_s=0.3))
        self.blue = self.desk.member("blue")
        self.key = NodeKey.load(folder / "blue.key")
        self.folder = folder / "shared"
        self.store: Store = FolderStore(folder / "store")
        self.trainer = Gateway(self.folder, "trainer")
        self.told: list[str] = []
        self.calls: list[Calls] = []

    def start(self, desk: DeskClient | None = None, wait_s: float = 60.0) -> Calls:
        """The gateway, for as long as this process."""
        carriers: Any = lambda _: Transfer(self.store)  # noqa: E731
        given = (self.key, "boot", wait_s, self.told.append)
        made = Calls(self.folder, desk or self.blue, carriers, *given)
        made.start()
        self.calls.append(made)
        return made

    def ask(self, message: bytes = MESSAGE) -> str:
        return self.desk.roster.letters.push(self.desk.task("blue").id, message)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(module, "_HOLD_S", 0.05)
    made = Place(tmp_path)
    yield made
    for one in made.calls:
        one.stop()
    time.sleep(0.5)  # polls that are under way
    made.desk.close()


def waited(true: Callable[[], Any], within_s: float = 20.0) -> Any:
    until = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_a_question_is_brought_and_the_gateway_signs_its_answer(place: Place) -> None:
    place.start()
    assert place.trainer.task("any", ()) is None
    letter = place.ask()
    found = place.trainer.task("any", ())
    assert found is not None
    assert (found.id, found.message) == (letter, MESSAGE)
    assert 0 < found.left_s <= 600
    place.trainer.reply("any", letter, SignedReply("", ANSWER, "", ""))
    signed = waited(lambda: place.desk.roster.letters.pull([letter]))[letter]
    assert (signed.text, signed.fingerprint) == (ANSWER, place.key.fingerprint)
    verify_document(place.key.public_pem, RECEIPT, signed.text, signed.signature)
    assert list((place.folder / CALLS).iterdir()) == []


def test_it_signs_nothing_but_answers_to_what_it_gave_out(place: Place) -> None:
    place.start()
    letter = place.ask()
    with pytest.raises(ProtocolError, match="signs no answer"):
        place.trainer.reply("any", letter, SignedReply("", ANSWER, "", ""))
    assert place.trainer.task("any", ()) is not None
    for text in (b'{"ask": "' + b"0" * 64 + b'"}', b"[]", b"no JSON", b"{}"):
        with pytest.raises(ProtocolError, match="signs no answer"):
            place.trainer.reply("any", letter, SignedReply("", text, "", ""))
    assert not place.desk.roster.letters.pull([letter])
    # Why there is no answer needs no signature of its own.
    place.trainer.reply("any", letter, "the trainer can't")
    assert waited(lambda: place.desk.roster.letters.pull([letter])) == {letter: "the trainer can't"}


@pytest.mark.parametrize(
    "call",
    [
        {"what": "key"},
        {"what": "start"},
        {"what": "send", "task": "../../node", "keys": []},
        {"what": "fetch", "task": f"{RUN}/fit/1/blue", "spool": "../../elsewhere", "wanted": []},
        {"what": "task", "have": [1]},
        {"what": "presence", "presence": {"state": "idle", "step": -1}},
        {"what": "task", "more": 1},
        {},
    ],
)
def test_what_is_no_call_is_refused(place: Place, call: dict[str, Any]) -> None:
    place.start()
    file = place.folder / CALLS / "trainer-0.call"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(call))
    answer = json.loads(waited(lambda: module._read(file.with_suffix(".answer"))))
    assert answer["error"]["code"] == ProtocolError.exit_code
    assert "no trainer makes" in answer["error"]["message"]


def test_presence_is_the_nodes_and_what_the_desk_says_of_it_comes_back(place: Place) -> None:
    place.start()
    answer = place.trainer.presence(Presence("training", step=3, boot="the-trainers"))
    assert answer["member_status"] == "active"
    (seen, _) = place.desk.roster.presences()["blue"]
    assert (seen.state, seen.step, seen.boot) == ("training", 3, "boot")
    assert "a trainer is here" in place.told
    place.desk.roster.expel("blue")
    with pytest.raises(UnknownMemberError, match="expelled"):
        place.trainer.presence(Presence("idle"))


def test_either_side_may_start_later_or_anew(place: Place, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PROMPT_S", 0.2)
    with pytest.raises(UnreachableError, match=r"gateway did not answer.*within 0.2 s"):
        place.trainer.presence(Presence("idle"))
    found: list[Any] = []
    monkeypatch.setattr(module, "_PROMPT_S", 20.0)
    early = threading.Thread(target=lambda: found.append(place.trainer.presence(Presence("idle"))))
    early.start()
    calls = place.folder / CALLS
    waited(lambda: list(calls.glob("*.call")))
    # What an earlier trainer's process left goes, what another process calls for stays.
    (calls / "trainer-old.call").write_text("{}")
    (calls / "courier-now.call").write_text("{}")
    early_call = next(path for path in calls.glob("*.call") if len(path.stem) > 15)
    Gateway(place.folder, "trainer")
    assert [path.name for path in calls.glob("*.call")] == ["courier-now.call"]
    early_call.write_text(json.dumps({"what": "presence", "presence": {"state": "idle"}}))
    place.start()
    early.join(20)
    assert found[0]["ok"]


@pytest.mark.parametrize("kind", ["fit", "share"])
def test_while_there_is_no_trainer_both_sides_are_told_until_when(kind: str, place: Place) -> None:
    place.start(wait_s=1.5)
    waited(lambda: place.told)
    assert place.told == ["waits for a trainer: `photon join --trainer` where the GPUs are"]
    assert "blue" not in place.desk.roster.presences()
    ask = (
        ASK if kind == "fit" else ASK.replace(b'"fit": {', b'"secure": {').replace(b"fit", b"share")
    )
    place.ask(encoded(SealedAsk(ask=ask.decode(), signature="not looked at here")))
    waited(lambda: "is kept open for it" in place.told[-1])
    (seen, _) = waited(lambda: place.desk.roster.presences().get("blue"))
    assert (seen.state, seen.task, seen.boot) == ("loading", f"{RUN}/{kind}/1/blue", "boot")
    assert "until" in seen.detail
    waited(lambda: "the aggregator goes on" in place.told[-1])
    assert place.trainer.task("any", ()) is not None
    place.trainer.presence(Presence("idle"))
    waited(lambda: place.told[-1] == "a trainer is here")
    place.trainer.presence(Presence("stopping"))
    waited(lambda: "waits for a trainer" in place.told[-1])


def test_objects_come_and_go_through_the_folder(place: Place) -> None:
    place.start()
    data = {f"{RUN}/global/{number}": bytes([number]) * 5000 for number in range(20)}
    for key, one in data.items():
        place.store.put(key, one)
    wanted = [Wanted(key, 5000, hashlib.sha256(one).hexdigest()) for key, one in data.items()]
    carrier, spool = (
        place.trainer.carrier(f"{RUN}/fit/7/blue"),
        place.folder / "incoming" / ("a" * 64),
    )
    assert [bytes(one) for one in carrier.fetch(wanted, spool=spool)] == list(data.values())
    missing = Wanted(f"{RUN}/none", 1, "0" * 64)
    with pytest.raises(ObjectMissingError):
        carrier.fetch([missing], spool=spool)
    parcel = FolderStore(place.folder / "answers" / RUN / "fit-000007" / "parcel")
    parcel.put(f"{RUN}/silos/blue/x", b"an update")
    carrier.send([(f"{RUN}/silos/blue/x", b"an update")])
    assert place.store.get(f"{RUN}/silos/blue/x", max_bytes=100) == b"an update"


def test_a_trainer_behind_it_trains_what_one_with_a_way_out_does(
    place: Place, bench, aggregator, tmp_path
) -> None:
    place.store, ask = bench.store, aggregator.fit()
    direct = bench.answer(ask)
    place.folder = bench.home.with_name("behind")
    place.folder.mkdir()
    (place.folder / "membership.json").write_bytes((bench.home / "membership.json").read_bytes())
    place.start()
    gateway = Gateway(place.folder, "trainer")
    site = Site(place.folder, bench.node, read_membership(place.folder))
    trainer = SiloTrainer(site, None, gateway.carrier, Reporter(None), Team(Seat()))
    for folder in (tmp_path / "store").glob("*/silos"):
        shutil.rmtree(folder)
    signed = trainer.answer(ask, lambda: 100.0)
    assert (signed.signature, signed.fingerprint) == ("", "")
    fit = parse_reply(signed.text).fit
    assert fit is not None
    assert direct.fit is not None
    assert (fit.update, fit.bytes_down) == (direct.fit.update, direct.fit.bytes_down)
    assert bench.store.size(fit.update.key) is not None
    assert not (place.folder / "incoming").exists()
    assert trainer.answer(ask, lambda: 100.0) == signed
