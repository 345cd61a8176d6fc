"""Flower's own programs: a SuperLink, SuperNodes, and the app that `flwr run` submits.

PHOTON_FLOWER says where they are; `make flower` sets it, for each version in turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import photon.flower
from photon.deploy import tether
from photon.deploy.ports import free_ports

PROGRAMS = Path(os.environ.get("PHOTON_FLOWER", "/nowhere"))
needs_flower = pytest.mark.skipif(
    not (PROGRAMS / "flwr").exists(), reason="needs Flower's programs: `make flower` has them"
)


class Flower:
    """A Flower federation on loopback, at work. A context manager: it is ended on leaving.

    Args:
        folder: for homes and logs.
        home: serve.home.
        sites: homes of Photon's nodes, by name; each gets a SuperNode.
    """

    def __init__(self, folder: Path, home: Path, sites: Mapping[str, Path]) -> None:
        self.folder = folder
        self.home = home
        self.sites = sites
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(exist_ok=True)
        (self.port,) = free_ports(1)

    def __enter__(self) -> Flower:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9 of SuperLink and SuperNodes; what they started ends by itself."""
        self._end(signal.SIGKILL)

    def start(self) -> None:
        """Bring all of it up, and have it run Photon's app."""
        quiet = "--disable-runtime-dependency-installation"
        self._start("superlink", "flower-superlink", "--port", str(self.port), quiet)
        deadline = time.monotonic() + 120
        while not _answers(self.port):
            assert time.monotonic() < deadline, self.log("superlink")
            time.sleep(0.1)
        for name, home in self.sites.items():
            self.node(name, home)
        self._submit()

    def node(self, name: str, home: Path) -> None:
        """A SuperNode beside the node in a home."""
        (port,) = free_ports(1)
        where = ("--port", str(port), "--superlink", f"127.0.0.1:{self.port}")
        self._start(name, "flower-supernode", *where, "--node-config", f'photon-home="{home}"')

    def await_log(self, name: str, words: str) -> None:
        """Until a program's log has some words."""
        deadline = time.monotonic() + 120
        while words not in self.log(name):
            assert time.monotonic() < deadline, f"no {words!r} in {self.log(name)}"
            time.sleep(0.2)

    def _submit(self) -> None:
        config = '[superlink]\ndefault = "here"\n[superlink.here]\n'
        config += f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        env = self._environment("submitter")
        Path(env["FLWR_HOME"], "config.toml").write_text(config)
        app = Path(photon.flower.__file__).with_name("app")
        words = ["run", str(app), "here", "--run-config", f'home="{self.home}"']
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), *words], capture_output=True, text=True, env=env, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _end(self, first: signal.Signals) -> None:
        for number in (first, signal.SIGKILL):
            for process in self._started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self._started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        self._started.clear()

    def _environment(self, name: str) -> dict[str, str]:
        home = self.folder / "flwr" / name
        home.mkdir(parents=True, exist_ok=True)
        return os.environ | {
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",  # it starts others by name
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def _start(self, name: str, program: str, *words: str) -> None:
        tied = [sys.executable, "-I", "-S", str(Path(tether.__file__)), "run", str(os.getpid())]
        with (self.folder / f"{name}.log").open("ab") as file:
            process = subprocess.Popen(
                [*tied, str(PROGRAMS / program), "--insecure", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment(name),
                cwd=self.folder,
                start_new_session=True,
            )
        self._started.append(process)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False
