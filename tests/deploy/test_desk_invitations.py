"""Joining at the desk: who is invited, and whose invitation or key is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from desk_place import FACTS, Place, refused

from photon.deploy.desk import Desk, DeskLimits
from photon.membership.roster import Facts, Roster


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
    assert any("refused join" in line and "was used" in line for line in place.noted())
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
    assert sum("refused join" in line for line in place.noted()) == 4
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


def test_a_stolen_invitation_is_worth_nothing_without_its_key(place: Place) -> None:
    key, thief = place.key("blue"), place.key("thief")
    token = place.roster.invite("blue", 60, key=key.fingerprint)
    words = refused(place.join(token, "blue", thief), 403, 81)
    assert f"is for the key {key.fingerprint}, not for {thief.fingerprint}" in words
    # The key's public half is no secret; who does not hold it can't sign.
    refused(place.join(token, "blue", key, signer=thief), 401, 83)
    assert place.roster.members() == []
    assert place.join(token, "blue", key).status_code == 200
