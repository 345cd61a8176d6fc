"""The desk, over real HTTP: who may ask what, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rotation import rotate

from photon.deploy.desk import Desk, DeskLimits, ask_operator
from photon.deploy.desk_requests import Allowance, caller_address
from photon.errors import (
    DeployError,
    PhotonError,
    PortInUseError,
    ProtocolError,
    UnreachableError,
)
from photon.link.parcel import update_keys
from photon.membership import signing
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask
from photon.membership.roster import Facts, Member, Roster
from photon.membership.signing import sign_request
from photon.store.presign import Grant, S3Presigner

RUN = "0" * 32
#: What a task of these tests may write, besides chunks.
WRITTEN = ("a", "b", *(f"part-{n}" for n in range(100)), *(f"p{n}" for n in range(5)))
DATA = b"some of an update"
SHA = hashlib.sha256(DATA).hexdigest()
FACTS = {
    "data_sha256": "a" * 64,
    "tokenizer_sha256": "b" * 64,
    "train_tokens": 1000,
    "photon_version": "0.1.0",
}


class Place:
    """An aggregator's home with a desk that listens, and members with their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.roster = Roster(folder / "home" / "members.sqlite")
        self.socket = folder / "home" / "operator.sock"
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.desks: list[Desk] = []

    def presigner(self) -> S3Presigner:
        return S3Presigner(
            "https://store.example:8443",
            "photon",
            region="us-east-1",
            access_key_id="access",
            secret="very-secret",
        )

    def open(self, **options: Any) -> Desk:
        """Another desk, on a free port; `url` is the newest one's."""
        given: dict[str, Any] = {
            "on_event": lambda kind, detail: self.told.append((kind, detail)),
        }
        socket = options.pop("operator_socket", None)
        desk = Desk(self.roster, options.pop("presigner", self.presigner()), **given | options)
        self.desks.append(desk)
        desk.start(operator_socket=socket)
        self.url = f"http://127.0.0.1:{desk.port}"
        return desk

    def close(self) -> None:
        for desk in self.desks:
            desk.stop()
        self.roster.close()

    def key(self, name: str) -> NodeKey:
        path = self.folder / f"{name}.key"
        return NodeKey.load(path) if path.exists() else NodeKey.create(path)

    def member(self, name: str) -> NodeKey:
        """Somebody who joined."""
        key = self.key(name)
        token = self.roster.invite(name, 60)
        self.roster.redeem(token, name, key.public_pem, Facts(**FACTS))
        return key

    def task(self, name: str, *, most_bytes: int = 1000, until_s: float = 600.0) -> OpenTask:
        now = time.time()
        own = f"{RUN}/silos/{name}/"
        task = OpenTask(
            *(f"{RUN}/fit/1/{name}", RUN, 1, name, "fit", now, now + until_s, most_bytes),
            readable=(f"{RUN}/global/", own, f"{RUN}/one-key.json"),
            writable=(f"{own}chunks/{{sha256}}", *(own + key for key in WRITTEN)),
        )
        self.roster.tasks.open(task)
        return task

    def noted(self) -> list[str]:
        return [
            f"{one.actor}: {one.what}: {one.detail}" for one in self.roster.journal.events(1000)
        ]

    # --- requests, as anybody could make them ---

    def post(
        self,
        what: str,
        body: Any,
        key: NodeKey | None,
        *,
        now: float | None = None,
        signed_path: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = f"/photon/v2/{what}"
        signed = {}
        if key is not None:
            at = time.time() if now is None else now
            signed = sign_request(key, "POST", signed_path or path, content, now=at)
        return httpx2.post(
            self.url + path,
            content=content,
            headers={**signed, **(headers or {})},
            trust_env=False,
            timeout=20,
        )

    def join(self, token: str, name: str, key: NodeKey, **more: Any) -> httpx2.Response:
        signer = more.pop("signer", key)
        body = {"token": token, "name": name, "public_key": key.public_pem, "facts": FACTS}
        return self.post("join", body, signer, **more)

    def wants(self, key: NodeKey, task: str, *wants: dict[str, Any]) -> httpx2.Response:
        return self.post("grants", {"task_id": task, "wants": list(wants)}, key)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    try:
        made.open(operator_socket=made.socket)
        yield made
    finally:
        made.close()


def refused(answer: httpx2.Response, status: int, code: int) -> str:
    """The words of a refusal, which is a JSON error of that status and code."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "hint"}
    assert error["code"] == code, error
    return error["message"]


def put(key: str, size: int = len(DATA), sha256: str = SHA) -> dict[str, Any]:
    return {"verb": "PUT", "key": key, "bytes": size, "sha256": sha256}


def own(name: str, key: str) -> str:
    return f"{RUN}/silos/{name}/{key}"


# --- paths ---


def test_health_is_for_everybody(place: Place) -> None:
    answer = httpx2.get(place.url + "/photon/v2/health", trust_env=False)
    assert answer.json()["ok"] is True
    assert set(answer.json()) == {"ok", "version", "server_time"}
    assert "server" not in answer.headers


NOT_ASKED_HERE = [
    ("GET", "/", 404),
    ("GET", "/operator/status", 404),
    ("POST", "/operator/drain", 404),
    ("POST", "/operator/stop", 404),
    ("POST", "/photon/v2/../../operator/stop", 404),
    ("GET", "/photon/v2/%2e%2e/%2e%2e/operator/status", 404),
    ("POST", "/photon/v2/join/", 404),
    ("POST", "//photon/v2/join", 404),
    ("POST", "/PHOTON/v1/join", 404),
    ("GET", "/photon/v2/join", 405),
    ("PUT", "/photon/v2/grants", 405),
    ("DELETE", "/photon/v2/presence", 405),
    ("GET", "/docs", 404),
    ("GET", "/openapi.json", 404),
    ("GET", "/photon/v2/health?x=1", 400),
    ("POST", "/photon/v2/presence?name=blue", 400),
]


def test_what_is_not_asked_here(place: Place) -> None:
    for method, path, status in NOT_ASKED_HERE:
        # By hand: a client would tidy the path up.
        with socket.create_connection(("127.0.0.1", place.desks[0].port), timeout=10) as line:
            request = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            line.sendall(request.encode())
            text = b"".join(iter(lambda line=line: line.recv(65536), b"")).decode()
        assert text.startswith(f"HTTP/1.1 {status} "), (method, path, text)
        assert json.loads(text.partition("\r\n\r\n")[2])["error"]["code"] == 86
    assert place.roster.setting("stopping", False) is False
    assert place.roster.setting("draining", False) is False


# --- joining ---


def test_who_is_invited_joins(place: Place) -> None:
    token, key = place.roster.invite("blue", 60), place.key("blue")
    answer = place.join(token, "blue", key)
    assert answer.status_code == 200, answer.text
    assert answer.json()["name"] == "blue"
    assert answer.json()["fingerprint"] == key.fingerprint
    assert abs(answer.json()["server_time"] - time.time()) < 10
    member = place.roster.member("blue")
    assert (member.public_key, member.facts) == (key.public_pem, Facts(**FACTS))
    assert [kind for kind, _ in place.told] == ["joined"]
    # Its answer may have been lost: the same node again is welcome, and nothing is done twice.
    assert place.join(token, "blue", key).status_code == 200
    assert ([kind for kind, _ in place.told], len(place.roster.members())) == (["joined"], 1)


def test_who_joins_is_told_where_the_store_is(place: Place) -> None:
    """From then on the node refuses grants that name another place."""
    token = place.roster.invite("blue", 60)
    assert place.join(token, "blue", place.key("blue")).json()["store"] is None
    place.open(store_origin="https://store.example:443")
    token = place.roster.invite("red", 60)
    answer = place.join(token, "red", place.key("red"))
    assert answer.json()["store"] == "https://store.example:443"


def test_a_used_invitation_is_refused_and_noted(place: Place) -> None:
    token = place.roster.invite("blue", 60)
    assert place.join(token, "blue", place.key("blue")).status_code == 200
    words = refused(place.join(token, "blue", place.key("thief")), 403, 81)
    assert "was used at" in words
    assert any("invitation refused" in line and "was used" in line for line in place.noted())
    assert place.roster.member("blue").fingerprint == place.key("blue").fingerprint


def test_expired_forged_and_another_s_invitations(place: Place) -> None:
    expired = place.roster.invite("red", 0.01)
    green = place.roster.invite("green", 60)
    time.sleep(0.02)
    key = place.key("x")
    assert "expired" in refused(place.join(expired, "red", key), 403, 81)
    assert "no such invitation" in refused(place.join("forged", "red", key), 403, 81)
    assert "for green, not for red" in refused(place.join(green, "red", key), 403, 81)
    assert "no such invitation" in refused(place.join(green[:-1], "green", key), 403, 81)
    assert place.roster.members() == []
    assert sum("invitation refused" in line for line in place.noted()) == 4
    assert not any(token in line for line in place.noted() for token in (green, expired))


def test_a_key_that_the_caller_does_not_hold_is_not_registered(place: Place) -> None:
    """Whoever is invited could otherwise register a key that another node is about to bring."""
    token = place.roster.invite("evil", 60)
    victim, evil = place.key("victim"), place.key("evil")
    words = refused(place.join(token, "evil", victim, signer=evil), 401, 83)
    assert "another key than the one it registers" in words
    assert "not signed" in refused(place.join(token, "evil", victim, signer=None), 401, 83)
    assert place.roster.members() == []
    # The invitation is as good as before.
    assert place.join(token, "evil", evil).status_code == 200


def test_a_key_is_one_member_s(place: Place) -> None:
    key = place.member("blue")
    words = refused(place.join(place.roster.invite("red", 60), "red", key), 403, 80)
    assert "blue's" in words


def test_keys_of_another_kind(place: Place) -> None:
    token = place.roster.invite("blue", 60)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = other.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()
    for public_key in (pem, "not a key", "", pem.replace("PUBLIC", "PRIVATE"), "\u0000"):
        body = {"token": token, "name": "blue", "public_key": public_key, "facts": FACTS}
        refused(place.post("join", body, place.key("blue")), 403, 80)
    assert place.join(token, "blue", place.key("blue")).status_code == 200


NONSENSE: list[dict[str, Any]] = [
    {"name": "../blue"},
    {"name": "a/b"},
    {"name": ""},
    {"name": "x" * 101},
    {"name": "blue\n"},
    {"token": ""},
    {"token": 5},
    {"token": "t" * 201},
    {"facts": None},
    {"facts": FACTS | {"train_tokens": -1}},
    {"facts": FACTS | {"train_tokens": "1"}},
    {"facts": FACTS | {"train_tokens": 2**60}},
    {"facts": FACTS | {"data_sha256": "A" * 64}},
    {"facts": FACTS | {"photon_version": "\u001b[2J"}},
    {"admin": True},
]


def test_joining_with_nonsense(place: Place) -> None:
    place.open(limits=DeskLimits(joins_per_minute=100))
    key = place.key("blue")
    secret = place.roster.invite("blue", 60)
    body = {"token": secret, "name": "blue", "public_key": key.public_pem, "facts": FACTS}
    for change in NONSENSE:
        answer = place.post("join", body | change, key)
        assert "join request can't be read" in refused(answer, 400, 86), change
        assert secret not in answer.text
        assert "\x1b" not in answer.text + "".join(place.noted())
    assert place.roster.members() == []
    assert place.post("join", body, key).status_code == 200


def test_two_processes_redeem_one_invitation_through_two_desks(place: Place) -> None:
    """Each desk has the roster open by itself, as two processes would."""
    program = textwrap.dedent(
        """
        import json, sys, time
        from pathlib import Path
        from photon.errors import PhotonError
        from photon.membership.keys import NodeKey
        from photon.membership.roster import Facts
        from photon.silo.desk_client import DeskClient

        url, token, key_file, facts, ready, go = sys.argv[1:]
        key = NodeKey.load(key_file)
        client = DeskClient(url, None, key)
        client.health()
        Path(ready).touch()
        give_up = time.monotonic() + 60
        while not Path(go).exists() and time.monotonic() < give_up:
            time.sleep(0.001)
        try:
            answer = client.join(token, "blue", key.public_pem, Facts(**json.loads(facts)))
            sys.stdout.write("joined " + answer["fingerprint"])
        except PhotonError as error:
            sys.stdout.write(f"refused {error.exit_code} {error.message}")
        """
    )
    other = Roster(place.roster.path)
    second = Desk(other, place.presigner())
    second.start()
    try:
        for turn in range(3):
            token = place.roster.invite("blue", 60, rotate=turn > 0)
            go = place.folder / f"go-{turn}"
            racers = []
            for number, desk in enumerate((place.desks[0], second)):
                place.key(f"racer-{turn}-{number}")
                arguments = [
                    *(f"http://127.0.0.1:{desk.port}", token),
                    *(str(place.folder / f"racer-{turn}-{number}.key"), json.dumps(FACTS)),
                    *(str(place.folder / f"ready-{turn}-{number}"), str(go)),
                ]
                command = [sys.executable, "-c", program, *arguments]
                racers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            try:
                give_up = time.monotonic() + 60
                while not all(
                    (place.folder / f"ready-{turn}-{number}").exists() for number in (0, 1)
                ):
                    assert time.monotonic() < give_up
                    time.sleep(0.01)
                go.touch()
                said = sorted(racer.communicate(timeout=60)[0] for racer in racers)
            finally:
                for racer in racers:
                    racer.kill()
                    racer.communicate()
            assert said[0] == f"joined {place.roster.member('blue').fingerprint}", said
            assert said[1].startswith("refused 81 the invitation for blue was used"), said
    finally:
        second.stop()
        other.close()


# --- how often ---


@pytest.fixture
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allowances come back with time, and a slow machine takes some for each request."""
    stopped = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("photon.deploy.desk_requests.time", stopped)


@pytest.mark.usefixtures("no_time_passes")
def test_no_flood_of_attempts_to_join_keeps_an_invitee_out(place: Place) -> None:
    place.open(limits=DeskLimits(joins_per_minute=3))
    key, token = place.key("blue"), place.roster.invite("blue", 60)
    thief = place.key("thief")

    def guess(address: str) -> int:
        return place.join("guess", "blue", thief, headers={"x-forwarded-for": address}).status_code

    # What a caller claims comes before what the door adds.
    assert [guess(f"10.0.0.{n}, 192.0.2.1") for n in range(5)] == [403, 403, 403, 429, 429]
    words = refused(
        place.join("guess", "blue", thief, headers={"x-forwarded-for": "192.0.2.1"}), 429, 95
    )
    assert "attempts to join that failed" in words
    # From many addresses at once: none of them spends what others have.
    for address in range(10, 40):
        assert guess(f"192.0.2.{address}") == 403
    # An invitee is let in, from the very address of the flood.
    headers = {"x-forwarded-for": "192.0.2.1"}
    assert place.join(token, "blue", key, headers=headers).status_code == 200
    # Again and again: an answer may get lost, and what succeeds is no failed attempt.
    for _ in range(5):
        assert place.join(token, "blue", key, headers=headers).status_code == 200


@pytest.mark.usefixtures("no_time_passes")
def test_failed_attempts_with_an_invitation_count_for_it_and_their_address(place: Place) -> None:
    place.open(limits=DeskLimits(joins_per_minute=3))
    key, thief = place.key("blue"), place.key("thief")
    token = place.roster.invite("blue", 60, key=key.fingerprint)
    other = place.roster.invite("red", 60)
    from_there = {"x-forwarded-for": "192.0.2.1"}
    statuses = [place.join(token, "blue", thief, headers=from_there).status_code for _ in range(5)]
    assert statuses == [403, 403, 403, 429, 429]
    # Neither another invitation from there nor this one from elsewhere is the worse for it.
    assert place.join(other, "red", place.key("red"), headers=from_there).status_code == 200
    assert place.join(token, "blue", key).status_code == 200


@pytest.mark.usefixtures("no_time_passes")
def test_garbage_is_refused_without_looking_at_signatures_or_writing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.open(limits=DeskLimits(joins_per_minute=1, strangers_per_minute=1))
    blue, thief = place.member("blue"), place.key("thief")
    claim = {"Photon-Key": blue.fingerprint}
    place.join("guess", "red", thief)
    place.post("presence", {"state": "idle"}, thief, headers=claim)
    before = len(place.noted())
    monkeypatch.setattr(signing, "verify", lambda *_: pytest.fail("looked at a signature"))
    assert place.join("guess", "red", thief).status_code == 429
    assert place.post("presence", {"state": "idle"}, thief, headers=claim).status_code == 429
    assert len(place.noted()) == before


def test_a_stolen_invitation_is_worth_nothing_without_its_key(place: Place) -> None:
    key, thief = place.key("blue"), place.key("thief")
    token = place.roster.invite("blue", 60, key=key.fingerprint)
    words = refused(place.join(token, "blue", thief), 403, 81)
    assert f"is for the key {key.fingerprint}, not for {thief.fingerprint}" in words
    # The key's public half is no secret; who does not hold it can't sign.
    refused(place.join(token, "blue", key, signer=thief), 401, 83)
    assert place.roster.members() == []
    assert place.join(token, "blue", key).status_code == 200


def test_a_request_for_one_aggregator_is_nothing_to_another(place: Place) -> None:
    place.open(audience="sha256:" + "a" * 64)
    key = place.key("blue")
    token = place.roster.invite("blue", 60)
    refused(place.join(token, "blue", key), 401, 83)
    place.open(audience="")
    assert place.join(token, "blue", key).status_code == 200
    place.open(audience="sha256:" + "b" * 64)
    words = refused(place.post("presence", {"state": "idle"}, key), 401, 83)
    assert "is not blue's over this request" in words


@pytest.mark.usefixtures("no_time_passes")
def test_a_flood_of_strangers_fills_no_disk_and_keeps_nobody_out(place: Place) -> None:
    place.open(limits=DeskLimits(strangers_per_minute=3, notes_per_minute=2))
    key, stranger = place.member("blue"), place.key("stranger")
    before = len(place.noted())
    statuses = [place.post("presence", {"state": "idle"}, None).status_code for _ in range(8)]
    assert statuses == [401] * 3 + [429] * 5
    assert place.post("presence", {"state": "idle"}, stranger).status_code == 429
    # From the same address, a member is answered.
    assert place.post("presence", {"state": "idle"}, key).status_code == 200
    lines = place.noted()[before:]
    assert 1 <= sum("refused presence" in line for line in lines) <= 2


@pytest.mark.usefixtures("no_time_passes")
def test_what_was_not_noted_is_counted(place: Place) -> None:
    place.open(limits=DeskLimits(notes_per_minute=1))
    key = place.member("blue")
    for _ in range(4):
        refused(place.post("presence", b"{", key), 400, 86)
    refused(place.post("presence", {"state": "idle"}, None), 401, 83)
    assert any("and 3 refusals before it that were not noted" in line for line in place.noted())


@pytest.mark.usefixtures("no_time_passes")
def test_a_member_that_asks_without_end(place: Place) -> None:
    place.open(limits=DeskLimits(requests_per_minute=5))
    blue, red = place.member("blue"), place.member("red")
    statuses = [place.post("presence", {"state": "idle"}, blue).status_code for _ in range(7)]
    assert statuses == [200] * 5 + [429] * 2
    assert place.post("presence", {"state": "idle"}, red).status_code == 200


def test_an_allowance() -> None:
    allowance = Allowance(60, most_names=2)
    assert sum(allowance.take("a", now=0.0) for _ in range(100)) == 60
    assert not allowance.take("a", now=0.9)
    assert allowance.take("a", now=1.1)
    assert not allowance.take("a", now=1.2)
    # Time away is not saved up beyond one minute's worth.
    assert sum(allowance.take("a", now=1000.0) for _ in range(100)) == 60
    # Memory is bounded: who asked longest ago is forgotten.
    allowance.take("b", now=1000.0)
    allowance.take("c", now=1000.0)
    assert allowance.take("a", now=1000.0)


def test_addresses() -> None:
    assert caller_address("127.0.0.1", None) == "127.0.0.1"
    assert caller_address("127.0.0.1", "1.2.3.4, 192.0.2.7") == "192.0.2.7"
    assert caller_address("127.0.0.1", "::ffff:192.0.2.7") == "192.0.2.7"
    # Whoever has one IPv6 address has a whole network of them.
    assert caller_address("127.0.0.1", "2001:db8::1") == caller_address(None, "2001:db8::ffff:2")
    assert caller_address(None, "<script>") == caller_address(None, None) == "unknown"


# --- signatures ---


def both(check: Callable[[str, dict[str, Any]], None]) -> None:
    check("presence", {"state": "idle"})
    check("grants", {"task_id": "t", "wants": [{"verb": "GET", "key": "k"}]})


def test_unsigned(place: Place) -> None:
    both(lambda what, body: refused(place.post(what, body, None), 401, 83) and None)
    assert sum("not signed as it must be" in line for line in place.noted()) == 2
    assert place.roster.presences() == {}


def test_a_stranger_s_key(place: Place) -> None:
    place.member("blue")
    stranger = place.key("stranger")
    both(lambda what, body: refused(place.post(what, body, stranger), 403, 82) and None)
    assert any("unknown key" in line and stranger.fingerprint in line for line in place.noted())


def test_a_member_s_name_on_another_key_s_signature(place: Place) -> None:
    blue, red = place.member("blue"), place.member("red")
    claim = {"Photon-Key": red.fingerprint}
    both(lambda what, body: refused(place.post(what, body, blue, headers=claim), 401, 83) and None)
    assert place.roster.presences() == {}


def test_a_request_counts_once(place: Place) -> None:
    key = place.member("blue")
    body = json.dumps({"state": "training", "step": 4}).encode()
    captured = sign_request(key, "POST", "/photon/v2/presence", body, now=time.time())
    assert place.post("presence", body, None, headers=captured).status_code == 200
    words = refused(place.post("presence", body, None, headers=captured), 401, 83)
    assert "was here before" in words
    assert any("was here before" in line for line in place.noted())


def test_captured_headers_carry_nothing_else(place: Place) -> None:
    key = place.member("blue")
    body = json.dumps({"state": "idle"}).encode()
    captured = sign_request(key, "POST", "/photon/v2/presence", body, now=time.time())
    other = json.dumps({"state": "training"}).encode()
    refused(place.post("presence", other, None, headers=captured), 401, 83)
    grants = {"task_id": "t", "wants": [{"verb": "GET", "key": "k"}]}
    refused(place.post("grants", grants, key, signed_path="/photon/v2/presence"), 401, 83)
    assert place.post("presence", body, None, headers=captured).status_code == 200


@pytest.mark.parametrize("skew_s", [-3600, -130, 130, 3600])
def test_a_clock_that_is_wrong_is_told_both_times(place: Place, skew_s: float) -> None:
    key = place.member("blue")
    words = refused(
        place.post("presence", {"state": "idle"}, key, now=time.time() + skew_s), 401, 93
    )
    assert "was signed at" in words
    assert "this clock says" in words


def test_suspended_expelled_and_back(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    place.roster.suspend("blue")
    words = refused(place.post("presence", {"state": "idle"}, key), 403, 82)
    assert "suspended" in words
    refused(place.wants(key, task.id, put(own("blue", "a"))), 403, 82)
    place.roster.reinstate("blue")
    assert place.post("presence", {"state": "idle"}, key).status_code == 200
    place.roster.expel("blue")
    refused(place.post("presence", {"state": "idle"}, key), 403, 82)
    words = refused(place.wants(key, task.id, put(own("blue", "a"))), 403, 82)
    assert "expelled" in words
    assert any("expelled" in line for line in place.noted())


def test_a_replaced_key_is_refused(place: Place) -> None:
    old, new = place.member("blue"), place.key("new")
    rotate(place.roster, "blue", new.public_pem)
    assert "replaced" in refused(place.post("presence", {"state": "idle"}, old), 403, 82)
    assert place.post("presence", {"state": "idle"}, new).json()["ok"] is True


# --- presence ---


def test_presence_is_kept_and_answered(place: Place) -> None:
    key = place.member("blue")
    body = {"state": "training", "run": RUN, "round": 3, "step": 7, "of": 20, "boot": "one"}
    answer = place.post("presence", body | {"detail": "x\x1b[31m\ny"}, key).json()
    assert answer["ok"] is True
    assert (answer["member_status"], answer["draining"]) == ("active", False)
    assert abs(answer["server_time"] - time.time()) < 10
    presence, seen_at = place.roster.presences()["blue"]
    assert (presence.state, presence.round, presence.step, presence.of) == ("training", 3, 7, 20)
    assert presence.detail == "x [31m y"
    assert abs(seen_at - time.time()) < 10
    place.roster.set_setting("draining", True)
    assert place.post("presence", body, key).json()["draining"] is True


def test_two_nodes_with_one_key(place: Place) -> None:
    key = place.member("blue")
    boots = ["first", "second", "first", "second", "first"]
    answers = [place.post("presence", {"state": "idle", "boot": boot}, key) for boot in boots]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 409, 200]
    assert "another node runs with the key" in refused(answers[3], 409, 96)
    assert any("two nodes with one key" in line for line in place.noted())


# --- grants ---


def test_a_grant_is_what_the_store_wants(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    chunk = own("blue", f"chunks/{SHA}")
    wants = [put(chunk), {"verb": "GET", "key": f"{RUN}/global/state/a.json"}]
    wants += [{"verb": "HEAD", "key": chunk}, {"verb": "GET", "key": f"{RUN}/one-key.json"}]
    answer = place.wants(key, task.id, *wants).json()
    first, second, third, fourth = answer["grants"]
    assert [(one["verb"], one["key"]) for one in answer["grants"]] == [
        (want["verb"], want["key"]) for want in wants
    ]
    url = urlsplit(first["url"])
    assert (url.netloc, url.path) == ("store.example:8443", f"/photon/{chunk}")
    query = parse_qs(url.query)
    assert query["X-Amz-SignedHeaders"] == [
        "content-length;host;if-none-match;x-amz-checksum-sha256"
    ]
    assert query["X-Amz-Expires"] == ["300"]
    assert first["headers"]["content-length"] == str(len(DATA))
    assert 299 <= first["expires_at"] - answer["server_time"] <= 301
    assert second["headers"] == third["headers"] == fourth["headers"] == {}
    # It is the presigner's own signature, over what was asked.
    amz_date = query["X-Amz-Date"][0]
    signed = place.presigner().signed_query(
        "PUT",
        f"/photon/{chunk}",
        first["headers"],
        _moment(amz_date),
        int(query["X-Amz-Expires"][0]),
    )
    assert signed == url.query


def _moment(text: str) -> Any:
    from datetime import UTC, datetime

    return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


@pytest.mark.parametrize(("grant_s", "until_s"), [(60, 600), (300, 60)])
def test_a_grant_is_no_longer_than_grant_s_and_its_task(
    place: Place, grant_s: int, until_s: int
) -> None:
    place.open(limits=DeskLimits(grant_s=grant_s))
    key, task = place.member("blue"), place.task("blue", until_s=until_s)
    answer = place.wants(key, task.id, put(own("blue", "a"))).json()
    assert 58 <= answer["grants"][0]["expires_at"] - answer["server_time"] <= 60


def refusals(answer: httpx2.Response) -> list[str]:
    """The words for each want, none of which was granted."""
    assert answer.status_code == 200, answer.text
    parts = answer.json()["grants"]
    assert all(set(part) == {"error"} and part["error"]["code"] == 76 for part in parts), parts
    return [part["error"]["message"] for part in parts]


@pytest.mark.parametrize("verb", ["GET", "HEAD", "PUT"])
def test_keys_that_are_not_the_task_s(place: Place, verb: str) -> None:
    blue = place.member("blue")
    place.member("red")
    place.member("blue-2")
    task = place.task("blue", most_bytes=10**9)
    mine = f"{RUN}/silos/blue/"
    tricks = [
        *(f"{mine}../red/a", "../a", "..", "/etc/passwd", f"/{mine}a", f"{mine}", ""),
        *(f"{mine}%2e%2e/red/a", f"{mine}..%2fred/a", f"{mine}a?x=1", f"{mine}a#b"),
        *(f"{mine}\\..\\red", f"{mine}a\n", f"{mine}a\x00b", f"{mine}./a", f"{mine}//a"),
        *(f"{mine}.hidden", f"{mine}é", f"{mine}{'a' * 600}", f"{mine}a/../../red/a"),
        *(f"{RUN}/silos/red/a", f"{RUN}/silos/blue-2/a", f"{RUN}/silos/blue", f"{RUN}/silos"),
        *(f"{'1' * 32}/silos/blue/a", f"{'1' * 32}/global/a", RUN, "chunks/a"),
        *(f"{RUN}/globals/a", f"{RUN}/global", f"{RUN}/one-key.json/a", f"{RUN}/one-key.jso"),
        f"x/{mine}a",
        f"{RUN}/Silos/blue/a",
    ]
    wants = [put(key) | {"verb": verb} for key in tricks]
    answer = place.wants(blue, task.id, *wants)
    assert len(refusals(answer)) == len(tricks)
    assert "url" not in answer.text
    noted = [line for line in place.noted() if line.startswith("blue: refused grants")]
    assert len(noted) == 1
    assert f"and {len(tricks) - 1} more in this request" in noted[0]
    assert place.desks[0].status()["open_tasks"][0]["granted_bytes"] == 0


def test_what_is_readable_is_not_writable(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    wants = [put(f"{RUN}/global/state/a.json"), put(f"{RUN}/one-key.json")]
    assert all("not part of task" in words for words in refusals(place.wants(key, task.id, *wants)))


def test_an_update_is_written_under_its_own_round_s_keys(place: Place) -> None:
    """Exactly: what a silo might invent besides would be nobody's to remove."""
    key = place.member("blue")
    now, folder = time.time(), f"{RUN}/silos/blue"
    task = OpenTask(
        *(f"{RUN}/fit/12/blue", RUN, 12, "blue", "fit", now, now + 60, 10**6),
        readable=(f"{RUN}/global/chunks/",),
        writable=update_keys(folder, 12, "blue"),
    )
    place.roster.tasks.open(task)
    update = f"{folder}/update/round-000012/blue-{SHA[:16]}.json"
    invented = [
        f"{folder}/junk/round1.bin",
        f"{folder}/{SHA}",
        f"{folder}/chunks/{SHA}x",
        f"{folder}/chunks/{'0' * 64}",
        f"{folder}/update/round-999999999/blue-{SHA[:16]}.json",
        f"{folder}/update/round-000011/blue-{SHA[:16]}.json",
        f"{folder}/update/round-000012/red-{SHA[:16]}.json",
        f"{folder}/update/round-000012/blue-{'0' * 16}.json",
        f"{folder}/update/round-000012/blue-{SHA}.json",
        f"{folder}/state/round-000012/{SHA}.json",
        f"{folder}/update/round-000012/blue-{{sha256:.16}}.json",
    ]
    assert len(refusals(place.wants(key, task.id, *map(put, invented)))) == len(invented)
    for wanted in (update, f"{folder}/chunks/{SHA}"):
        for verb in ("PUT", "HEAD", "GET"):
            (part,) = place.wants(key, task.id, put(wanted) | {"verb": verb}).json()["grants"]
            assert "url" in part, part


def test_another_s_task(place: Place) -> None:
    blue, red = place.member("blue"), place.member("red")
    task = place.task("blue")
    for wants in ([put(own("blue", "a"))], [{"verb": "GET", "key": f"{RUN}/global/a"}]):
        words = refused(place.wants(red, task.id, *wants), 403, 76)
        assert words.startswith("red has no open task")
    # In the same words as a task that never was.
    never = refused(place.wants(red, "never", put(own("red", "a"))), 403, 76)
    assert never.startswith("red has no open task 'never'")
    assert any(line.startswith("red: refused grants: red has no open") for line in place.noted())
    assert place.wants(blue, task.id, put(own("blue", "a"))).json()["grants"][0]["url"]


def test_a_closed_task_and_one_whose_time_is_up(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    place.roster.tasks.close(task.id, None)
    refused(place.wants(key, task.id, put(own("blue", "a"))), 403, 76)
    late = place.task("blue", until_s=-1)
    words = refused(place.wants(key, late.id, put(own("blue", "a"))), 403, 76)
    assert "is up" in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bytes": None}, "bytes must be"),
        ({"bytes": 0}, "bytes must be"),
        ({"bytes": (64 << 20) + 1}, "bytes must be 1 to 67108864"),
        ({"sha256": None}, "sha256 must be"),
        ({"sha256": "A" * 64}, "sha256 must be"),
        ({"sha256": "ab"}, "sha256 must be"),
        ({"key": own("blue", "chunks/" + "0" * 64)}, "not part of task"),
        ({"key": own("blue", f"chunks/{SHA[:16]}")}, "not part of task"),
    ],
    ids=str,
)
def test_what_is_written_is_promised(place: Place, change: dict[str, Any], words: str) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=1 << 40)
    (said,) = refusals(place.wants(key, task.id, put(own("blue", "a")) | change))
    assert words in said


def test_no_more_than_the_task_may_write(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=1000)
    sizes = [400, 400, 300, 200, 1]
    wants = [put(own("blue", f"part-{n}"), size) for n, size in enumerate(sizes)]
    parts = place.wants(key, task.id, *wants).json()["grants"]
    assert ["url" in part for part in parts] == [True, True, False, True, False]
    assert "would write 1100; 1000 are allowed" in parts[2]["error"]["message"]
    # Asked again, what was granted does not count again ...
    again = place.wants(key, task.id, *wants[:2], wants[3]).json()["grants"]
    assert all("url" in part for part in again)
    # ... but another object under the same key does.
    other = put(own("blue", "part-0"), 400, "1" * 64)
    assert "would write 1400" in refusals(place.wants(key, task.id, other))[0]
    (shown,) = place.desks[0].status()["open_tasks"]
    assert (shown["granted_bytes"], shown["most_bytes"]) == (1000, 1000)


def test_sizes_are_counted_when_asked_in_parallel(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=1000)
    granted: list[bool] = []

    def ask(number: int) -> None:
        answer = place.wants(key, task.id, put(own("blue", f"part-{number}"), 100))
        granted.append("url" in answer.json()["grants"][0])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 10
    assert place.desks[0].status()["open_tasks"][0]["granted_bytes"] == 1000


def test_a_task_that_is_opened_again_is_counted_anew(place: Place) -> None:
    """A node that was killed trains again, and its update may be another one."""
    key, task = place.member("blue"), place.task("blue", most_bytes=100)
    full = put(own("blue", "a"), 100)
    assert "url" in place.wants(key, task.id, full).json()["grants"][0]
    assert refusals(place.wants(key, task.id, put(own("blue", "b"), 100)))
    place.roster.tasks.open(replace(task, opened_at=task.opened_at + 1))
    assert "url" in place.wants(key, task.id, put(own("blue", "b"), 100)).json()["grants"][0]


def test_a_desk_that_restarts_does_not_count_twice(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue", most_bytes=100)
    full = put(own("blue", "a"), 100)
    assert "url" in place.wants(key, task.id, full).json()["grants"][0]
    place.open()
    assert "url" in place.wants(key, task.id, full).json()["grants"][0]


def test_only_so_many_objects(place: Place) -> None:
    place.open(limits=DeskLimits(most_objects=3))
    key, task = place.member("blue"), place.task("blue")
    parts = place.wants(key, task.id, *(put(own("blue", f"p{n}"), 1) for n in range(5))).json()
    assert ["url" in part for part in parts["grants"]] == [True] * 3 + [False] * 2


def test_requests_for_grants_that_make_no_sense(place: Place) -> None:
    key, task = place.member("blue"), place.task("blue")
    want = {"verb": "GET", "key": f"{RUN}/global/a"}
    for body in (
        {"task_id": task.id, "wants": []},
        {"task_id": task.id, "wants": [want] * 257},
        {"task_id": task.id, "wants": [want | {"verb": "DELETE"}]},
        {"task_id": task.id, "wants": [want | {"verb": "get"}]},
        {"task_id": task.id, "wants": [want | {"bytes": -1}]},
        {"task_id": task.id, "wants": [want | {"bytes": True}]},
        {"task_id": task.id, "wants": [want | {"extra": 1}]},
        {"task_id": None, "wants": [want]},
        {"wants": [want]},
        [task.id, want],
    ):
        refused(place.post("grants", body, key), 400, 86)
    assert len(place.wants(key, task.id, *[want] * 256).json()["grants"]) == 256


def test_a_signer_that_fails_says_nothing_secret(place: Place) -> None:
    class Broken(S3Presigner):
        def grant(self, *_: Any, **__: Any) -> Grant:
            raise RuntimeError("token=hush")

    broken = Broken("https://s", "box", region="r", access_key_id="a", secret="b")
    place.open(presigner=broken)
    key, task = place.member("blue"), place.task("blue")
    answer = place.wants(key, task.id, put(own("blue", "a")))
    assert answer.json()["grants"][0]["error"]["code"] == 71
    assert "hush" not in answer.text + "".join(place.noted())


# --- sizes, slowness, trouble ---


@pytest.mark.parametrize(
    ("what", "most"), [("join", 4 << 10), ("presence", 32 << 10), ("grants", 256 << 10)]
)
def test_bodies_that_are_too_long(place: Place, what: str, most: int) -> None:
    key = place.member("blue")
    for size in (most + 1, 3 << 20):
        answer = place.post(what, b" " * size, key)
        assert f"{most} are allowed" in refused(answer, 413, 86)
    # To the byte: this one is read, and found to be no JSON.
    assert place.post(what, b"x" * most, key).status_code in (400, 401)


def test_a_body_without_end(place: Place) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", place.desks[0].port), timeout=20) as line:
        line.sendall(
            b"POST /photon/v2/join HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            while sent < 64 << 20:
                line.sendall(piece)
                sent += 65536
        except OSError:  # reset or broken pipe, as it happens
            pass
    assert 4 << 20 < sent < 32 << 20
    assert httpx2.get(place.url + "/photon/v2/health", trust_env=False).status_code == 200


def test_a_body_that_does_not_come(place: Place) -> None:
    place.open(limits=DeskLimits(body_s=0.3))
    host = ("127.0.0.1", place.desks[-1].port)
    with socket.create_connection(host, timeout=20) as line:
        line.sendall(b"POST /photon/v2/grants HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        answer = line.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_connections_that_say_nothing_keep_nobody_out(place: Place) -> None:
    host = ("127.0.0.1", place.desks[0].port)
    idle = [socket.create_connection(host, timeout=20) for _ in range(100)]
    try:
        for line in idle[:50]:
            line.sendall(b"POST /photon/v2/grants HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        start = time.monotonic()
        health = httpx2.get(place.url + "/photon/v2/health", trust_env=False, timeout=60)
        assert health.status_code == 200
        assert time.monotonic() - start < 15
    finally:
        for line in idle:
            line.close()


def test_trouble_of_the_desk_s_own_is_answered_without_its_words(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = place.member("blue")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("hush")

    monkeypatch.setattr(place.roster, "seen", fail)
    answer = place.post("presence", {"state": "idle"}, key)
    assert "log says why" in refused(answer, 500, 90)
    assert "hush" not in answer.text + "".join(place.noted())
    monkeypatch.undo()
    assert place.post("presence", {"state": "idle"}, key).status_code == 200


def test_a_roster_that_is_locked_is_a_reason_to_come_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """403 would tell the node that it may never come back."""
    import sqlite3

    from photon.errors import MembershipError

    key = place.member("blue")

    def locked(*_: Any, **__: Any) -> None:
        try:
            raise sqlite3.OperationalError("database is locked")
        except sqlite3.Error as error:
            raise MembershipError("can't use the roster") from error

    monkeypatch.setattr(place.roster, "seen", locked)
    refused(place.post("presence", {"state": "idle"}, key), 503, 90)


def test_a_listener_that_fails_harms_nobody(place: Place) -> None:
    def fail(kind: str, detail: dict[str, Any]) -> None:
        raise RuntimeError(kind)

    place.open(on_event=fail)
    refused(place.post("presence", {"state": "idle"}, None), 401, 83)
    token = place.roster.invite("blue", 60)
    assert place.join(token, "blue", place.key("blue")).status_code == 200


# --- the operator ---


def test_status_says_who_is_here_and_what_each_does(place: Place) -> None:
    services = [{"name": "superlink", "state": "up", "pid": 1}]
    place.desks[0].stop()
    place.open(
        operator_socket=place.socket,
        about=lambda: {"services": services, "run": {"name": "demo", "round": 3}},
    )
    blue = place.member("blue")
    place.member("red")
    task = place.task("blue")
    doing = {"state": "training", "run": RUN, "round": 1, "of": 9, "task": task.id, "boot": "b"}
    place.post("presence", doing | {"step": 1}, blue)
    first = ask_operator(place.socket, "GET", "/operator/status")
    time.sleep(0.02)
    place.post("presence", doing | {"step": 2}, blue)
    status = ask_operator(place.socket, "GET", "/operator/status")
    assert (status["run"], status["services"]) == ({"name": "demo", "round": 3}, services)
    assert (status["draining"], status["stopping"]) == (False, False)
    by_name = {member["name"]: member for member in status["members"]}
    assert by_name["red"] | {"here": False, "presence": None} == by_name["red"]
    shown = by_name["blue"]["presence"]
    assert by_name["blue"]["here"] is True
    assert (shown["state"], shown["round"], shown["step"], shown["of"]) == ("training", 1, 2, 9)
    assert shown["until"] == pytest.approx(task.until)
    # Since the first step, not the last.
    assert shown["since"] == first["members"][0]["presence"]["since"] < shown["seen_at"]
    assert [one["id"] for one in status["open_tasks"]] == [task.id]
    assert status["events"][-1]["what"]
    assert "boot" not in shown
    # Another state begins now; silence makes it gone.
    place.post("presence", {"state": "idle"}, blue)
    assert place.desks[-1].status()["members"][0]["presence"]["since"] > shown["since"]


def test_status_of_a_run_that_went_wrong(place: Place) -> None:
    """Its loss is no number, which JSON can't say."""
    place.desks[0].stop()
    place.open(
        operator_socket=place.socket,
        about=lambda: {
            "services": [{"name": "weed", "pid": None, "log": Path("weed.log")}],
            "run": {"loss": float("nan"), "rounds": [1.5, float("inf")], "done": False},
        },
    )
    status = ask_operator(place.socket, "GET", "/operator/status")
    assert status["run"] == {"loss": None, "rounds": [1.5, None], "done": False}
    assert status["services"] == [{"name": "weed", "pid": None, "log": "weed.log"}]


def test_who_is_silent_is_not_here(place: Place) -> None:
    place.open(limits=DeskLimits(here_s=0.05))
    place.post("presence", {"state": "idle"}, place.member("blue"))
    time.sleep(0.1)
    (blue,) = place.desks[-1].status()["members"]
    assert (blue["here"], blue["presence"]["state"]) == (False, "idle")


def test_drain_and_stop(place: Place) -> None:
    assert ask_operator(place.socket, "POST", "/operator/drain")["draining"] is True
    assert place.roster.setting("draining") is True
    ask_operator(place.socket, "POST", "/operator/drain", {"draining": False})
    assert place.roster.setting("draining") is False
    for wrong in ({"draining": 1}, {}, {"x": []}):
        with pytest.raises(ProtocolError, match="drain takes"):
            ask_operator(place.socket, "POST", "/operator/drain", wrong)
    assert ask_operator(place.socket, "POST", "/operator/stop")["stopping"] is True
    assert place.roster.setting("stopping") is True
    kinds = [kind for kind, _ in place.told if kind != "refused"]
    assert kinds == ["drain", "drain", "stop"]
    assert [one.what for one in place.roster.journal.events(9) if one.actor == "operator"] == [
        *("drain", "drain taken back"),
        "stop",
    ]


def test_the_operator_s_socket_is_its_owner_s_alone(place: Place) -> None:
    assert stat.S_IMODE(place.socket.stat().st_mode) == 0o600
    assert sorted(path.name for path in place.socket.parent.glob(".s*")) == []
    with pytest.raises(ProtocolError, match="not asked here"):
        ask_operator(place.socket, "POST", "/photon/v2/join", {})
    place.desks[0].stop()
    assert not place.socket.exists()
    with pytest.raises(UnreachableError, match=r"no `photon serve` answers on .*operator\.sock"):
        ask_operator(place.socket, "GET", "/operator/status")


def test_sockets_that_are_taken(place: Place) -> None:
    def desk(**options: Any) -> Desk:
        made = Desk(place.roster, place.presigner(), **options)
        place.desks.append(made)
        return made

    with pytest.raises(PortInUseError, match=r"127\.0\.0\.1:\d+") as caught:
        desk().start(place.desks[0].port)
    assert caught.value.hint
    with pytest.raises(PortInUseError, match="somebody answers on"):
        desk().start(operator_socket=place.socket)
    # A socket of a serve that was killed is in nobody's way.
    dead = place.folder / "dead.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(dead))
    desk().start(operator_socket=dead)
    assert ask_operator(dead, "GET", "/operator/status")["members"] == []
    # What is no socket is not removed.
    file = place.folder / "precious"
    file.write_text("x")
    with pytest.raises(DeployError, match="is no socket"):
        desk().start(operator_socket=file)
    assert file.read_text() == "x"
    with pytest.raises(DeployError, match="can't make the operator's socket") as caught:
        desk().start(operator_socket=place.folder / ("d" * 100) / "o.sock")
    assert "107 characters" in (caught.value.hint or "")


def test_started_once_and_stopped_twice(place: Place) -> None:
    desk = place.desks[0]
    assert desk.alive
    with pytest.raises(DeployError, match="started already"):
        desk.start()
    port = desk.port
    desk.stop()
    desk.stop()
    assert not desk.alive
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(place.url + "/photon/v2/health", trust_env=False)
    # The port is free at once, for the next serve.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_stopping_waits_for_answers_that_are_on_their_way(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, redeem = threading.Event(), place.roster.redeem

    def slow(*of: Any) -> Member:
        entered.set()
        time.sleep(0.5)
        return redeem(*of)

    monkeypatch.setattr(place.roster, "redeem", slow)
    desk = place.desks[0]
    token, key = place.roster.invite("blue", 60), place.key("blue")
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(place.join(token, "blue", key).status_code)
    )
    thread.start()
    assert entered.wait(10)
    desk.stop()
    thread.join()
    assert answers == [200]


def test_nothing_secret_is_written_down(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    token, key = place.roster.invite("blue", 60), place.key("blue")
    place.join(token, "blue", key)
    place.join(token, "blue", place.key("thief"))
    task = place.task("blue")
    answer = place.wants(key, task.id, put(own("blue", "a")), put("../a"))
    signature = parse_qs(urlsplit(answer.json()["grants"][0]["url"]).query)["X-Amz-Signature"][0]
    written = "\n".join([*place.noted(), str(place.told), caplog.text])
    status = json.dumps(place.desks[0].status())
    for secret in (token, signature, "very-secret", "X-Amz-Signature", "X-Amz-Credential"):
        assert secret not in written + status


def test_no_torch_in_a_desk() -> None:
    program = "import sys, photon.deploy.desk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_errors_are_photon_s(place: Place) -> None:
    """What a desk says is of a class that its other side knows."""
    from photon.errors import error_of

    answer = place.post("presence", {"state": "idle"}, None).json()["error"]
    kind = error_of(answer["code"])
    assert issubclass(kind, PhotonError)
    assert kind.__name__ == "SignatureError"
