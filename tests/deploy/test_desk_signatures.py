"""Whose signature the desk believes: members' own, once, fresh, over this very request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from desk_place import Place, own, put, refused
from rotation import rotate

from photon.membership.signing import sign_request


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
    assert any("is no member's" in line and stranger.fingerprint in line for line in place.noted())


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
