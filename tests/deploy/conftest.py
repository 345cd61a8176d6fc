"""Homes with short paths, certificates, a running store and a running door."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import signal
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from checked_site import Aggregator, Site, name_of
from desk_place import Place

from photon.data import open_data
from photon.deploy.certificates import (
    CertificateFiles,
    keep_certificate,
    keep_member_authority,
    member_certificate,
)
from photon.deploy.desk import Desk, DeskLimits
from photon.deploy.embedded_store import EmbeddedStore
from photon.deploy.front_door import DoorSettings, front_door
from photon.deploy.ports import free_ports
from photon.deploy.service import Service, ServiceEvent
from photon.deploy.supervisor import Supervisor
from photon.membership.invitation import SharedTokenizer, certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster


@dataclass
class Watched:
    """A supervisor, and all it said."""

    supervisor: Supervisor
    home: Path
    lines: list[str] = field(default_factory=list)
    events: list[ServiceEvent] = field(default_factory=list)

    def kinds(self, name: str) -> list[str]:
        return [event.kind for event in self.events if event.service == name]

    def deaths(self, name: str) -> list[ServiceEvent]:
        return [each for each in self.events if each.service == name and each.kind == "died"]

    def status(self, name: str):
        return next(each for each in self.supervisor.status() if each.name == name)


def _watched(home: Path) -> Watched:
    lines: list[str] = []
    events: list[ServiceEvent] = []
    supervisor = Supervisor(
        home / "serve.json", home / "logs", log=lines.append, events=events.append
    )
    return Watched(supervisor, home, lines, events)


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Callable[[str], Path]]:
    """Makes folders with short paths (unix sockets lie in some), removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="photon-deploy-"))
    numbers = iter(range(10_000))

    def make(name: str = "home") -> Path:
        folder = root / f"{name}{next(numbers)}"
        folder.mkdir()
        return folder

    yield make
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def home(short_folder) -> Path:
    return short_folder()


@pytest.fixture
def watched(home) -> Iterator[Watched]:
    """An open supervisor in a home of its own; closed, with all its services, at the end."""
    found = _watched(home)
    with found.supervisor:
        yield found


@pytest.fixture(scope="session")
def watch() -> Callable[[Path], Watched]:
    """Makes a supervisor, not opened, for a home."""
    return _watched


@pytest.fixture(scope="session")
def certificates(short_folder) -> CertificateFiles:
    """Of 127.0.0.1, by an authority of the tests' own."""
    return keep_certificate(short_folder("certificates"), "127.0.0.1")


@dataclass
class RunningStore:
    """A SeaweedFS that is up, and the supervisor that keeps it so (its service is "store")."""

    store: EmbeddedStore
    watched: Watched


@pytest.fixture(scope="session")
def running_store(short_folder) -> Iterator[RunningStore]:
    """One for all tests of a session: use a prefix of your own."""
    found = _watched(short_folder("weed"))
    store = EmbeddedStore(found.home / "store", min_free_gib=0.1, volume_mib=64)
    with found.supervisor as supervisor:
        # Its own way to stop takes a quarter of a minute.
        supervisor.start(replace(store.service(), stop_signal=signal.SIGKILL))
        yield RunningStore(store, found)


class Upstream:
    """What stands behind a door in tests: answers everything, remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        #: Requests that began, whether their bodies came or not; but those of the door itself,
        #: whether it may let somebody in, whose headers are in `admissions`.
        self.begun = 0
        self.admissions: list[dict[str, str]] = []
        #: What it is told.
        self.admits = 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if self.path.startswith("/door/"):
                    outer.admissions.append({k.lower(): v for k, v in self.headers.items()})
                    self.send_response(outer.admits)
                    self.send_header("content-length", "2")
                    self.end_headers()
                    self.wfile.write(b"{}")
                    return
                outer.begun += 1
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length)
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.asked.append(
                    {"verb": self.command, "path": self.path, "headers": headers, "body": body}
                )
                answer = json.dumps({"path": self.path, "bytes": len(body)}).encode()
                with contextlib.suppress(OSError):  # who asked may have gone
                    self.send_response(200)
                    self.send_header("content-length", str(len(answer)))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                return

        for verb in ("GET", "PUT", "HEAD", "DELETE", "OPTIONS"):
            setattr(Handler, f"do_{verb}", Handler.do_POST)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class RunningDoor:
    """A Caddy that is up, what stands behind it, and the supervisor that keeps it ("door")."""

    settings: DoorSettings
    service: Service
    files: CertificateFiles
    desk: Upstream
    watched: Watched

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.settings.port}"

    def trust(self, authority: Path | None = None, *, days: float = 1.0) -> ssl.SSLContext:
        """With a certificate for a new key, of this door's authority for members or of another."""
        return member_trust(self.files.ca, authority or self.settings.members_ca.parent, days=days)


def member_trust(
    ca: Path, authority: Path, key: NodeKey | None = None, *, days: float = 1.0
) -> ssl.SSLContext:
    """What a member's connections are made with."""
    with tempfile.TemporaryDirectory() as folder:
        key = key or NodeKey.create(Path(folder) / "node.key")
        pem, _ = member_certificate(authority, key.public_pem, key.fingerprint, days)
        file = Path(folder) / "both.pem"
        file.write_bytes(key.encrypted_pem("secret") + pem.encode())
        trust = ssl.create_default_context(cafile=str(ca))
        trust.load_cert_chain(file, password="secret")
    return trust


@pytest.fixture(scope="session")
def running_door(short_folder, certificates, running_store) -> Iterator[RunningDoor]:
    """In front of an upstream for the desk, and the real store."""
    desk = Upstream()
    found = _watched(short_folder("door"))
    settings = DoorSettings(
        "127.0.0.1",
        free_ports(1)[0],
        certificates.certificate,
        certificates.key,
        keep_member_authority(found.home) / "ca.crt",
        desk_port=desk.port,
        store_port=running_store.store.port,
        body_silence_s=3,
    )
    service = front_door(settings, found.home / "door")
    try:
        with found.supervisor as supervisor:
            supervisor.start(service)
            yield RunningDoor(settings, service, certificates, desk, found)
    finally:
        desk.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """An aggregator's home whose desk listens, its operator's socket too."""
    made = Place(tmp_path)
    try:
        made.open(operator_socket=made.socket)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def aggregator(short_folder, running_store, watch, three_silos) -> Iterator[Aggregator]:
    """Up, with a door of its own before its desk and the store of all."""
    folder = short_folder("aggregator")
    files = keep_certificate(folder / "home", "127.0.0.1")
    roster = Roster(folder / "members.sqlite")
    (port,) = free_ports(1)
    presigner = running_store.store.presigner(f"https://127.0.0.1:{port}", "checked")
    limits = DeskLimits(joins_per_minute=1000)
    members = keep_member_authority(folder / "home")
    audience = certificate_fingerprint(files.ca.read_text())
    desk = Desk(roster, presigner, limits=limits, audience=audience, authority=members)
    desk.start()
    settings = DoorSettings(
        *("127.0.0.1", port, files.certificate, files.key, members / "ca.crt"),
        desk_port=desk.port,
        store_port=running_store.store.port,
    )
    watched = watch(folder / "watched")
    try:
        with watched.supervisor as supervisor:
            supervisor.start(front_door(settings, folder / "door"))
            tokenizer = SharedTokenizer(open_data(three_silos).tokenizer_sha256, "</s>", None)
            yield Aggregator(folder, roster, files, presigner, desk, settings, tokenizer)
    finally:
        desk.stop()
        roster.close()


@pytest.fixture
def site(tmp_path, three_silos) -> Site:
    """Not a member yet."""
    return Site(tmp_path, three_silos)


@pytest.fixture
def member(site, aggregator, request) -> Site:
    """A site that has joined, under a name of its own."""
    site.join(aggregator, name_of(request))
    return site
