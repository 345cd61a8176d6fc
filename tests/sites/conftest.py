"""A federation across hosts with their own addresses: network namespaces on a bridge.

`make sites` runs these; they need root and Debian's iproute2, and take minutes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from site_runs import PHOTON

REACH = """
import json, socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
    print("true")
except OSError:
    print("false")
"""
#: Of the bridge, by version of IP, and of links beside it.
_SUBNETS = {4: "10.77.0.{}/24", 6: "fd77::{}/64"}
_LINK = "10.78.0.{}/24"


def why_not() -> str | None:
    """Why there can be no hosts here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no ip command (Debian's package iproute2)"
    tried = subprocess.run(["ip", "netns", "add", "photon-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "photon-try"], check=False)
    return None


def ip(*words: str, inside: str | None = None) -> None:
    """Run `ip`, in a namespace if one is named."""
    place = ["-n", inside] if inside is not None else []
    subprocess.run(["ip", *place, *words], check=True, capture_output=True, text=True)


class Network:
    """A switch with hosts. A context manager: everything is taken down at the end.

    Args:
        hosts: names; the first gets 10.77.0.1, and so on.
        family: 6: fd77::1, and so on, and no IPv4 address but that of loopback.
    """

    def __init__(self, *hosts: str, family: Literal[4, 6] = 4) -> None:
        self._mark = f"p{os.getpid() % 10_000}"
        self._subnet = _SUBNETS[family]
        self.hosts = {
            name: Host(name, f"{self._mark}-{name}", self._subnet.format(number).split("/")[0])
            for number, name in enumerate(hosts, start=1)
        }

    def __enter__(self) -> Network:
        switch = f"{self._mark}-switch"
        try:
            ip("netns", "add", switch)
            ip("link", "add", "bridge", "type", "bridge", inside=switch)
            ip("link", "set", "bridge", "up", inside=switch)
            for number, host in enumerate(self.hosts.values()):
                port = f"port{number}"
                ip("netns", "add", host.space)
                ip(
                    "link",
                    "add",
                    port,
                    "netns",
                    switch,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    host.space,
                )
                ip("link", "set", port, "master", "bridge", "up", inside=switch)
                self._up(host, "eth0", self._subnet.format(number + 1))
                ip("link", "set", "lo", "up", inside=host.space)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self, host: Host, device: str, address: str) -> None:
        later = ["nodad"] if ":" in address else []  # else it takes a second or two
        ip("address", "add", address, "dev", device, *later, inside=host.space)
        ip("link", "set", device, "up", inside=host.space)

    def cut_off(self, name: str, *, but: str | None = None) -> str:
        """Take a host from the switch; leave it a cable to one other, which forwards nothing.

        Returns:
            The other's address at that cable.
        """
        host = self.hosts[name]
        ip("link", "delete", "eth0", inside=host.space)
        if but is not None:
            other = self.hosts[but]
            ends = ["veth", "peer", "name", "eth1", "netns", other.space]
            ip("link", "add", "eth0", "netns", host.space, "type", *ends)
            self._up(other, "eth1", _LINK.format(1))
            self._up(host, "eth0", _LINK.format(2))
        return _LINK.format(1).split("/")[0]

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.end()
        for space in [f"{self._mark}-switch", *(host.space for host in self.hosts.values())]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]


class Host:
    """A network namespace, and the processes that a test started in it."""

    def __init__(self, name: str, space: str, address: str) -> None:
        self.name = name
        self.space = space
        self.address = address
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, *words: str | Path, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program here, in a process group of its own; it ends with this process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.space, *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._started.append(process)
        return process

    def run(
        self, *words: str | Path, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", self.space, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=check,
        )

    def python(self, program: str, *words: str, timeout_s: float = 60.0) -> Any:
        """Run some lines of Python here; what they print is JSON."""
        done = self.run(sys.executable, "-c", program, *words, timeout_s=timeout_s, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    def reaches(self, address: str, port: int) -> bool:
        """Whether a TCP connection can be made from here."""
        return self.python(REACH, address, str(port))

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            if process.poll() is None:
                process.kill()
                process.wait()


def children(pid: int) -> Sequence[int]:
    """Processes that this one started."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def sockets(folder: str, names: Sequence[str]) -> list[str]:
    """Those of some names that are sockets, which can't be copied."""
    return [name for name in names if (Path(folder) / name).is_socket()]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Federation:
    """An aggregator and its silos, each on a host of its own.

    Args:
        folder: for everything.
        network: hosts "aggregator" and one for each silo.
        run_file: TOML; its [serve] is written here.
        data: prepared folder with a silo for each.
        silos: names of the silos, which are the hosts' too.
        at: host of the aggregator.
        parent: of a federation inside another, whose silos this one's aggregator is one of.
    """

    def __init__(
        self,
        folder: Path,
        network: Network,
        run_file: str,
        data: Path,
        silos: Sequence[str],
        *,
        at: str = "aggregator",
        parent: Federation | None = None,
    ) -> None:
        self.folder = folder
        self.network = network
        self.aggregator = network[at]
        self.parent = parent
        self.silos = list(silos)
        self.home = folder / "server"
        self.run = folder / "run"
        self.run_file = folder / "run.toml"
        self.run_file.write_text(
            run_file
            + f"""
[serve]
listen = "[::]:8443"
host = "{self.aggregator.address}"
home = "{self.home}"
min_silos = {len(self.silos)}
silos = {json.dumps(self.silos)}
"""
        )
        for silo in self.silos:
            (folder / f"{silo}.toml").write_text(
                f"""
[data]
path = "{data}"

[compute]
device = "cpu"
threads = 1
"""
            )
        self.serving: subprocess.Popen[bytes] | None = None
        self.joined: dict[str, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        """Start the aggregator, or go on with its run."""
        if self.parent is not None:
            node = self.parent.folder / f"{self.aggregator.name}.toml"
            words = [self.run_file, "--run-dir", self.run, "--parent", node]
            if not self.home.exists():
                words += ["--invite", self.parent.invite(self.aggregator.name)]
        elif (self.run / "serve.json").exists():
            address = f"serve.host={self.aggregator.address}"
            home = f"serve.home={self.home}"
            words = ["--resume", self.run, "--set", address, "--set", home]
        else:
            words = [self.run_file, "--run-dir", self.run]
        self.serving = self.aggregator.start(
            *PHOTON, "serve", *words, "--quiet", log=self.folder / "serve.log"
        )

    def await_door(self, within_s: float = 180.0) -> None:
        """Until silos can join."""

        def up() -> bool:
            assert self.serving is not None
            assert self.serving.poll() is None, self.log()
            try:
                record = json.loads((self.home / "serve.json").read_text())
            except (OSError, ValueError):
                return False
            return "loop" in record.get("services", {})

        self.wait("the aggregator is up", up, within_s=within_s)

    def invite(self, silo: str, *, rotate: bool = False) -> Path:
        """An invitation file for a silo, or for one that is to come with another key."""
        words = ["members", "rotate"] if rotate else ["invite"]
        file = self.folder / f"{silo}.invitation.toml"
        file.unlink(missing_ok=True)
        of = ["--home", self.home] if self.parent else ["--run-file", self.run_file]
        self.aggregator.run(*PHOTON, *words, silo, *of, "--out", file)
        return file

    def join(
        self,
        silo: str,
        invitation: Path | None = None,
        *,
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        part: Literal["", "gateway", "trainer"] = "",
        host: str | None = None,
    ) -> None:
        """Start a silo's node: the first time with its invitation, at times with a new address.

        Args:
            part: of a site with two machines.
            host: of the trainer.
        """
        words: list[str | Path] = [address] if address is not None else []
        words += ["--invite", invitation] if invitation is not None else []
        home = ["--home", self.node_home(silo)] if part != "trainer" else []
        words += [f"--{part}"] if part else []
        node = self.folder / f"{silo}.toml"
        self.joined[host or silo] = self.network[host or silo].start(
            *PHOTON,
            *("join", *words, "--node", node, *home),
            log=self.folder / f"{host or silo}.log",
            env=env,
        )

    def trainer_log(self, silo: str) -> str:
        """What a silo's trainer said so far."""
        try:
            return (self.node_home(silo) / "logs" / "trainer.log").read_text()
        except OSError:
            return ""

    def node_home(self, silo: str) -> Path:
        return self.folder / silo

    def wait(self, what: str, true: Callable[[], bool], *, within_s: float) -> None:
        """Until something is so."""
        start = time.monotonic()
        while not true():
            assert time.monotonic() - start < within_s, (
                f"not within {within_s} s: {what}; {self.log()}"
            )
            time.sleep(0.1)

    def kill_aggregator(self) -> None:
        """kill -9 of the process that was started; then wait for what it had started."""
        assert self.serving is not None
        record = json.loads((self.home / "serve.json").read_text())
        services = [one["pid"] for one in record["services"].values()]
        services += [each for pid in services for each in children(pid)]
        self.serving.kill()
        self.serving.wait()
        gone = [Path(f"/proc/{pid}/exe") for pid in services]
        self.wait("its services are gone", lambda: not any(map(os.path.exists, gone)), within_s=30)

    def move(self, host: str) -> None:
        """Hand the run to another machine: copies, and an address of its own."""
        self.aggregator = self.network[host]
        for name in ("home", "run"):
            old: Path = getattr(self, name)
            new = self.folder / host / old.name
            shutil.copytree(old, new, ignore=sockets)
            shutil.rmtree(old)
            setattr(self, name, new)

    def begin(self) -> None:
        """Everything up, all silos invited and joined."""
        self.serve()
        self.await_door()
        for silo in self.silos:
            self.join(silo, self.invite(silo))

    def pid(self, home: Path, service: str) -> int | None:
        """Of a service that runs now."""
        for name in ("serve.json", "join.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads((home / name).read_text())["services"][service]["pid"]
                if Path(f"/proc/{found}").exists():
                    return int(found)
        return None

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of one kind, so far."""
        with contextlib.suppress(OSError):
            lines = (self.run / "events.jsonl").read_text().splitlines()
            records = []
            for line in lines:
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
            return [one for one in records if one.get("event") == name]
        return []

    def summary(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.run / "summary.json").read_text())
        return None

    def await_end(self, within_s: float) -> dict[str, Any]:
        """Until the run is over; its summary."""

        def over() -> bool:
            assert self.serving is not None
            if self.summary() is None:
                assert self.serving.poll() is None, self.log()
            return self.summary() is not None

        self.wait("the run is over", over, within_s=within_s)
        found = self.summary()
        assert found is not None
        return found

    def log(self) -> str:
        """The end of the aggregator's log."""
        try:
            return (self.folder / "serve.log").read_text()[-6000:]
        except OSError:
            return "(no log)"

    def audit(self) -> list[dict[str, Any]]:
        """The verified log of rounds."""
        checked = subprocess.run(
            [*PHOTON, "audit", str(self.run), "--json"], capture_output=True, text=True, timeout=60
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        lines = (self.run / "audit.jsonl").read_text().splitlines()
        return [one for one in map(json.loads, lines) if one["kind"] == "round"]


@pytest.fixture(scope="session")
def hosts_possible() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def silos() -> list[str]:
    return ["lab-a", "lab-b", "lab-c", "lab-d"]


@pytest.fixture(scope="session")
def make_data(tmp_path_factory: pytest.TempPathFactory, prepare_text) -> Callable[..., Path]:
    """Prepares text of some silos, each of another size."""

    def make(silos: Sequence[str]) -> Path:
        sizes = {silo: 16 + 4 * number for number, silo in enumerate(silos)}
        return prepare_text(tmp_path_factory.mktemp("sites"), sizes)

    return make


@pytest.fixture(scope="session")
def silo_data(make_data, silos: list[str]) -> Path:
    """Prepared text of all four silos."""
    return make_data(silos)


@pytest.fixture(scope="session")
def pair() -> list[str]:
    return ["lab-a", "lab-b"]


@pytest.fixture(scope="session")
def pair_data(make_data, pair: list[str]) -> Path:
    """Prepared text of two silos."""
    return make_data(pair)


@pytest.fixture
def network_of(hosts_possible):
    """Makes a network of these hosts, which is taken down at the end."""
    with contextlib.ExitStack() as networks:
        yield lambda *hosts: networks.enter_context(Network(*hosts))


@pytest.fixture(scope="session")
def federation_of() -> type[Federation]:
    return Federation


@pytest.fixture
def make_federation(hosts_possible, tmp_path, silos):
    """Builds federations; takes their hosts down at the end."""
    networks = []

    def make(
        run_file: str,
        data: Path,
        *,
        extra_hosts: Sequence[str] = (),
        only: Sequence[str] = (),
        family: Literal[4, 6] = 4,
    ) -> Federation:
        chosen = list(only) or silos
        network = Network("aggregator", *chosen, *extra_hosts, family=family)
        networks.append(network)
        network.__enter__()
        return Federation(tmp_path, network, run_file, data, chosen)

    yield make
    for network in networks:
        network.__exit__()
