"""The invitation file: what is in it, who may read it, and what is refused."""

import base64
import dataclasses
import hashlib
import os
import random
import stat
import subprocess
import tomllib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from photon.deploy.certificates import make_authority
from photon.errors import DiskFullError, InvitationError
from photon.membership.invitation import (
    Invitation,
    SharedTokenizer,
    certificate_fingerprint,
    read_invitation,
    write_invitation,
)

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def ca_pem(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("authority")).read_text()


@pytest.fixture(scope="module")
def invitation(ca_pem, keys):
    return Invitation(
        name="hospital-a",
        host="fed.example.org",
        port=8443,
        ca_pem=ca_pem,
        ca_fingerprint=certificate_fingerprint(ca_pem),
        aggregator_key=keys[0].public_pem,
        token="t" * 43,
        expires_at=NOW + 3600,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hospital-a.invitation.toml"


def test_what_is_written_is_read(invitation, path):
    before = os.umask(0)
    try:
        write_invitation(path, invitation)
    finally:
        os.umask(before)
    assert read_invitation(path) == invitation
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]
    text = path.read_text()
    assert f"photon join --invite {path.name}" in text
    assert "expires_at = 2027-01-15 09:00:00+00:00" in text


def test_the_fingerprint_is_the_one_that_openssl_says(ca_pem, tmp_path):
    (tmp_path / "ca.crt").write_text(ca_pem)
    said = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", tmp_path / "ca.crt"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    plain = said.strip().partition("=")[2].replace(":", "").lower()
    assert certificate_fingerprint("# a chain\n" + ca_pem + ca_pem) == f"sha256:{plain}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "words",
        "-----END CERTIFICATE----------BEGIN CERTIFICATE-----",
        "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----",
    ],
)
def test_other_texts_have_no_fingerprint(text):
    with pytest.raises(ValueError):  # noqa: PT011 - base64's words are its own
        certificate_fingerprint(text)


def test_addresses(invitation):
    assert invitation.address == "fed.example.org:8443"
    assert dataclasses.replace(invitation, host="fd00::1").address == "[fd00::1]:8443"


def test_it_knows_when_it_is_late(invitation):
    invitation.require_unexpired(NOW + 3599)
    with pytest.raises(InvitationError, match="for hospital-a expired at 2027-01-15 09:00 UTC"):
        invitation.require_unexpired(NOW + 3600)


def test_an_older_invitation_is_replaced_nothing_else_is(invitation, path):
    write_invitation(path, invitation)
    newer = dataclasses.replace(invitation, token="u" * 43)
    write_invitation(path, newer)
    assert read_invitation(path) == newer
    path.write_text("[run]\nname = 'mine'\n")
    with pytest.raises(InvitationError, match="is no invitation; it is not replaced"):
        write_invitation(path, invitation)
    assert "mine" in path.read_text()
    with pytest.raises(InvitationError, match="there is no folder"):
        write_invitation(path.parent / "nowhere" / "file", invitation)


def test_a_full_disk_leaves_nothing(invitation, path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no room to write"):
        write_invitation(path, invitation)
    assert os.listdir(path.parent) == []


def changed(path, invitation, old, new):
    write_invitation(path, invitation)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("photon_invitation = 2", "photon_invitation = 1", "photon_invitation is '1'"),
        ('name = "hospital-a"', 'name = "../a"', "name is '../a'"),
        ("port = 8443", "port = 0", "port is 0; it must be a port"),
        ("port = 8443", "port = true", "port is True"),
        ("port = 8443\n", "", "port is missing"),
        ('host = "fed.example.org"', 'host = "a b"', "host is 'a b'"),
        ("port = 8443", 'port = 8443\nkey_fingerprint = "x"', "key_fingerprint is 'x'"),
        ('host = "fed.example.org"', 'host = "a.example:1"', "host is 'a.example:1'"),
        ("2027-01-15 09:00:00+00:00", "2027-01-15 09:00:00", "a time with its zone"),
        ("2027-01-15 09:00:00+00:00", '"soon"', "a time with its zone"),
        ("t" * 43, "t t", "token is damaged"),
        ('ca_fingerprint = "sha256:', r'ca_fingerprint = "\u001b[31m', "it says  [31m"),
        ("BEGIN CERTIFICATE", "BEGIN WORDS", "a certificate in PEM"),
        ("BEGIN PUBLIC KEY", "BEGIN WORDS", "a public key in PEM"),
        ("[", "[", "is no invitation"),
    ],
)
def test_a_changed_file_is_refused(invitation, path, old, new, words):
    if old == "[":
        path.write_text("= [")
    else:
        changed(path, invitation, old, new)
    with pytest.raises(InvitationError) as caught:
        read_invitation(path)
    assert words in caught.value.message
    assert str(caught.value).replace("\n", "").isprintable()
    assert str(path) in caught.value.message
    assert "t t" not in str(caught.value)


def test_the_tokenizer_goes_with_it(invitation, path):
    json = b'{"model": "' + b"a token " * 50_000 + b'"}'
    shared = SharedTokenizer(hashlib.sha256(json).hexdigest(), "<|end of 'text'|>", json)
    write_invitation(path, dataclasses.replace(invitation, tokenizer=shared))
    assert read_invitation(path).tokenizer == shared
    assert path.stat().st_size < 5000  # compressed
    # At the end: what a person wants to see of the file comes first.
    assert path.read_text().index("zstd_base64") > path.read_text().index("ca_pem")


def test_a_large_tokenizer_is_named_only(invitation, path):
    json = random.Random(0).randbytes(5 << 20)  # as good as compressed
    shared = SharedTokenizer(hashlib.sha256(json).hexdigest(), "</s>", json)
    write_invitation(path, dataclasses.replace(invitation, tokenizer=shared))
    assert read_invitation(path).tokenizer == dataclasses.replace(shared, json=None)
    assert path.stat().st_size < 65_536


def test_another_tokenizer_than_it_names_is_refused(invitation, path):
    shared = SharedTokenizer(hashlib.sha256(b"{}").hexdigest(), "</s>", b"{ }")
    write_invitation(path, dataclasses.replace(invitation, tokenizer=shared))
    with pytest.raises(InvitationError, match="the tokenizer in it is not the one that it names"):
        read_invitation(path)


@pytest.mark.parametrize(
    "packed",
    [
        "!",
        "e30=",
        # A gigabyte in a few letters, which is never unpacked; and one that hides its size.
        lambda: base64.b64encode(zstandard.compress(bytes(1 << 30), 1)).decode(),
        base64.b64encode(
            zstandard.ZstdCompressor(write_content_size=False).compress(b"{}")
        ).decode(),
    ],
    ids=["no base64", "no zstd", "a bomb", "of unknown size"],
)
def test_a_damaged_tokenizer_is_refused(invitation, path, packed):
    packed = packed() if callable(packed) else packed
    shared = SharedTokenizer(hashlib.sha256(b"{}").hexdigest(), "</s>", b"{}")
    changed(
        *(path, dataclasses.replace(invitation, tokenizer=shared), f"'''\n{shared.packed}'''"),
        f"'''\n{packed}'''",
    )
    with pytest.raises(InvitationError, match=r"tokenizer is .* zstd in base64"):
        read_invitation(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('eos_token = "</s>"', "eos_token = 3", "eos_token is 3"),
        ('eos_token = "</s>"', 'eos_token = "\\u001b[2J"', "eos_token is"),
        ("sha256 = ", "sha = ", "sha256 is missing"),
        ("[tokenizer]", "tokenizer = 5", "tokenizer is 5"),
    ],
)
def test_a_changed_tokenizer_table_is_refused(invitation, path, old, new, words):
    shared = SharedTokenizer("a" * 64, "</s>", None)
    changed(path, dataclasses.replace(invitation, tokenizer=shared), old, new)
    with pytest.raises(InvitationError) as caught:
        read_invitation(path)
    assert words in caught.value.message
    assert "\x1b" not in caught.value.message


def test_another_certificate_is_refused(invitation, path, tmp_path):
    other = make_authority(tmp_path / "other").read_text()
    write_invitation(path, dataclasses.replace(invitation, ca_pem=other))
    with pytest.raises(InvitationError, match="has fingerprint sha256:") as caught:
        read_invitation(path)
    assert "do not use it" in str(caught.value)


def test_other_files_are_no_invitations(path, tmp_path):
    with pytest.raises(InvitationError, match="No such file"):
        read_invitation(path)
    with pytest.raises(InvitationError, match="Is a directory"):
        read_invitation(tmp_path)
    for data in (b"", b"\xff\xfe", b"x" * (7 << 20), b"a = " + b"[" * 20_000):
        path.write_bytes(data)
        with pytest.raises(InvitationError):
            read_invitation(path)


@given(data=st.data())
def test_a_damaged_file_is_refused_or_says_the_same(data, invitation, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    path.unlink(missing_ok=True)
    write_invitation(path, invitation)
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    path.write_bytes(raw[:cut])
    try:
        found = read_invitation(path)
    except InvitationError:
        return
    # A flipped bit in a name or a time is a valid file; never another authority.
    assert certificate_fingerprint(found.ca_pem) == invitation.ca_fingerprint
    tomllib.loads(path.read_text())
