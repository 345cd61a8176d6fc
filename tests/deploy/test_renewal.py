"""Certificates that end while the door serves: renewed in time, taken over, told of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config.serve import ServeConfig
from photon.deploy.certificates import (
    CertificateFiles,
    days_left,
    keep_certificate,
    keep_member_authority,
    make_authority,
    make_certificate,
    renewal_is_due,
    valid_until,
)
from photon.deploy.desk import Desk
from photon.deploy.front_door import READ_AGAIN, SERVICE, DoorSettings, front_door
from photon.deploy.ports import free_ports
from photon.deploy.renewal import DoorCertificate
from photon.errors import CertificateError, UnreachableError
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.roster import Facts, Roster
from photon.silo.desk_client import DeskClient
from photon.store.presign import S3Presigner

SECOND = 1 / 86_400  # in days


# --- when ---


def test_due_once_a_third_of_its_life_is_left(tmp_path) -> None:
    make_authority(tmp_path)
    files = make_certificate(tmp_path, ["a.org"], days=90)
    now = datetime.now(UTC)
    for days, due in ((0, False), (59, False), (61, True), (91, True)):
        assert renewal_is_due(files.certificate, at=now + timedelta(days=days)) is due
    short = make_certificate(tmp_path, ["a.org"], days=9 * SECOND)
    assert not renewal_is_due(short.certificate)
    assert renewal_is_due(short.certificate, at=datetime.now(UTC) + timedelta(seconds=7))


def test_a_start_renews_what_is_due(tmp_path) -> None:
    make_authority(tmp_path)
    files = make_certificate(tmp_path, ["a.org"], days=200)
    before = files.certificate.read_bytes()
    keep_certificate(tmp_path, "a.org")
    assert files.certificate.read_bytes() == before, "all of its life is left"
    make_certificate(tmp_path, ["a.org"], days=20)
    keep_certificate(tmp_path, "a.org")
    assert days_left(files.certificate) > 800


# --- what the operator hears ---


@dataclass
class Operator:
    """An operator's own certificate, and what he is told of it."""

    folder: Path
    told: list[str] = field(default_factory=list)
    reads: int = 0

    def make(self, days: float, host: str = "a.org") -> CertificateFiles:
        make_authority(self.folder / "own")
        return make_certificate(self.folder / "own", [host], days=days)

    def certificate(self, days: float) -> DoorCertificate:
        files = self.make(days)
        own: dict[str, Any] = {
            "certificate": str(files.certificate),
            "key": str(files.key),
            "ca": str(files.ca),
        }
        (self.folder / "home").mkdir()
        serve = ServeConfig(host="a.org", **own)
        return DoorCertificate(serve, self.folder / "home", tell=self.told.append, look_s=60.0)

    def read_again(self) -> None:
        self.reads += 1


@pytest.fixture
def operator(tmp_path) -> Operator:
    return Operator(tmp_path)


def test_an_end_that_comes_near_is_told_daily_and_shown(operator, monkeypatch) -> None:
    class Later(datetime):
        by = timedelta()

        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + cls.by

    for module in ("renewal", "certificates"):
        monkeypatch.setattr(f"photon.deploy.{module}.datetime", Later)
    door = operator.certificate(days=1 / 24)
    assert door.status()["warning"] is None
    at_s = time.monotonic()
    assert not door.look(operator.read_again, now_s=at_s + 61)
    assert operator.told == []
    Later.by = timedelta(minutes=50)  # less than a third is left
    for later_s in (122, 183, 7200):
        assert not door.look(operator.read_again, now_s=at_s + later_s)
    assert len(operator.told) == 1, operator.told
    assert "is valid for 0.0 more days" in operator.told[0]
    assert "put a new one, by the same authority" in operator.told[0]
    assert door.status()["warning"] == operator.told[0]
    assert door.status()["until"] == pytest.approx(time.time() + 3600, abs=60)
    door.look(operator.read_again, now_s=at_s + 7200 + 86_400)
    assert len(operator.told) == 2
    Later.by = timedelta(minutes=61)
    door.look(operator.read_again, now_s=at_s + 2 * 86_400 + 7300)
    assert "expired at" in operator.told[-1]
    assert "no silo comes in" in str(door.status()["warning"])
    assert operator.reads == 0


def test_a_new_one_is_taken_over_and_a_broken_one_is_not(operator) -> None:
    door = operator.certificate(days=50)
    served = door.files.certificate.read_bytes()
    files = operator.make(60)
    key = files.key.read_bytes()
    make_authority(operator.folder / "x")
    other = make_certificate(operator.folder / "x", ["x"])
    files.key.write_bytes(other.key.read_bytes())
    at_s = time.monotonic()
    assert not door.look(operator.read_again, now_s=at_s + 61)
    assert "is not the key of" in operator.told[-1]
    assert "could not be renewed" in str(door.status()["warning"])
    assert door.files.certificate.read_bytes() == served, "the door keeps what works"
    assert operator.reads == 0
    files.key.write_bytes(key)
    assert door.look(operator.read_again, now_s=at_s + 122)
    assert operator.reads == 1
    assert door.files.certificate.read_bytes() == files.certificate.read_bytes()
    assert door.files.key.read_bytes() == key
    assert door.files.key.stat().st_mode & 0o777 == 0o600
    assert operator.told[-1].startswith("the door has a new certificate, valid until")
    assert door.status()["warning"] is None
    assert not door.look(operator.read_again, now_s=at_s + 183)
    files.certificate.unlink()
    assert not door.look(operator.read_again, now_s=at_s + 244)
    assert "can't read" in operator.told[-1]


def test_one_that_can_not_be_used_is_refused_at_the_start(operator) -> None:
    files = operator.make(50, host="other.org")
    own: dict[str, Any] = {
        "certificate": str(files.certificate),
        "key": str(files.key),
        "ca": str(files.ca),
    }
    with pytest.raises(CertificateError, match=r"not for a\.org"):
        DoorCertificate(ServeConfig(host="a.org", **own), operator.folder, tell=print)


def test_a_renewal_that_fails_is_told_and_tried_again(operator) -> None:
    home = operator.folder / "home"
    door = DoorCertificate(
        *(ServeConfig(host="a.org"), home), tell=operator.told.append, days=3 * SECOND, look_s=0.0
    )
    key = (home / "ca.key").read_bytes()
    (home / "ca.key").unlink()
    time.sleep(2.2)
    assert not door.look(operator.read_again)
    assert not door.look(operator.read_again)
    assert len(operator.told) == 1
    assert "could not be renewed" in operator.told[0]
    assert "no ca.key" in str(door.status()["warning"])
    (home / "ca.key").write_bytes(key)
    door._days = 1.0  # of the new one, however slow this machine is
    assert door.look(operator.read_again)
    assert door.status()["warning"] is None


# --- a door that serves ---


@dataclass
class Serving:
    """A Caddy with a short-lived certificate, before a real desk and the real store."""

    home: Path
    port: int
    certificate: DoorCertificate
    read_again: Callable[[], bool]
    roster: Roster
    told: list[str]
    watched: Any

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.home / "ca.crt"))

    def served(self) -> bytes:
        """sha256 of the certificate that a new connection, which trusts the authority, sees."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            self.trust.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
        ):
            return hashlib.sha256(tls.getpeercert(binary_form=True) or b"").digest()

    def on_disk(self) -> bytes:
        der = ssl.PEM_cert_to_DER_cert(self.certificate.files.certificate.read_text())
        return hashlib.sha256(der).digest()

    def shows_what_is_on_disk(self) -> bool:
        # The old one may have expired; and the listener that goes resets whom it has no time for.
        with contextlib.suppress(ssl.SSLCertVerificationError, ConnectionResetError):
            return self.served() == self.on_disk()
        return False

    def renewed(self, within_s: float = 60.0) -> None:
        """Look, as serve does, until the door has another certificate and shows it."""
        before, end = self.on_disk(), time.monotonic() + within_s
        while not self.certificate.look(self.read_again):
            assert time.monotonic() < end, "it was never due"
            time.sleep(0.2)
        while not self.shows_what_is_on_disk():
            assert time.monotonic() < end, "the door does not read it"
            time.sleep(0.1)
        assert self.on_disk() != before


@pytest.fixture
def serving(short_folder, running_store, watch) -> Iterator[Callable[[float], Serving]]:
    with contextlib.ExitStack() as ends:

        def start(life_s: float) -> Serving:
            home, told = short_folder("renewed"), []
            (port,) = free_ports(1)
            config = ServeConfig(host="127.0.0.1", listen=f"127.0.0.1:{port}")
            certificate = DoorCertificate(
                config, home, tell=told.append, days=life_s * SECOND, look_s=0.0
            )
            roster = Roster(home / "members.sqlite")
            ends.callback(roster.close)
            presigner = running_store.store.presigner(f"https://127.0.0.1:{port}", "renewal")
            audience = certificate_fingerprint(certificate.files.ca.read_text())
            members = keep_member_authority(home)
            desk = Desk(roster, presigner, audience=audience, authority=members)
            desk.start()
            ends.callback(desk.stop)
            settings = DoorSettings(
                *("127.0.0.1", port, certificate.files.certificate, certificate.files.key),
                members_ca=members / "ca.crt",
                desk_port=desk.port,
                store_port=running_store.store.port,
            )
            watched = watch(home / "watched")
            supervisor = ends.enter_context(watched.supervisor)
            supervisor.start(front_door(settings, home / "door"))
            return Serving(
                *(home, port, certificate),
                lambda: supervisor.signal_one(SERVICE, READ_AGAIN),
                *(roster, told, watched),
            )

        yield start


def member(found: Serving, folder: Path) -> DeskClient:
    key = NodeKey.create(folder / "node.key")
    client = DeskClient(f"127.0.0.1:{found.port}", found.home / "ca.crt", key)
    token = found.roster.invite("lab", 60)
    client.join(token, "lab", key.public_pem, Facts("a" * 64, "b" * 64, 1, "0.1.0"))
    return client


@pytest.mark.slow
def test_a_client_sees_the_new_certificate_and_a_transfer_goes_on(
    serving, running_store, tmp_path
) -> None:
    found = serving(30.0)
    trust = member(found, tmp_path).trust()
    first, authority = found.served(), certificate_fingerprint((found.home / "ca.crt").read_text())
    pid = found.watched.status(SERVICE).pid
    presigner = running_store.store.presigner(f"https://127.0.0.1:{found.port}", "renewal")
    data = secrets.token_bytes(400_000)
    sha256 = hashlib.sha256(data).hexdigest()
    grant = presigner.grant("PUT", "slow", 600, len(data), sha256)
    began, renewed = threading.Event(), threading.Event()

    def body() -> Iterator[bytes]:
        for number in range(40):
            yield data[number * 10_000 : (number + 1) * 10_000]
            if number == 2:
                began.set()
            # A slow line: half of it goes out when the other certificate is long in use.
            if number == 20:
                assert renewed.wait(120)
                time.sleep(6.0)  # longer than Caddy's grace period for what is under way
            time.sleep(0.05)

    answers: list[int] = []

    def transfer() -> None:
        headers = {**grant.headers, "content-length": str(len(data))}
        with httpx2.Client(verify=trust, trust_env=False, timeout=60) as client:
            answers.append(client.put(grant.url, headers=headers, content=body()).status_code)

    thread = threading.Thread(target=transfer)
    thread.start()
    try:
        assert began.wait(60)
        found.renewed()
    finally:
        renewed.set()
        thread.join(120)
    assert answers == [200]
    store = running_store.store.open("renewal")
    assert hashlib.sha256(store.get("slow", max_bytes=len(data))).hexdigest() == sha256
    assert found.served() != first
    assert certificate_fingerprint((found.home / "ca.crt").read_text()) == authority
    assert found.watched.status(SERVICE).pid == pid, "the same Caddy"
    assert found.watched.kinds(SERVICE) == ["started", "ready"]
    assert found.told[0].startswith("the door has a new certificate, valid until")


@pytest.mark.slow
def test_a_member_goes_on_past_the_end_of_the_certificate_it_joined_with(serving, tmp_path) -> None:
    found = serving(24.0)
    joined_with = valid_until(found.certificate.files.certificate)
    key = NodeKey.create(tmp_path / "node.key")
    shutil.copy(found.home / "ca.crt", tmp_path / "ca.crt")
    client = DeskClient(f"127.0.0.1:{found.port}", tmp_path / "ca.crt", key)
    token = found.roster.invite("lab", 60)
    client.join(token, "lab", key.public_pem, Facts("a" * 64, "b" * 64, 1, "0.1.0"))
    asked, again = 0, 0
    while datetime.now(UTC) < joined_with + timedelta(seconds=2):
        found.certificate.look(found.read_again)
        # And who comes anew, with what it got when it joined.
        fresh = DeskClient(f"127.0.0.1:{found.port}", tmp_path / "ca.crt", key)
        for one in (client, fresh):
            try:
                assert one.standing().member_status == "active"
            except UnreachableError:
                # A connection that nobody used just then is closed: asked again, as every caller
                # does.
                again += 1
                assert one.standing().member_status == "active"
        fresh.close()
        asked += 1
        time.sleep(0.3)
    client.close()
    assert asked > 3
    assert found.told, "it was renewed"
    assert again <= 2 * len(found.told)
    assert valid_until(found.certificate.files.certificate) > joined_with


@pytest.mark.slow
def test_without_renewal_clients_are_refused(serving) -> None:
    """The fault that renewal is there for does fire."""
    found = serving(3.0)
    time.sleep(4.0)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        found.served()
    found.certificate._days = 1.0  # however slow this machine is
    found.renewed()


def test_a_service_that_is_not_up_is_not_signalled(watched, short_folder) -> None:
    from photon.deploy.service import Service

    watched.supervisor.start(Service("sleeper", ("sleep", "60")))
    watched.supervisor._keeper("sleeper").stop()
    assert watched.supervisor.signal_one("sleeper", READ_AGAIN) is False


# --- photon status ---


def test_status_shows_a_warning(short_folder, operator) -> None:
    home = short_folder("status")
    door = operator.certificate(days=1.0)
    door._until = datetime.now(UTC) - timedelta(seconds=1)
    with Roster(home / "members.sqlite") as roster:
        progress = {"name": "med", "rounds": 3, "certificate": door.status()}
        keys = {"access_key_id": "a", "secret": "b"}
        presigner = S3Presigner("https://a.org", "photon", region="here", **keys)
        desk = Desk(
            roster,
            presigner,
            about=lambda: {"run": progress},
        )
        desk.start(operator_socket=home / "operator.sock")
        try:
            shown = CliRunner().invoke(app, ["status", str(home)])
            said = CliRunner().invoke(app, ["status", str(home), "--json"])
        finally:
            desk.stop()
    assert shown.exit_code == 0, shown.output
    assert "warning: the door's certificate expired at" in shown.output.replace("\n", " ")
    assert json.loads(said.stdout)["run"]["certificate"]["warning"].startswith("the door's")
