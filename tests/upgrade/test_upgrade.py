"""Sites, homes and documents of an earlier version go on with this one (record.py made them)."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from odd_server import saying

from photon.deploy.desk import Desk
from photon.errors import MembershipError, PhotonError, SignatureError
from photon.federation.envelopes import Reply, encoded, open_ask, parse_ask, parse_reply, sealed
from photon.membership.keys import NodeKey
from photon.membership.records import Facts, Presence, SignedReply
from photon.membership.roster import Roster
from photon.membership.roster_file import JOURNAL_FILE, MAILBOX_FILE, ROSTER_FILE
from photon.membership.signing import RECEIPT, verify_document
from photon.silo.desk_client import DeskClient
from photon.store.presign import Grant, S3Presigner

HERE = Path(__file__).parent
#: The versions before this one whose sites go together with it.
VERSIONS = sorted(path for path in HERE.iterdir() if path.name.startswith("0.1-"))
RUN = "0123456789abcdef" * 2


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = json.loads((request.param / "documents.json").read_text())
    return found | {"home": request.param / "home.sql"}


def home_of(dump: Path, folder: Path) -> Path:
    """The databases of a recorded home; where the first of them lies."""
    folder.mkdir()
    for part in dump.read_text().split("-- ")[1:]:
        name, _, statements = part.partition("\n")
        with closing(sqlite3.connect(folder / name)) as db:
            db.executescript(statements)
    return folder / ROSTER_FILE


def text_of(sealed_ask: str | bytes) -> bytes:
    """What was signed."""
    return json.loads(sealed_ask)["ask"].encode()


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def require_recorded(roster: Roster, recorded: dict[str, Any]) -> None:
    """All that was in the home is there still."""
    key, told = recorded["letters"]["fit"]["key"], recorded["letters"]["fit"]
    (member,) = roster.members()
    assert (member.name, member.public_key, member.status) == ("red", key, "active")
    assert member.facts == Facts("a" * 64, "b" * 64, 1000, "0.1.0")
    assert [one.name for one in roster.invitations()] == ["blue"]
    (task,) = roster.tasks.open_for("red")
    assert (task.round, task.most_bytes, task.readable) == (4, 1 << 30, (f"{RUN}/global/",))
    kept = roster.tasks.reply(f"{RUN}/fit/3/red")
    assert kept is not None
    assert (kept.text, kept.ask) == (told["reply"].encode(), text_of(told["ask"]))
    (letter,) = roster.letters.fetch(roster.letters.unanswered()["red"]).values()
    assert text_of(letter.message) == text_of(told["ask"])
    assert roster.presences()["red"][0] == Presence("idle", boot="boot-1")
    assert roster.setting("run") == "/srv/runs/med"
    events = roster.journal.events()
    assert [one.what for one in events] == ["invited", "joined", "invited", "refused join", "drain"]


def test_a_home_goes_on(recorded: dict[str, Any], tmp_path: Path) -> None:
    path = home_of(recorded["home"], tmp_path / "home")
    old = path.read_bytes()
    with Roster(path) as roster:
        require_recorded(roster, recorded)
        roster.journal.note("operator", "something", "new")
        roster.suspend("red")
    with closing(sqlite3.connect(path)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    assert {"members", "retired_keys", "invitations"} <= tables
    assert not {"tasks", "letters", "presence", "settings", "events", "boots"} & tables
    assert version_of(path) > 7  # which an older Photon refuses by its number
    # Power was lost before the last of the three files was written: it is done again.
    path.write_bytes(old)
    with Roster(path) as roster:
        require_recorded(roster, recorded)


def test_a_home_of_the_time_of_flower_goes_on(tmp_path: Path) -> None:
    with Roster(home_of(HERE / "flower.sql", tmp_path / "home")) as roster:
        (member,) = roster.members()
        assert (member.name, member.facts) == ("red", Facts("d" * 64, "e" * 64, 5, "0.1.0"))
        assert roster.active(member.fingerprint) == member
        assert roster.letters.unanswered() == {}


@pytest.mark.parametrize("name", [ROSTER_FILE, MAILBOX_FILE, JOURNAL_FILE])
def test_a_newer_file_is_refused_before_anything_changes(
    name: str, recorded: dict[str, Any], tmp_path: Path
) -> None:
    path = home_of(recorded["home"], tmp_path / "home")
    with closing(sqlite3.connect(path.with_name(name))) as db:
        db.execute("PRAGMA user_version = 99")
    before = {one.name: version_of(one) for one in path.parent.glob("*.sqlite")}
    with pytest.raises(MembershipError, match=rf"{name} is of version 99, this Photon reads \d"):
        Roster(path)
    assert version_of(path) == before[ROSTER_FILE]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM tasks").fetchone() == (2,)


@pytest.fixture
def desk(
    recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Desk, SimpleNamespace, Roster]]:
    """Today's desk in the recorded home, at the time of the record."""
    clock = SimpleNamespace(at=0.0)
    monkeypatch.setattr("photon.deploy.desk.time", SimpleNamespace(time=lambda: clock.at))
    presigner = S3Presigner("https://s", "box", region="r", access_key_id="a", secret="b")
    with Roster(home_of(recorded["home"], tmp_path / "home")) as roster:
        desk = Desk(roster, presigner)
        desk.start()
        yield desk, clock, roster
        desk.stop()


def alike(found: Any, recorded: Any) -> bool:
    """Whether an answer says all that the recorded one says; figures of time and URLs differ."""
    if isinstance(recorded, dict):
        passing = {"server_time", "joined_at", "expires_at", "url", "left_s", "version"}
        return all(
            name in found and (name in passing or alike(found[name], value))
            for name, value in recorded.items()
        )
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(map(alike, found, recorded))
    return found == recorded


def test_the_desk_answers_what_nodes_of_the_version_before_ask(
    recorded: dict[str, Any], desk: tuple[Desk, SimpleNamespace, Roster]
) -> None:
    """Byte by byte as they asked it, with their signatures."""
    served, clock, roster = desk
    asked = {}
    for one in recorded["requests"]:
        clock.at = one["at"]
        url = f"http://127.0.0.1:{served.port}{one['path']}"
        answer = httpx2.request(
            one["method"], url, content=one["body"], headers=one["headers"], trust_env=False
        )
        assert answer.status_code == 200, (one["path"], answer.text)
        assert alike(answer.json(), one["answer"]), (one["path"], answer.json(), one["answer"])
        asked[one["path"].rpartition("/")[2]] = answer.json()
    assert asked.keys() >= {"join", "presence", "task", "grants", "check", "reply", "health"}
    assert roster.member("blue").status == "active"
    # What the loop makes of the answer that came.
    letter = asked["task"]["letter"]
    (came,) = roster.letters.pull([letter["id"]]).values()
    assert isinstance(came, SignedReply)
    told = recorded["letters"]["fit"]
    ask = open_ask(base64.b64decode(letter["message"]), told["aggregator_key"])
    verify_document(roster.member("red").public_key, RECEIPT, came.text, came.signature)
    parse_reply(came.text).require_answer_to(ask)


def test_a_node_takes_what_the_desk_of_the_version_before_answers(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    key = NodeKey.create(tmp_path / "key")
    answers = {one["path"].rpartition("/")[2]: one for one in recorded["requests"]}

    def ask(what: str, call: Any) -> Any:
        with saying(200, answers[what]["answer"]) as (address, _):
            client = DeskClient(address, None, key)
            try:
                return call(client, json.loads(answers[what]["body"] or "null"))
            finally:
                client.close()

    facts = Facts("a" * 64, "b" * 64, 1000, "0.1.0")
    joined = ask("join", lambda desk, body: desk.join("t" * 20, "blue", key.public_pem, facts))
    assert joined["name"] == "blue"
    said = ask("presence", lambda desk, body: desk.presence(Presence("idle")))
    assert said["draining"] is False
    letter = ask("task", lambda desk, body: desk.task("boot-1", []))
    assert text_of(letter.message) == text_of(recorded["letters"]["fit"]["ask"])
    grants = ask("grants", lambda desk, body: desk.ask_grants(body["task_id"], body["wants"]))
    assert [getattr(one, "grant", one).__class__ for one in grants[:2]] == [Grant, Grant]
    assert isinstance(grants[2], PhotonError)
    standing = ask("check", lambda desk, body: desk.standing())
    assert (standing.name, standing.member_status) == ("red", "active")
    signed = SignedReply("", b"{}", "c2lnbmVk", key.fingerprint)
    ask("reply", lambda desk, body: desk.reply("boot-1", letter.id, signed))
    assert ask("health", lambda desk, body: desk.health())["ok"] is True


@pytest.mark.parametrize("kind", ["fit", "evaluate", "refused"])
def test_questions_and_answers_mean_the_same(recorded: dict[str, Any], kind: str) -> None:
    told = recorded["letters"][kind]
    ask = open_ask(told["ask"].encode(), told["aggregator_key"])
    assert (ask.sha256, ask.question_sha256) == (told["ask_sha256"], told["question_sha256"])
    verify_document(told["key"], RECEIPT, told["reply"].encode(), told["signature"])
    reply: Reply = parse_reply(told["reply"].encode())
    reply.require_answer_to(ask)
    # Kept with its answer, it is the same question after a restart.
    assert parse_ask(text_of(told["ask"])).sha256 == ask.sha256


def test_an_ask_is_named_by_the_bytes_that_came(recorded: dict[str, Any], tmp_path: Path) -> None:
    """Another version leaves a field out that this one fills in, or writes it otherwise."""
    told = recorded["letters"]["fit"]
    ask = open_ask(told["ask"].encode(), told["aggregator_key"])
    key = NodeKey.create(tmp_path / "key")
    record = json.loads(encoded(ask))
    del record["fit"]["cursor"]
    text = json.dumps(record, indent=1).encode()
    other = parse_ask(text)
    assert other.fit == ask.fit
    assert other.sha256 != ask.sha256
    assert other.question_sha256 == ask.question_sha256
    with pytest.raises(SignatureError):
        open_ask(sealed(ask, key), told["aggregator_key"])
