"""Signed documents hold for one purpose; signed requests hold once, for two minutes."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.errors import ClockSkewError, PhotonError, SignatureError, UnknownMemberError
from photon.membership import signing
from photon.membership.keys import verify
from photon.membership.signing import (
    RECEIPT,
    RequestVerifier,
    sign_document,
    sign_request,
    verify_document,
)

NOW = 1_800_000_000.0
PATH = "/photon/v2/grants"


@pytest.fixture
def verifier(roster, join, keys):
    join("lab", keys[0])
    return RequestVerifier(roster.active)


def test_a_document_holds_for_its_purpose(keys):
    signature = sign_document(keys[0], RECEIPT, b"reply")
    verify_document(keys[0].public_pem, RECEIPT, b"reply", signature)
    for pem, purpose, data in (
        (keys[1].public_pem, RECEIPT, b"reply"),
        (keys[0].public_pem, "photon-other-v1", b"reply"),
        (keys[0].public_pem, "photon-receipt-v2", b"reply"),
        (keys[0].public_pem, RECEIPT, b"Reply"),
    ):
        with pytest.raises(SignatureError):
            verify_document(pem, purpose, data, signature)
    # Nor is it a bare signature over the data, as Flower makes them over a time of day.
    with pytest.raises(SignatureError):
        verify(keys[0].public_pem, b"reply", signature)
    with pytest.raises(SignatureError):
        verify_document(keys[0].public_pem, RECEIPT, b"12:00", keys[0].sign(b"12:00"))


def test_a_purpose_can_not_be_moved_into_the_data(keys):
    signature = sign_document(keys[0], "photon-a", b"\0data")
    with pytest.raises(SignatureError):
        verify_document(keys[0].public_pem, "photon-a-", b"data", signature)
    for purpose in ("", "a\0b", "Photon", "a b"):
        with pytest.raises(ValueError, match="no purpose"):
            sign_document(keys[0], purpose, b"data")


def test_a_request_says_who_asks(verifier, keys):
    headers = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    assert verifier.verify("POST", PATH, b"{}", headers, now=NOW + 3).name == "lab"
    lower = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    lower = {name.lower(): value for name, value in lower.items()}
    assert verifier.verify("POST", PATH, b"{}", lower, now=NOW).name == "lab"


def test_a_request_says_whom_it_asks(roster_of_one, keys):
    ours, theirs = ("sha256:" + letter * 64 for letter in "ab")
    verifier = RequestVerifier(roster_of_one.active, audience=ours)
    good = sign_request(keys[0], "POST", PATH, b"{}", now=NOW, audience=ours)
    for audience in ("", theirs):
        other = sign_request(keys[0], "POST", PATH, b"{}", now=NOW, audience=audience)
        with pytest.raises(SignatureError, match="is not lab's over this request") as caught:
            verifier.verify("POST", PATH, b"{}", other, now=NOW)
        assert "another aggregator" in str(caught.value.hint)
    assert verifier.verify("POST", PATH, b"{}", good, now=NOW).name == "lab"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", PATH, b"{}"),
        ("POST", "/photon/v2/presence", b"{}"),
        ("POST", PATH + "?more", b"{}"),
        ("POST", PATH, b"{ }"),
    ],
)
def test_a_changed_request_is_refused(verifier, keys, method, path, body):
    headers = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    with pytest.raises(SignatureError, match="is not lab's over this request"):
        verifier.verify(method, path, body, headers, now=NOW)
    # The refused attempt did not use it up.
    verifier.verify("POST", PATH, b"{}", headers, now=NOW)


@pytest.mark.parametrize("name", sorted(signing._SHAPES))
def test_every_header_counts(verifier, keys, name):
    headers = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    without = {key: value for key, value in headers.items() if key != name}
    with pytest.raises(SignatureError, match=f"header {name} is missing"):
        verifier.verify("POST", PATH, b"{}", without, now=NOW)
    with pytest.raises(SignatureError, match=f"header {name} is"):
        verifier.verify("POST", PATH, b"{}", {**headers, name: "x y"}, now=NOW)
    other = sign_request(keys[1], "POST", PATH, b"{}", now=NOW + 1)
    with pytest.raises((SignatureError, UnknownMemberError)):
        verifier.verify("POST", PATH, b"{}", {**headers, name: other[name]}, now=NOW)


def test_a_request_holds_once(verifier, keys):
    headers = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    verifier.verify("POST", PATH, b"{}", headers, now=NOW)
    for later in (0, 1, 119):
        with pytest.raises(SignatureError, match="was here before"):
            verifier.verify("POST", PATH, b"{}", headers, now=NOW + later)


def test_of_many_that_replay_a_request_at_once_one_passes(verifier, keys):
    headers = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    together, passed, refused = threading.Barrier(8), [], []

    def ask():
        together.wait()
        try:
            passed.append(verifier.verify("POST", PATH, b"{}", headers, now=NOW))
        except SignatureError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), len(refused)) == (1, 7)


@settings(max_examples=40)
@given(
    signed=st.floats(-400, 400),
    delays=st.lists(st.floats(0, 300), min_size=1, max_size=6).map(sorted),
)
def test_no_moment_lets_a_request_pass_twice(roster_of_one, keys, signed, delays):
    verifier = RequestVerifier(roster_of_one.active)
    headers = sign_request(keys[0], "POST", PATH, b"", now=NOW + signed)
    passed = 0
    for delay in delays:
        try:
            verifier.verify("POST", PATH, b"", headers, now=NOW + delay)
            passed += 1
        except ClockSkewError:
            assert abs(signed - delay) > 119.99
        except SignatureError:
            assert passed == 1
        # Others come and go, so that the old is forgotten.
        other = sign_request(keys[0], "POST", PATH, b"", now=NOW + delay)
        verifier.verify("POST", PATH, b"", other, now=NOW + delay)
    assert passed <= 1


@pytest.fixture(scope="module")
def roster_of_one(tmp_path_factory, keys):
    from photon.membership.roster import Facts, Roster

    with Roster(tmp_path_factory.mktemp("one") / "members.sqlite") as roster:
        facts = Facts("d" * 64, "e" * 64, 1, "0.1.0")
        roster.redeem(roster.invite("lab", 60), "lab", keys[0].public_pem, facts)
        yield roster


@pytest.mark.parametrize("skew", [-1769, -121, 121, 1e9])
def test_clocks_apart_are_said_with_both_times(verifier, keys, skew):
    headers = sign_request(keys[0], "POST", PATH, b"{}", now=NOW + skew)
    with pytest.raises(ClockSkewError, match="this clock says 2027-01-15 08:00:00") as caught:
        verifier.verify("POST", PATH, b"{}", headers, now=NOW)
    assert "timedatectl" in str(caught.value)
    if skew == -1769:
        assert "signed at 2027-01-15 07:30:31" in caught.value.message
    verifier.verify(
        "POST", PATH, b"{}", sign_request(keys[0], "POST", PATH, b"{}", now=NOW + 119), now=NOW
    )


def test_strangers_suspended_and_expelled_are_refused(verifier, roster, keys):
    with pytest.raises(UnknownMemberError, match="is no member's"):
        verifier.verify(
            "POST", PATH, b"", sign_request(keys[1], "POST", PATH, b"", now=NOW), now=NOW
        )
    for change, words in ((roster.suspend, "is suspended"), (roster.expel, "was expelled")):
        change("lab")
        headers = sign_request(keys[0], "POST", PATH, b"", now=NOW)
        with pytest.raises(UnknownMemberError, match=words):
            verifier.verify("POST", PATH, b"", headers, now=NOW)


def test_a_stranger_can_not_make_it_remember(verifier, keys):
    for _ in range(50):
        headers = sign_request(keys[1], "POST", PATH, b"", now=NOW)
        with pytest.raises(UnknownMemberError):
            verifier.verify("POST", PATH, b"", headers, now=NOW)
        forged = {**headers, signing.KEY_HEADER: keys[0].fingerprint}
        with pytest.raises(SignatureError):
            verifier.verify("POST", PATH, b"", forged, now=NOW)
    assert not verifier._seen
    assert not verifier._order


def test_what_it_remembers_is_bounded(verifier, keys, monkeypatch):
    monkeypatch.setattr(signing, "_MOST_REQUESTS", 5)

    def ask(now):
        headers = sign_request(keys[0], "POST", PATH, b"", now=now)
        return verifier.verify("POST", PATH, b"", headers, now=now)

    for _ in range(5):
        ask(NOW)
    with pytest.raises(SignatureError, match="sent 5 requests within 240 s"):
        ask(NOW)
    ask(NOW + 241)
    assert len(verifier._order) == 1


_VALUES = st.one_of(
    st.text(max_size=120),
    st.sampled_from(["9" * 12, "-1", "nan", "inf", "1e9", "0", "sha256:" + "0" * 64, "0" * 32]),
)


@given(
    headers=st.dictionaries(st.sampled_from(sorted(signing._SHAPES)), _VALUES),
    body=st.binary(max_size=50),
    path=st.text(max_size=50),
)
def test_made_up_headers_are_refused(roster_of_one, keys, headers, body, path):
    verifier = RequestVerifier(roster_of_one.active)
    good = sign_request(keys[0], "POST", PATH, b"{}", now=NOW)
    with pytest.raises(PhotonError):
        verifier.verify("POST", path, body, headers, now=NOW)
    if (path, body) != (PATH, b"{}"):
        with pytest.raises(PhotonError):
            verifier.verify("POST", path, body, good | headers, now=NOW)
