"""Services that are started in order, kept up, and stopped in reverse; none is ever left behind.

A service is another program. One that dies is started again after a pause that doubles; one that
dies again and again is given up, in words that quote its log. However this process ends, kill -9
included, its services end with it (photon.deploy.tether), and what a former one left behind all the
same (a machine without /proc, a guard that was killed too) is ended before new services start.

    with Supervisor(home / "serve.json", home / "logs", log=print) as supervisor:
        supervisor.start(store)
        supervisor.start(door)
        supervisor.wait()
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from photon.deploy import tether
from photon.deploy.keeper import Keeper
from photon.deploy.logs import BoundedLog, Herald, merged_line
from photon.deploy.service import Service, ServiceEvent, ServiceStatus
from photon.environment import given
from photon.errors import DeployError, DiskFullError, PhotonError
from photon.store.disk import write_json

#: Longest part of a wait.
_SLICE_S = 0.5


class Supervisor:
    """Keeps services up; a context manager. All methods may be called from any thread.

    Args:
        record: a file of ours in the home folder: who runs, with `facts`, while we do. Beside it
            lies a lock: one supervisor per home.
        log_folder: each service's own log, NAME.log.
        log: told each line of every service, as `HH:MM:SS name | text`, one at a time.
        events: told what happens to services, from their threads; not to take long.
        facts: goes into the record.

    Raises (on entry):
        DeployError: another supervisor runs in this home, or processes of a former one don't end.
    """

    def __init__(
        self,
        record: Path,
        log_folder: Path,
        *,
        log: Callable[[str], None] | None = None,
        events: Callable[[ServiceEvent], None] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._record = record
        self._log_folder = log_folder
        self._herald = None if log is None else Herald(log)
        self._events = events
        self._facts = dict(facts or {})
        self._keepers: dict[str, Keeper] = {}
        self._lock = threading.RLock()
        self._home_lock: IO[str] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self._stopping = False
        # Of this queue's methods `put` may be called in a signal handler.
        self._mail: SimpleQueue[PhotonError | None] = SimpleQueue()

    def __enter__(self) -> Supervisor:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._take_home()
        self._guard = self._start_guard()
        self._write_record()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, service: Service) -> None:
        """Start a service and keep it up from now on; returns when it is ready.

        One of the same name that is stopped or lost is replaced. Does nothing once asked to stop.

        Raises:
            PortInUseError: as said.
            ServiceLostError: it died thrice, or was not ready in time so often.
            DeployError: no such program; or the name is taken by a service that runs.
        """
        with self._lock:
            if self._stopping:
                return
            before = self._keepers.get(service.name)
            if before is not None and before.status().state not in ("stopped", "lost"):
                raise DeployError(f"service {service.name} runs already")
            log = BoundedLog(self._log_folder / f"{service.name}.log")
            mark = f"{self._mark}{service.name}."
            keeper = Keeper(service, mark, log, self._line, self._tell)
            # Replaced ones go to the end: services stop in the reverse order of their start.
            self._keepers.pop(service.name, None)
            self._keepers[service.name] = keeper
        if before is not None:
            before.close()
        keeper.begin(lambda: self._stopping)

    def signal_one(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a service that is up, for instance to read its configuration again.

        Returns:
            Whether it was up. Who is just starting reads the new one anyway.
        """
        return self._keeper(name).send(number)

    def status(self) -> list[ServiceStatus]:
        """How each service is, in the order of starting."""
        with self._lock:
            keepers = list(self._keepers.values())
        return [keeper.status() for keeper in keepers]

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until asked to stop (True), or for so long (False).

        Raises:
            ServiceLostError: a service was given up.
        """
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._stopping:
            left_s = max(0.0, until_s - time.monotonic())
            try:
                # In slices: a signal that comes just before a wait begins does not end it.
                news = self._mail.get(timeout=min(left_s, _SLICE_S))
            except Empty:
                if left_s <= _SLICE_S:
                    return False
                continue
            if news is not None:
                raise news
            return True
        return True

    def ask_to_stop(self) -> None:
        """Make `wait` and `start` return; may be called in a signal handler."""
        self._stopping = True
        self._mail.put(None)

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping

    @contextlib.contextmanager
    def ending_on_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM ask to stop (main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {
            one: signal.signal(one, lambda *_: self.ask_to_stop())
            for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for one, handler in kept.items():
                signal.signal(one, handler)

    def close(self) -> None:
        """Stop all services, the last started first, and wait until all are gone."""
        self._stopping = True
        with self._lock:
            keepers = list(self._keepers.values())
        for keeper in reversed(keepers):
            keeper.stop()
            keeper.close()
        if self._guard is not None:
            _dismiss(self._guard)
            self._guard = None
        if self._home_lock is not None:
            self._record.unlink(missing_ok=True)
            self._home_lock.close()
            self._home_lock = None
        if self._herald is not None:
            self._herald.close()

    def _keeper(self, name: str) -> Keeper:
        with self._lock:
            keeper = self._keepers.get(name)
            names = ", ".join(self._keepers) or "none"
        if keeper is None:
            raise DeployError(f"there is no service {name!r}", hint=f"Services: {names}.")
        return keeper

    # --- the home folder, and what a former supervisor left ---------------------------------

    def _take_home(self) -> None:
        path = self._record.with_suffix(".lock")
        lock = path.open("a+", encoding="utf-8")
        path.chmod(0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise DeployError(
                f"another Photon (pid {_owner(self._record) or 'unknown'}) runs in "
                f"{self._record.parent}",
                hint="Stop it first (photon stop), or use another home folder.",
            ) from error
        # The mark names this very folder: not a copy of it elsewhere, nor one of the same path in
        # a container that shares our process ids.
        lock.seek(0)
        identity = lock.read().strip()
        if not identity:
            identity = secrets.token_hex(16)
            lock.write(identity)
            lock.flush()
        inode = os.fstat(lock.fileno()).st_ino
        named = f"{identity} {inode} {self._record.resolve()}"
        home = hashlib.sha256(named.encode()).hexdigest()[:20]
        self._home_lock = lock
        self._mark = f"{home}.{secrets.token_hex(6)}."
        self._end_former(f"{home}.")

    def _end_former(self, home: str) -> None:
        """End what a supervisor that was killed left in this home."""
        killed, left = tether.kill_marked(home)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            recorded = json.loads(self._record.read_text(encoding="utf-8"))["services"]
            for one in recorded.values():
                if one["birth"] is not None and tether.birth(one["pid"]) == one["birth"]:
                    os.kill(one["pid"], signal.SIGKILL)
                    killed += 1
        if left:
            raise DeployError(
                f"processes of an earlier Photon in {self._record.parent} do not end: "
                f"{', '.join(map(str, left))}",
                hint="They are most likely stuck on a disk; end them, then start again.",
            )
        if killed:
            self._line("photon", f"ended {killed} processes that an earlier one left running")

    def _start_guard(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(tether.__file__)), "guard", self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=given(computes=False),
            start_new_session=True,
        )

    def _keep_guard(self) -> None:
        """Somebody may have killed the guard as well."""
        with self._lock:
            if self._guard is not None and self._guard.poll() is not None:
                _dismiss(self._guard)
                self._guard = self._start_guard()

    def _write_record(self) -> None:
        """Who runs now. Lost on a full disk, as processes are found by their mark as well."""
        with self._lock, contextlib.suppress(OSError, DiskFullError):
            services = {
                one.name: {**asdict(one), "birth": tether.birth(one.pid)}
                for one in self.status()
                if one.pid is not None
            }
            record = {**self._facts, "pid": os.getpid(), "services": services}
            write_json(self._record, record, "who runs here", mode=0o600)

    # --- what keepers tell ------------------------------------------------------------------

    def _line(self, name: str, text: str) -> None:
        if self._herald is not None:
            self._herald.say(merged_line(name, text))

    def _tell(self, event: ServiceEvent, failure: PhotonError | None) -> None:
        for line in event.text.splitlines():
            self._line(event.service, f"-- {line}")
        if self._home_lock is not None:
            self._write_record()
            self._keep_guard()
        if self._events is not None:
            self._events(event)
        if failure is not None:
            self._mail.put(failure)


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    if guard.stdin is not None:
        guard.stdin.close()
    guard.wait()


def runner(record: Path) -> int | None:
    """The id of the process that supervises a home folder now, 0 if that is not known; None if
    nobody does.

    Args:
        record: as given to Supervisor.
    """
    try:
        with record.with_suffix(".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError:
        return _owner(record)
    return None


def _owner(record: Path) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(record.read_text(encoding="utf-8"))["pid"])
    return 0
