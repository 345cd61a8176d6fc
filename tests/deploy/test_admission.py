"""Members' certificates: from the desk, through a real door, to the desk and the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from photon.config.addresses import joined
from photon.deploy.certificates import (
    MEMBER_DAYS,
    days_left,
    keep_certificate,
    keep_member_authority,
    make_authority,
    member_certificate,
)
from photon.deploy.desk import Desk
from photon.deploy.front_door import DoorSettings, front_door
from photon.deploy.ports import free_ports
from photon.errors import (
    AccessRefusedError,
    CertificateError,
    SignatureError,
    UnknownMemberError,
    UnreachableError,
)
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask
from photon.membership.roster import Facts, Presence, Roster
from photon.silo import door_client
from photon.silo.desk_client import DeskClient
from photon.store.granted_store import GrantedStore

pytestmark = pytest.mark.slow

FACTS = Facts("a" * 64, "b" * 64, 1000, "0.1.0")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "flood.py"


class Place:
    """An aggregator, as `photon serve` puts it together, and members."""

    def __init__(self, folder: Path, running_store, watched, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.host = host
        self.files = keep_certificate(folder, host)
        self.roster = Roster(folder / "members.sqlite")
        (self.port,) = free_ports(1)
        self.address = joined(host, self.port)
        self.presigner = running_store.store.presigner(f"https://{self.address}", "admission")
        self.authority = keep_member_authority(folder)
        self.desk = Desk(
            self.roster,
            self.presigner,
            audience=certificate_fingerprint(self.files.ca.read_text()),
            authority=self.authority,
        )
        self.desk.start()
        self.settings = DoorSettings(
            *(host, self.port, self.files.certificate, self.files.key),
            members_ca=self.authority / "ca.crt",
            desk_port=self.desk.port,
            store_port=running_store.store.port,
        )
        self.watched = watched
        watched.supervisor.start(front_door(self.settings, folder / "door"))

    def member(self, name: str) -> DeskClient:
        key = NodeKey.create(self.folder / f"{name}.key")
        client = DeskClient(self.address, self.files.ca, key)
        client.join(self.roster.invite(name, 600), name, key.public_pem, FACTS)
        return client

    def task(self, name: str) -> OpenTask:
        now, own = time.time(), f"run/silos/{name}/"
        task = OpenTask(
            *(f"run/fit/1/{name}", "run", 1, name, "fit", now, now + 600, 1 << 20),
            readable=(own,),
            writable=(f"{own}{{sha256}}",),
        )
        self.roster.tasks.open(task)
        return task

    def store(self, client: DeskClient, task: OpenTask, silence_s: float = 20.0) -> GrantedStore:
        return GrantedStore(
            client.grants(task.id),
            f"https://{self.address}",
            allowed=[self.host],
            trust=client.trust,
            silence_s=silence_s,
        )


@pytest.fixture
def host() -> str:
    return "127.0.0.1"


@pytest.fixture
def place(short_folder, running_store, watch, host) -> Iterator[Place]:
    folder = short_folder("admission")
    watched = watch(folder / "watched")
    with watched.supervisor:
        found = Place(folder, running_store, watched, host)
        try:
            yield found
        finally:
            found.desk.stop()
            found.roster.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_member_gets_a_certificate_by_itself_and_shows_it_everywhere(place: Place) -> None:
    """Nothing of it is in the node's home: one of an older Photon needs nothing new."""
    blue = place.member("blue")
    assert blue.standing().member_status == "active"
    data = b"x" * 1000
    task, key = place.task("blue"), f"run/silos/blue/{hashlib.sha256(data).hexdigest()}"
    with contextlib.closing(place.store(blue, task)) as store:
        store.put(key, data)
        assert store.get(key, max_bytes=1000) == data
    blue.close()


def test_an_expelled_member_is_refused_at_its_next_request_grants_included(place: Place) -> None:
    blue, data = place.member("blue"), b"y" * 1000
    task, key = place.task("blue"), f"run/silos/blue/{hashlib.sha256(data).hexdigest()}"
    leave = blue.grants(task.id)
    granted = leave("PUT", key, 1000, hashlib.sha256(data).hexdigest())
    trust = blue.trust()
    with httpx2.Client(verify=trust, trust_env=False) as client:
        # On a connection that is open already.
        assert client.head(place.presigner.grant("HEAD", "none", 60).url).status_code == 404
        place.roster.expel("blue")
        answer = client.put(granted.url, content=data, headers=dict(granted.headers))
        assert answer.status_code == 403
        assert "expelled" in answer.json()["error"]["message"]
    with pytest.raises(AccessRefusedError, match="expelled"):
        leave("GET", key, None, None)
    for ask in (blue.standing, lambda: blue.presence(Presence("idle"))):
        with pytest.raises(UnknownMemberError, match="expelled"):
            ask()
    # Nor does it get another certificate, or in without one.
    again = DeskClient(place.address, place.files.ca, NodeKey.load(place.folder / "blue.key"))
    with pytest.raises(UnknownMemberError, match="expelled"):
        again.standing()


def test_a_suspended_member_comes_back_with_the_certificate_it_has(place: Place) -> None:
    blue = place.member("blue")
    blue.standing()
    place.roster.suspend("blue")
    with pytest.raises(UnknownMemberError, match="suspended"):
        blue.standing()
    place.roster.reinstate("blue")
    assert blue.standing().member_status == "active"


def test_another_members_certificate_with_ones_own_signature(place: Place, monkeypatch) -> None:
    blue, green = place.member("blue"), place.member("green")
    theirs = green._member
    assert theirs is not None
    certified = theirs.client(green._given_certificate)
    assert blue._member is not None
    monkeypatch.setattr(blue._member, "client", lambda _: certified)
    with pytest.raises(SignatureError, match="another key than its certificate"):
        blue.standing()
    assert green.standing().name == "green"


def test_strangers_and_the_uninvited_get_none(place: Place) -> None:
    thief = NodeKey.create(place.folder / "thief.key")
    client = DeskClient(place.address, place.files.ca, thief)
    with pytest.raises(UnknownMemberError, match="is no member's"):
        client.standing()
    place.member("blue")
    with httpx2.Client(verify=client._member is None, trust_env=False) as plain:
        # On the desk's own port, for users of this machine: signed all the same.
        url = f"http://127.0.0.1:{place.desk.port}"
        assert plain.post(f"{url}/photon/v2/join", content=b"{}").status_code == 401
        assert plain.get(f"{url}/door/member").status_code == 403
        assert "certificate" not in plain.get(f"{url}/door/member").json()


def test_renewed_in_time_and_what_is_under_way_goes_on(place: Place, monkeypatch) -> None:
    blue = place.member("blue")
    first = blue.trust()
    assert blue.trust() is first
    now = time.monotonic()
    days = SimpleNamespace(monotonic=lambda: now + 86_400 * passed)
    monkeypatch.setattr(door_client, "time", days)
    passed = MEMBER_DAYS / 2
    assert blue.trust() is first
    passed = MEMBER_DAYS * 3 / 4
    second = blue.trust()
    assert second is not first
    # The desk is away just when it is due, and then for longer than the certificate lives.
    place.desk.stop()
    passed += MEMBER_DAYS * 3 / 4
    assert blue.trust() is second
    with pytest.raises(UnreachableError):
        blue.standing()
    passed += MEMBER_DAYS
    with pytest.raises(UnreachableError):
        blue.trust()


def test_an_authority_that_is_lost_is_made_anew_and_nodes_find_their_way(place: Place) -> None:
    blue, task = place.member("blue"), place.task("blue")
    blue.standing()
    store = place.store(blue, task, silence_s=5.0)
    (place.authority / "ca.key").unlink()
    assert keep_member_authority(place.folder) == place.authority
    place.watched.supervisor._keeper("door").stop()
    again = front_door(place.settings, place.folder / "door")
    place.watched.supervisor.start(again)
    until = time.monotonic() + 60
    while True:
        try:
            assert blue.standing().member_status == "active"
            break
        except UnreachableError:
            assert time.monotonic() < until
    assert store.size("run/silos/blue/none") is None
    store.close()


def test_a_proxy_that_ends_tls_is_named(place: Place, short_folder) -> None:
    """A balancer with the door's certificate, that speaks to the door on the nodes' behalf."""
    program = short_folder("balancer") / "Caddyfile"
    (port,) = free_ports(1)
    program.write_text(
        f"{{\n admin off\n auto_https off\n persist_config off\n}}\nhttps://:{port} {{\n"
        f" bind 127.0.0.1\n tls {place.files.certificate} {place.files.key}\n"
        f" reverse_proxy https://{place.address} {{\n"
        f"  transport http {{\n   tls_trust_pool file {place.files.ca}\n  }}\n }}\n}}\n"
    )
    service = front_door(place.settings, place.folder / "other")
    command = [service.command[0], "run", "--adapter", "caddyfile", "--config", str(program)]
    balancer = subprocess.Popen(
        command, env=service.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        key = NodeKey.create(place.folder / "blue.key")
        client = DeskClient(f"127.0.0.1:{port}", place.files.ca, key)
        token, until = place.roster.invite("blue", 60), time.monotonic() + 30
        while True:
            with contextlib.suppress(UnreachableError):
                client.join(token, "blue", key.public_pem, FACTS)
                break
            assert time.monotonic() < until
        with pytest.raises(CertificateError, match="no certificate of a member's") as caught:
            client.standing()
        assert "load balancer" in (caught.value.hint or "")
        assert "pass the connection through" in (caught.value.hint or "")
    finally:
        balancer.kill()
        balancer.wait()


def test_a_flood_of_strangers_costs_little_and_keeps_nobody_out() -> None:
    """The full one: benchmarks/flood.py, 200 connections for a minute."""
    command = [sys.executable, str(BENCHMARK), "--connections", "50", "--seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sent = found["sent"]
    # How much was sent, and how long a member waited, is this machine's to say: see the benchmark.
    refused = {kind for kind in sent if kind.endswith((" 401", " 403", " 431"))}
    assert {kind.rpartition(" ")[2] for kind in refused} >= {"401", "403"}, sent
    assert sum(sent.values()) > 20, sent
    assert not [kind for kind in sent if kind.endswith(" 200") and "health" not in kind]
    assert found["door_grew_bytes"] <= 50 << 20
    assert found["desk_grew_bytes"] <= 50 << 20
    assert found["member_s"]["asked"] > 0


# --- the authority ---


def test_an_authority_near_its_end_is_made_anew(tmp_path, monkeypatch) -> None:
    folder = keep_member_authority(tmp_path)
    first = (folder / "ca.crt").read_bytes()
    keep_member_authority(tmp_path)
    assert (folder / "ca.crt").read_bytes() == first
    (folder / "ca.crt").unlink()
    (folder / "ca.key").unlink()
    monkeypatch.setattr("photon.deploy.certificates._AUTHORITY_DAYS", 2 * MEMBER_DAYS - 1)
    make_authority(folder)
    monkeypatch.undo()
    keep_member_authority(tmp_path)
    assert days_left(folder / "ca.crt") > 1000
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    key = NodeKey.create(tmp_path / "node.key")
    _, until = member_certificate(folder, key.public_pem, key.fingerprint)
    left = until - datetime.now(UTC)
    assert timedelta(days=MEMBER_DAYS) - left < timedelta(minutes=5)


def test_a_desk_without_a_door_gives_none(tmp_path) -> None:
    roster = Roster(tmp_path / "members.sqlite")
    key = NodeKey.create(tmp_path / "node.key")
    desk = Desk(roster, None)  # type: ignore[arg-type]
    desk.start()
    try:
        client = DeskClient(f"http://127.0.0.1:{desk.port}", None, key)
        client.join(roster.invite("blue", 60), "blue", key.public_pem, FACTS)
        client.presence(Presence("idle"))
        assert client._member is None
    finally:
        desk.stop()
        roster.close()
