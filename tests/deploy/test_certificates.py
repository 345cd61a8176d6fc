"""Certificates that hold in a real handshake, and words for each way in which one does not."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from photon.deploy.certificates import (
    MOST_DAYS,
    check_certificate,
    days_left,
    keep_certificate,
    make_authority,
    make_certificate,
    require_certificate,
    server_files,
)
from photon.errors import CertificateError
from photon.membership.invitation import certificate_fingerprint


@pytest.fixture
def made(tmp_path):
    """An authority and a certificate for fed.example.org and two addresses."""
    make_authority(tmp_path)
    return make_certificate(tmp_path, ["fed.example.org", "10.1.2.3", "2001:db8::7"])


def problems(files, host="fed.example.org", **more) -> str:
    return "; ".join(check_certificate(files, host, **more))


def handshake(files, host: str) -> None:
    """A real one, over a socket; raises what the client met."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(files.certificate, files.key)
    asking = ssl.create_default_context(cafile=str(files.ca))
    # As Python 3.13 does by itself: every extension as RFC 5280 wants it.
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with serving.wrap_socket(theirs, server_side=True) as tls:
                tls.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with asking.wrap_socket(ours, server_hostname=host) as tls:
            tls.sendall(b"x")
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize(
    "host",
    ["fed.example.org", "FED.example.org", "10.1.2.3", "2001:db8::7", "localhost", "127.0.0.1"],
)
def test_a_certificate_holds_for_its_hosts_and_for_this_machine(made, host) -> None:
    assert problems(made, host) == ""
    handshake(made, host)


@pytest.mark.parametrize("host", ["example.org", "other.example.org", "10.1.2.4", "evil"])
def test_another_host(made, host) -> None:
    assert (
        f"is for fed.example.org, localhost, 10.1.2.3, 2001:db8::7, 127.0.0.1, ::1, not for {host}"
        in (problems(made, host))
    )
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, host)


def test_private_keys_are_private(made, tmp_path) -> None:
    assert made.key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    made.key.chmod(0o644)
    assert "may be read by others" in problems(made)


def test_expired_and_not_yet_valid(made) -> None:
    later = datetime.now(UTC) + timedelta(days=MOST_DAYS + 1)
    assert f"{made.certificate} expired at" in problems(made, at=later)
    earlier = datetime.now(UTC) - timedelta(days=2)
    found = problems(made, at=earlier)
    assert f"{made.certificate} is not valid before" in found
    assert "this clock says" in found
    assert "the authority in" in found
    much_later = datetime.now(UTC) + timedelta(days=4000)
    assert f"the authority in {made.ca} expired" in problems(made, at=much_later)


def test_the_key_of_another_certificate(made, tmp_path) -> None:
    make_authority(tmp_path / "other")
    other = make_certificate(tmp_path / "other", ["fed.example.org"])
    mixed = replace(made, key=other.key)
    assert f"{other.key} is not the key of {made.certificate}" in problems(mixed)


def test_another_authority_with_the_same_name(made, tmp_path) -> None:
    make_authority(tmp_path / "other")
    mixed = replace(made, ca=tmp_path / "other" / "ca.crt")
    assert f"was not signed by the authority in {mixed.ca}" in problems(mixed)
    with pytest.raises(CertificateError, match="was not signed by") as caught:
        require_certificate(mixed, "fed.example.org")
    assert "serve.host" in (caught.value.hint or "")
    require_certificate(made, "fed.example.org")


def test_files_that_are_none(made, tmp_path) -> None:
    (tmp_path / "text").write_text("hello")
    assert "holds no certificate in PEM" in problems(replace(made, certificate=tmp_path / "text"))
    assert "is no private key in PEM" in problems(replace(made, key=tmp_path / "text"))
    assert "can't read" in problems(replace(made, ca=tmp_path / "none"))


def openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def test_a_chain_made_by_openssl(tmp_path) -> None:
    """Certificates of the user's own: root, intermediate, leaf with a wildcard name, RSA."""
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30")
    ca = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl(*new, "-keyout", "r.key", "-out", "r.crt", "-subj", "/CN=root", *ca, folder=tmp_path)
    signed = ("-CA", "r.crt", "-CAkey", "r.key")
    between = ("-addext", "basicConstraints=critical,CA:true")
    openssl(
        *new, "-keyout", "i.key", "-out", "i.crt", "-subj", "/CN=mid", *between, *ca, *signed,
        folder=tmp_path,
    )  # fmt: skip
    openssl(
        *new, "-keyout", "s.key", "-out", "s.crt", "-subj", "/CN=x",
        "-addext", "subjectAltName=DNS:*.example.org", "-addext", "basicConstraints=CA:false",
        "-CA", "i.crt", "-CAkey", "i.key", folder=tmp_path,
    )  # fmt: skip
    leaf, middle = (tmp_path / "s.crt").read_text(), (tmp_path / "i.crt").read_text()
    (tmp_path / "chain.crt").write_text(leaf + middle)
    (tmp_path / "s.key").chmod(0o600)
    files = replace(
        server_files(tmp_path),
        certificate=tmp_path / "chain.crt",
        key=tmp_path / "s.key",
        ca=tmp_path / "r.crt",
    )
    assert problems(files, "fed.example.org") == ""
    handshake(files, "fed.example.org")
    assert "not for a.b.example.org" in problems(files, "a.b.example.org")
    # Without what stands between, nobody can tell who signed it.
    assert "was not signed by" in problems(replace(files, certificate=tmp_path / "s.crt"))


def test_what_only_openssl_knows_is_found_in_a_handshake(tmp_path) -> None:
    """A certificate for clients: dates, host, key and signature are all right."""
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=x")
    openssl(
        *new, "-keyout", "s.key", "-out", "s.crt", "-addext", "subjectAltName=DNS:a.org",
        "-addext", "extendedKeyUsage=clientAuth", folder=tmp_path,
    )  # fmt: skip
    (tmp_path / "s.key").chmod(0o600)
    files = replace(server_files(tmp_path), certificate=tmp_path / "s.crt", key=tmp_path / "s.key")
    files = replace(files, ca=files.certificate)
    assert "purpose" in problems(files, "a.org")


# --- keeping it -----------------------------------------------------------------------------------


def test_keeping_makes_what_is_missing_and_leaves_what_is_good(tmp_path) -> None:
    files = keep_certificate(tmp_path / "home", "fed.example.org")
    assert problems(files) == ""
    before = {path: path.read_bytes() for path in (tmp_path / "home").iterdir()}
    keep_certificate(tmp_path / "home", "fed.example.org")
    assert before == {path: path.read_bytes() for path in (tmp_path / "home").iterdir()}
    # Another name: another certificate, by the same authority.
    keep_certificate(tmp_path / "home", "new.example.org")
    assert problems(files, "new.example.org") == ""
    assert files.ca.read_bytes() == before[files.ca]
    assert files.certificate.read_bytes() != before[files.certificate]


@pytest.mark.parametrize("damage", ["short-lived", "cut", "other key", "gone"])
def test_keeping_replaces_what_will_not_do(tmp_path, damage) -> None:
    make_authority(tmp_path)
    files = make_certificate(tmp_path, ["fed.example.org"], days=20)
    if damage == "cut":
        files.certificate.write_bytes(files.certificate.read_bytes()[:200])
    elif damage == "other key":
        make_authority(tmp_path / "other")
        other = make_certificate(tmp_path / "other", ["x"])
        files.key.write_bytes(other.key.read_bytes())
    elif damage == "gone":
        files.key.unlink()
    keep_certificate(tmp_path, "fed.example.org")
    assert problems(files) == ""
    assert days_left(files.certificate) == pytest.approx(MOST_DAYS, abs=0.01)


def test_an_authority_is_never_replaced(tmp_path) -> None:
    first = make_authority(tmp_path).read_bytes()
    assert make_authority(tmp_path).read_bytes() == first
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.key").unlink()
    with pytest.raises(CertificateError, match=r"has ca\.crt but no ca\.key") as caught:
        keep_certificate(tmp_path, "fed.example.org")
    assert "new invitation" in (caught.value.hint or "")
    (tmp_path / "ca.key").write_bytes(key)
    make_authority(tmp_path / "other")
    (tmp_path / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match="is not the key of"):
        make_authority(tmp_path)
    assert (tmp_path / "ca.crt").read_bytes() == first


@pytest.mark.parametrize("host", ["", "a b", "a/b", "x" * 70 + ".org", "fed_\n.org"])
def test_hosts_that_are_none(tmp_path, host) -> None:
    make_authority(tmp_path)
    with pytest.raises(CertificateError, match="neither the name of a host nor an address"):
        make_certificate(tmp_path, [host])


def test_days_out_of_bounds(tmp_path) -> None:
    make_authority(tmp_path)
    for days in (0, MOST_DAYS + 1):
        with pytest.raises(CertificateError, match=f"not {days}"):
            make_certificate(tmp_path, ["a.org"], days=days)


def test_the_fingerprint_is_what_openssl_says(made) -> None:
    said = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", str(made.ca)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    expected = said.strip().partition("=")[2].replace(":", "").lower()
    assert certificate_fingerprint(made.ca.read_text()) == f"sha256:{expected}"
    with pytest.raises(ValueError, match="PEM"):
        certificate_fingerprint("hello")
