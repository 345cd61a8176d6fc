"""Flower's own programs on loopback: a SuperLink, SuperNodes, `flwr run`; ended whatever happens.

As its documentation starts them, without TLS and keys, state in memory, private and quiet.
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

from photon.deploy import tether
from photon.deploy.ports import free_ports

_UP_S = 120.0


class Flower:
    """A SuperLink and what belongs to it. A context manager: all is ended on leaving.

    Args:
        folder: for homes and logs; made if missing.
        programs: where Flower's are, with a Python beside them.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self._programs = programs
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        (self._port,) = free_ports(1)

    def __enter__(self) -> Flower:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGTERM)

    def end(self, how: signal.Signals) -> None:
        """End all; after ten seconds by force. What they started ends by itself."""
        for number in (how, signal.SIGKILL):
            for process in self._started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self._started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        self._started.clear()

    def superlink(self, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start it, at the same port each time, and wait until it listens.

        Raises:
            SystemExit: it ended, or does not.
        """
        quiet = "--disable-runtime-dependency-installation"
        process = self._start(
            "superlink", "flower-superlink", "--port", str(self._port), quiet, more=environment
        )
        deadline = time.monotonic() + _UP_S
        while not self._listens():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"flower-superlink: {self.log('superlink')[-1000:]}")
            time.sleep(0.1)
        return process

    def node(
        self, name: str, *words: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode."""
        (port,) = free_ports(1)
        where = ("--port", str(port), "--superlink", f"127.0.0.1:{self._port}")
        return self._start(name, "flower-supernode", *where, *words, more=environment)

    def submit(self, app: Path, config: str) -> str:
        """`flwr run`; why that failed, or nothing."""
        address = f'address = "127.0.0.1:{self._port}"\ninsecure = true\n'
        environment = self._environment("submitter")
        Path(environment["FLWR_HOME"], "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{address}', encoding="utf-8"
        )
        done = subprocess.run(
            [self._programs / "flwr", "run", app, "here", "--run-config", config],
            capture_output=True,
            text=True,
            env=environment,
            timeout=180,
            check=False,
        )
        return f"`flwr run` failed: {(done.stdout + done.stderr)[-600:]}" if done.returncode else ""

    def log(self, name: str) -> str:
        """What a program said; nothing where there was none."""
        with contextlib.suppress(OSError):
            return (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return ""

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 5):
            return True
        return False

    def _environment(self, name: str) -> dict[str, str]:
        home = self._folder / "flwr" / name
        home.mkdir(parents=True, exist_ok=True)
        return os.environ | {
            # It starts others of its programs by name.
            "PATH": f"{self._programs}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def _start(
        self, name: str, program: str, *words: str, more: Mapping[str, str] | None
    ) -> subprocess.Popen[bytes]:
        tied = [sys.executable, "-I", "-S", str(Path(tether.__file__)), "run", str(os.getpid())]
        with (self._folder / f"{name}.log").open("ab") as file:
            process = subprocess.Popen(
                [*tied, str(self._programs / program), "--insecure", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment(name) | dict(more or {}),
                cwd=self._folder,
                start_new_session=True,
            )
        self._started.append(process)
        return process
