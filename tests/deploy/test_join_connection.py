"""`photon join --check`, between here and there: door, certificates, clocks, the store."""

from __future__ import annotations

import shutil
import time
import types
from dataclasses import replace

import pytest
from checked_site import LINES, Site, failed, name_of, well
from tls_door import Authority, door

from photon.deploy import desk as desk_module
from photon.deploy import join_checks
from photon.deploy.certificates import keep_certificate
from photon.deploy.checks import Check
from photon.deploy.desk import Desk
from photon.deploy.embedded_store import BUCKET
from photon.deploy.front_door import front_door
from photon.deploy.ports import free_ports
from photon.errors import (
    CertificateError,
    ClockSkewError,
    InvitationError,
    PhotonError,
    ProtocolError,
    StoreUnavailableError,
    UnknownMemberError,
    UnreachableError,
)
from photon.membership.invitation import certificate_fingerprint
from photon.silo.desk_client import DeskClient
from photon.store.presign import S3Presigner

# --- the aggregator ---


def test_an_authority_that_is_another(member, aggregator, short_folder) -> None:
    other = keep_certificate(short_folder("liar"), "127.0.0.1")
    shutil.copy(other.ca, member.home / "ca.crt")
    found = member.look()
    assert failed(
        found["authority"], CertificateError, certificate_fingerprint(other.ca.read_text())
    )
    assert found["door"].verdict == "skip"
    # Fingerprint and certificate agree, but the door was signed by somebody else.
    pem = other.ca.read_text()
    file = aggregator.invite("deceived", ca_pem=pem, ca_fingerprint=certificate_fingerprint(pem))
    site = Site(member.home.parent, member.data)
    site.home = member.home.parent / "deceived"
    found = site.look(invitation=file)
    assert found["authority"].verdict == "ok"
    assert failed(found["door"], CertificateError, "not of the authority that the invitation names")
    assert found["version"].verdict == found["clock"].verdict == "skip"


def test_a_proxy_that_opens_tls_is_named(member, aggregator, tmp_path, monkeypatch) -> None:
    """It dials the real aggregator, and shows a certificate for its name by its own authority."""
    middle, address = Authority.made(tmp_path, "Hospital Web Gateway"), "fed.example:8443"
    monkeypatch.setenv("NO_PROXY", "")
    with door(middle.server("fed.example"), aggregator.settings.port, connect=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:hush@{proxy}")
        found = member.look(address=address)
    assert found["address"].found == f"{address}, through the proxy HTTPS_PROXY=http://{proxy}"
    named = f"the proxy HTTPS_PROXY=http://{proxy} opens TLS"
    assert failed(found["door"], CertificateError, named)
    assert "issued by CN=Hospital Web Gateway" in found["door"].found
    assert "hush" not in str(found)
    # One that passes TLS on is fine but for this door's name.
    with door(None, aggregator.settings.port, connect=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        found = member.look(address=address)
    assert failed(found["door"], CertificateError, "its certificate is another host's")


def test_an_invitation_that_was_changed_on_its_way(site, aggregator, short_folder) -> None:
    other = keep_certificate(short_folder("liar"), "127.0.0.1")
    file = aggregator.invite("changed", ca_pem=other.ca.read_text())
    found = site.look(invitation=file)
    assert failed(found["invitation"], InvitationError, "has fingerprint")


def test_a_gateway_need_not_have_the_trainers_devices(member) -> None:
    member.say('[compute]\ndevice = "mps"')
    assert member.look()["compute"].verdict == "fail"
    found = member.look(gateway=True)
    assert "compute" not in found
    assert well(found)


def test_addresses(member) -> None:
    port = free_ports(1)[0]
    found = member.look(address=f"127.0.0.1:{port}")
    assert failed(found["address"], UnreachableError, f"port {port} does not answer")
    assert {found[name].verdict for name in LINES[9:]} == {"skip"}
    unknown = member.look(address="no-such-host.invalid:8443")["address"]
    assert failed(unknown, UnreachableError, "no-such-host.invalid has no address")


def test_a_certificate_that_ends_soon(member, monkeypatch) -> None:
    monkeypatch.setattr(join_checks, "_CERTIFICATE_DAYS", 10_000)
    assert member.look()["door"].verdict == "warn"
    assert "the aggregator's operator renews it" in member.look()["door"].hint.lower()


def test_another_version(member, monkeypatch) -> None:
    monkeypatch.setattr(desk_module, "photon_version", lambda: "9.9.0")
    found = member.look()
    assert failed(found["version"], ProtocolError, "the aggregator runs Photon 9.9.0")
    assert well(found, "version")


CLOCKS = [(40.0, "warn"), (3600.0, "fail"), (-3600.0, "fail")]


@pytest.mark.parametrize(("ahead_s", "verdict"), CLOCKS)
def test_clocks(member, monkeypatch, ahead_s, verdict) -> None:
    there = types.SimpleNamespace(time=lambda: time.time() + ahead_s, monotonic=time.monotonic)
    monkeypatch.setattr(desk_module, "time", there)
    found = member.look()
    assert found["clock"].verdict == verdict
    assert "this clock says" in found["clock"].found
    if verdict == "fail":
        assert found["clock"].exit_code == ClockSkewError.exit_code
        assert found["member"].exit_code == ClockSkewError.exit_code, "nor is a signature taken"


def test_a_desk_that_says_no_time(member, monkeypatch) -> None:
    health = DeskClient.health

    def older(self):
        return {name: value for name, value in health(self).items() if name != "server_time"}

    monkeypatch.setattr(DeskClient, "health", older)
    found = member.look()
    assert found["clock"].verdict == "skip"
    assert well(found)


def test_standing(member, aggregator, request) -> None:
    name = name_of(request)
    aggregator.roster.suspend(name)
    found = member.look()
    assert failed(found["member"], UnknownMemberError, "suspended")
    assert found["store"].verdict == "skip"
    aggregator.roster.reinstate(name)
    assert member.look()["member"].verdict == "ok"


# --- the store ---


@pytest.fixture
def another_door(aggregator, short_folder, watch):
    """A second door and desk of the same aggregator, with another store behind them."""
    closing = []

    def open_(
        store_port: int, presigner: S3Presigner | None = None, port: int | None = None
    ) -> str:
        folder = short_folder("another")
        port = port or free_ports(1)[0]
        desk = Desk(
            aggregator.roster,
            presigner or aggregator.presigner,
            audience=certificate_fingerprint(aggregator.files.ca.read_text()),
            authority=aggregator.settings.members_ca.parent,
        )
        desk.start()
        settings = replace(
            aggregator.settings, port=port, desk_port=desk.port, store_port=store_port
        )
        watched = watch(folder / "watched")
        watched.supervisor.__enter__()
        closing.extend([watched.supervisor.close, desk.stop])
        watched.supervisor.start(front_door(settings, folder / "door"))
        return f"127.0.0.1:{port}"

    yield open_
    for close in closing:
        close()


def test_a_store_that_is_down(member, another_door, running_store) -> None:
    port, dead = free_ports(2)
    presigner = running_store.store.presigner(f"https://127.0.0.1:{port}")
    found = member.look(address=another_door(dead, presigner, port))
    assert failed_store(found, StoreUnavailableError, "502")
    assert well(found, "store")


def test_a_store_that_refuses(member, another_door, running_store) -> None:
    port = free_ports(1)[0]
    store = running_store.store
    wrong = S3Presigner(
        f"https://127.0.0.1:{port}",
        BUCKET,
        region="us-east-1",
        access_key_id=store.access_key_id,
        secret="0" * 40,
    )
    found = member.look(address=another_door(store.port, wrong, port))
    assert found["store"].verdict == "fail"
    assert found["store"].exit_code == 76
    assert "403" in found["store"].found
    assert "X-Amz" not in str(found), "nothing of a signature is shown"


def test_leave_that_names_another_host_is_not_used(member, another_door, running_store) -> None:
    elsewhere = running_store.store.presigner("https://192.0.2.1:8443")
    found = member.look(address=another_door(running_store.store.port, elsewhere, free_ports(1)[0]))
    assert found["store"].exit_code == 76
    assert "192.0.2.1" in found["store"].found


def failed_store(found: dict[str, Check], error: type[PhotonError], *words: str) -> bool:
    check = found["store"]
    assert check.verdict == "fail", check
    assert check.exit_code == error.exit_code
    return all(each in check.found for each in words)
