"""The desk, over real HTTP: its paths, presence, its own trouble, and its end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from desk_place import RUN, Place, own, put, refused

from photon.errors import DeployError, PhotonError
from photon.membership.roster import Member

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
    assert any("another node runs with the key" in line for line in place.noted())


# --- trouble ---


def test_trouble_of_the_desk_s_own_is_answered_without_its_words(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = place.member("blue")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("hush")

    monkeypatch.setattr(place.roster, "all_seen", fail)
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

    monkeypatch.setattr(place.roster, "all_seen", locked)
    refused(place.post("presence", {"state": "idle"}, key), 503, 90)


def test_a_listener_that_fails_harms_nobody(place: Place) -> None:
    def fail(kind: str, detail: dict[str, Any]) -> None:
        raise RuntimeError(kind)

    place.open(on_event=fail)
    refused(place.post("presence", {"state": "idle"}, None), 401, 83)
    token = place.roster.invite("blue", 60)
    assert place.join(token, "blue", place.key("blue")).status_code == 200


# --- start and end ---


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


# --- what it says ---


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
