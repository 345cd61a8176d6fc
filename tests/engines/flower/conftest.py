"""A whole control plane of real processes: superlink, superexec, ServerApp, two silos.

Every process is started by the commands that `photon serve` and `photon join` use, and started
again after half a second when it ends, as their supervisor does.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from photon.engines.flower import commands
from photon.engines.flower.bundle import PROJECT, digest, pack
from photon.engines.flower.commands import Command
from photon.engines.flower.control import Control
from photon.membership.keys import NodeKey
from photon.membership.roster import ROSTER_FILE, Facts, Roster

PROGRAMS = Path(__file__).parent / "programs"
SILOS = ("north", "south")

_RESTART_S = 0.5


def wait_for(what: str, true: Callable[[], object], limit_s: float = 100.0) -> float:
    """Wait until something is so; returns the seconds it took."""
    begun_s = time.monotonic()
    while not true():
        waited_s = time.monotonic() - begun_s
        assert waited_s < limit_s, f"{what}: not within {limit_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - begun_s


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclass
class Program:
    """A process that is started again when it ends."""

    name: str
    command: Command
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    codes: list[int] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def start(self) -> None:
        self._spawn()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait until the process is gone."""
        process = self.process
        assert process is not None
        assert process.poll() is None, f"{self.name} was not running"
        ends = len(self.codes)
        process.send_signal(number)
        wait_for(f"the end of {self.name}", lambda: len(self.codes) > ends, 60)

    def tell_to_stop(self) -> None:
        self.stopping.set()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        self.tell_to_stop()
        process = self.process
        if process is not None and process.poll() is None:
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.thread is not None:
            self.thread.join(10)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def _spawn(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command.argv, env=self.command.env, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.starts += 1

    def _watch(self) -> None:
        while not self.stopping.is_set():
            assert self.process is not None
            code = self.process.poll()
            if code is None:
                self.stopping.wait(0.05)
                continue
            self.codes.append(code)
            if not self.stopping.wait(_RESTART_S):
                self._spawn()


@dataclass
class Silo:
    name: str
    home: Path
    supernode: Program
    shim: Program
    trainer: Program

    def log(self) -> str:
        path = self.home / "log.txt"
        return path.read_text() if path.exists() else ""


class World:
    """The aggregator, `SILOS`, and a run that goes on for as long as this does."""

    def __init__(self, root: Path, bundle: bytes, *, silos: tuple[str, ...] = SILOS) -> None:
        self.root = root
        self.bundle = bundle
        self.home = root / "server"
        self.run_folder = root / "run"
        #: What every program takes for its user's own folder.
        self.user = root / "user"
        for folder in (self.user, self.home, self.run_folder / "asks", self.run_folder / "answers"):
            folder.mkdir(parents=True)
        (self.run_folder / "serve.json").write_text(json.dumps({"home": str(self.home)}))
        self.ca, certificate, key = make_certificates(self.home)
        secret = commands.write_secret(self.home / "runtime.secret")
        self.port = free_port()
        self.roster = Roster(self.home / ROSTER_FILE)
        self.superlink = self._program(
            "superlink",
            commands.superlink(
                home=self.home, port=self.port, certificate=certificate, key=key, ca=self.ca,
                secret=secret,
            ),
        )  # fmt: skip
        self.superexec = self._program(
            "superexec",
            commands.superexec(
                home=self.home, superlink_port=self.port, ca=self.ca, secret=secret,
                bundle=digest(bundle), run_folder=self.run_folder,
            ),
        )  # fmt: skip
        self.control = Control(f"127.0.0.1:{self.port}", self.ca)
        self.silos = {name: self._silo(name) for name in silos}
        self.run_id = 0
        self.runs = 0
        self._asked = 0
        self._resubmit = threading.Event()
        self._supervisor: threading.Thread | None = None

    def start(self) -> None:
        self.superlink.start()
        self.superexec.start()
        for silo in self.silos.values():
            silo.trainer.start()
            silo.shim.start()
        wait_for("the superlink", self.control.healthy)
        for name, silo in self.silos.items():
            key = NodeKey.load(silo.home / "node.key")
            node = self.control.register(key.public_pem, name)
            self.roster.set_flower_node(name, node)
            silo.supernode.start()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)
        self._supervisor.start()
        wait_for("the silos", lambda: set(self.present()) == set(self.silos))

    def stop(self) -> None:
        self._resubmit.set()
        if self._supervisor is not None:
            self._supervisor.join(15)
        for silo in self.silos.values():
            for program in (silo.supernode, silo.shim, silo.trainer):
                program.tell_to_stop()
        self.superexec.tell_to_stop()
        for silo in self.silos.values():
            for program in (silo.supernode, silo.shim, silo.trainer):
                program.stop()
        self.superexec.stop()
        self.superlink.stop()
        self.control.close()
        self.roster.close()

    def ask(self, silo: str, *, work_s: float = 0.0, **more: object) -> str:
        """Ask a silo; returns the task's name."""
        self._asked += 1
        name = f"task-{self._asked:04d}"
        path = self.run_folder / "asks" / f"{name}.json"
        ask = {"silo": silo, "task": name, "work_s": work_s, "until": time.time() + 600, **more}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(ask))
        partial.replace(path)
        return name

    def answer(self, name: str, limit_s: float = 100.0) -> tuple[dict[str, str], float]:
        """The answer, and the seconds from now until it was there."""
        path = self.run_folder / "answers" / f"{name}.json"
        waited_s = wait_for(f"the answer to {name}", path.exists, limit_s)
        return json.loads(path.read_text()), waited_s

    def words(self) -> list[str]:
        """What the post said instead of answers."""
        path = self.run_folder / "words.txt"
        return path.read_text().splitlines() if path.exists() else []

    def present(self) -> list[str]:
        try:
            return json.loads((self.run_folder / "present.json").read_text())
        except (OSError, ValueError):
            return []

    def loop_pid(self) -> int:
        return int((self.run_folder / "loop.pid").read_text())

    def _supervise(self) -> None:
        """Submit the run anew whenever it is over, as `photon serve` does."""
        while not self._resubmit.is_set():
            with contextlib.suppress(Exception):  # the superlink is away
                if not self.run_id or self.control.run(self.run_id).over:
                    self.run_id = self.control.start_run(self.bundle)
                    self.runs += 1
            self._resubmit.wait(0.5)

    def _silo(self, name: str) -> Silo:
        home = self.root / name
        home.mkdir()
        key = NodeKey.create(home / "node.key")
        facts = Facts("0" * 64, "1" * 64, 1000, "0.1.0")
        self.roster.redeem(self.roster.invite(name, 3600), name, key.public_pem, facts)
        secret = commands.write_secret(home / "runtime.secret")
        port = free_port()
        # A unix socket's path is short; pytest's folders are not.
        trainer = Path(tempfile.mkdtemp(prefix="photon-")) / "trainer.sock"
        program = (sys.executable, str(PROGRAMS / "flower_trainer.py"), str(trainer), str(home))
        return Silo(
            name,
            home,
            self._program(
                f"{name}-supernode",
                commands.supernode(
                    home=home, superlink=f"127.0.0.1:{self.port}", ca=self.ca,
                    key=home / "node.key", runtime_port=port, secret=secret,
                ),
            ),
            self._program(
                f"{name}-shim",
                commands.shim(home=home, runtime_port=port, secret=secret, trainer=trainer),
            ),
            self._program(f"{name}-trainer", Command((*program, name), dict(os.environ))),
        )  # fmt: skip

    def _program(self, name: str, command: Command) -> Program:
        env = command.env | {"PYTHONPATH": str(PROGRAMS), "HOME": str(self.user)}
        return Program(name, Command(command.argv, env), self.root / f"{name}.log")


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate for this machine: paths of ca, certificate, key."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key, issuer, issuer_key, *, authority: bool) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = certificate("test authority", ca_key, None, ca_key, authority=True)
    own = certificate("localhost", key, ca.subject, ca_key, authority=False)
    paths = folder / "ca.crt", folder / "server.crt", folder / "server.key"
    paths[0].write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(own.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    paths[2].chmod(0o600)
    return paths


def hostile_bundle(marker: Path) -> bytes:
    """A bundle like ours, whose ClientApp would write `marker` when imported."""
    project = PROJECT.replace('"photon_bundle:no_client"', '"evil:app"')
    code = "import flower_loop\n\napp = flower_loop.app\n"
    evil = f"open({str(marker)!r}, 'a').write('imported')\napp = None\n"
    files = {
        "pyproject.toml": project.encode(),
        "photon_bundle.py": code.encode(),
        "evil.py": evil.encode(),
    }
    return pack(files)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for all tests of a file: it takes ten seconds to start.

    Its run's bundle is hostile to silos all the while.
    """
    root = tmp_path_factory.mktemp("flower")
    one = World(root, hostile_bundle(root / "imported"))
    try:
        one.start()
        yield one
    finally:
        one.stop()
