"""A node's client and a real desk: joining, being here, refusals, what is sent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from member_desk import FACTS, RUN, Aggregator, fake_store
from odd_server import saying
from tls_door import Authority, door

from photon.deploy.certificates import keep_member_authority
from photon.deploy.desk import Desk, DeskLimits
from photon.errors import (
    ClockSkewError,
    InvitationError,
    KeyInUseError,
    MembershipError,
    UnknownMemberError,
    UnreachableError,
)
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.roster import Presence
from photon.silo.desk_client import DeskClient


def test_a_node_joins_and_says_that_it_is_here_over_tls(
    aggregator: Aggregator, authority: Authority, tmp_path: Path
) -> None:
    aggregator.desk.stop()
    aggregator.desk = Desk(
        aggregator.roster,
        fake_store(),
        audience=certificate_fingerprint(authority.file.read_text()),
        authority=keep_member_authority(tmp_path),
    )
    aggregator.desk.start()
    key = NodeKey.create(tmp_path / "node.key")
    token = aggregator.roster.invite("blue", 60)
    with door(authority.server(), aggregator.desk.port) as address:
        client = DeskClient(address, authority.file, key)
        try:
            assert client.health()["ok"] is True
            joined = client.join(token, "blue", key.public_pem, FACTS)
            assert (joined["name"], joined["fingerprint"]) == ("blue", key.fingerprint)
            # Again by the same node, whose answer was lost.
            assert client.join(token, "blue", key.public_pem, FACTS)["name"] == "blue"
            said = client.presence(Presence("training", RUN, 2, 5, 9, "task", "words", "boot-1"))
            assert said | {"ok": True, "draining": False} == said
        finally:
            client.close()
    presence, _ = aggregator.roster.presences()["blue"]
    assert presence == Presence("training", RUN, 2, 5, 9, "task", "words", "boot-1")


def test_words_that_a_desk_would_not_take_are_cut(aggregator: Aggregator) -> None:
    blue = aggregator.member("blue")
    blue.presence(Presence("refused", detail="\ud800\x1b" + "x" * 5000))
    presence, _ = aggregator.roster.presences()["blue"]
    assert presence.detail == "  " + "x" * 1998


def test_refusals_arrive_as_the_desk_raised_them(aggregator: Aggregator, tmp_path: Path) -> None:
    thief = NodeKey.create(tmp_path / "thief.key")
    blue = aggregator.member("blue")
    with pytest.raises(InvitationError, match="no such invitation") as caught:
        aggregator.client(thief).join("guess", "blue", thief.public_pem, FACTS)
    assert caught.value.hint
    with pytest.raises(UnknownMemberError, match="is no member's"):
        aggregator.client(thief).presence(Presence("idle"))
    for boot in ("a", "b", "a"):
        blue.presence(Presence("idle", boot=boot))
    with pytest.raises(KeyInUseError, match="another node runs with the key of blue"):
        blue.presence(Presence("idle", boot="b"))
    aggregator.roster.suspend("blue")
    with pytest.raises(UnknownMemberError, match="suspended"):
        blue.presence(Presence("idle"))


def test_a_wrong_clock(aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    blue = aggregator.member("blue")
    real = time.time
    signer = sys.modules["photon.silo.desk_client"].sign_request
    monkeypatch.setattr(
        "photon.silo.desk_client.sign_request",
        lambda *what, now, audience: signer(*what, now=real() - 7200, audience=audience),
    )
    with pytest.raises(ClockSkewError, match=r"was signed at .* this clock says"):
        blue.presence(Presence("idle"))


def test_the_key_that_joins_is_the_key_that_signs(aggregator: Aggregator, tmp_path: Path) -> None:
    key, other = (NodeKey.create(tmp_path / name) for name in ("one", "two"))
    for client in (aggregator.client(None), aggregator.client(other)):
        with pytest.raises(MembershipError, match="the key that it holds"):
            client.join("t", "blue", key.public_pem, FACTS)
    with pytest.raises(MembershipError, match="needs the node's key"):
        aggregator.client(None).presence(Presence("idle"))
    assert aggregator.client(None).health()["ok"] is True


def test_each_request_is_signed_anew_and_nothing_else_is_sent(tmp_path: Path) -> None:
    key = NodeKey.create(tmp_path / "node.key")
    with saying(200, {"ok": True}) as (address, asked):
        client = DeskClient(address, None, key)
        client.presence(Presence("idle"))
        client.presence(Presence("idle"))
        client.close()
    (path, first), (_, second) = asked
    assert path == "/photon/v2/presence"
    names = {name.lower() for name in first}
    assert names == {
        *("host", "accept", "accept-encoding", "connection", "user-agent"),
        *("content-length", "content-type"),
        *("photon-key", "photon-time", "photon-nonce", "photon-signature"),
    }
    nonces = [{name.lower(): one[name] for name in one}["photon-nonce"] for one in (first, second)]
    assert nonces[0] != nonces[1]


# --- the machine's own ---


def test_answers_come_at_once(aggregator: Aggregator) -> None:
    """Without TCP_NODELAY on the desk's side, each would take 40 ms."""
    client = aggregator.client(None)
    client.health()
    took = []
    for _ in range(20):
        start = time.perf_counter()
        client.health()
        took.append(time.perf_counter() - start)
    assert min(took) < 0.03, took


def test_a_member_s_limit_is_no_obstacle_to_a_busy_node(aggregator: Aggregator) -> None:
    """Eight streams over a fast link ask some tens of times a second, in batches."""
    assert DeskLimits().requests_per_minute / 60 >= 50


def test_no_torch_in_a_client() -> None:
    program = "import sys, photon.silo.desk_client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_poll_waits_as_long_as_the_desk_would_like_until_one_is_cut(tmp_path: Path) -> None:
    key = NodeKey.create(tmp_path / "key")
    with saying(200, {"letter": None, "patience_s": 100.0}) as (address, asked):
        client = DeskClient(address, None, key)
        assert client.task("a", ()) is client.task("a", ()) is None
    with pytest.raises(UnreachableError):
        client.task("a", ())
    client.close()
    assert [headers["Photon-Patience"] for _, headers in asked] == ["45", "100"]
    assert client._patience_s == 45.0  # something on the way bears no more, perhaps


def test_a_desk_holds_a_poll_no_longer_than_its_node_waits(aggregator: Aggregator) -> None:
    blue = aggregator.member("blue")
    blue._patience_s = 6.0
    aggregator.desk._limits = DeskLimits(poll_s=100.0)  # as where very many wait
    assert blue.task("a", ()) is None
    assert blue._patience_s == 105.0
