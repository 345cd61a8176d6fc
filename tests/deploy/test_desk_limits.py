"""How often, how much and how slowly the desk may be asked, and what a flood costs."""

from __future__ import annotations

import socket
import time
import types

import httpx2
import pytest
from desk_place import Place, refused

from photon.deploy.desk import DeskLimits
from photon.deploy.desk_requests import Allowance, caller_address
from photon.membership import signing

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


# --- sizes and slowness ---


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
