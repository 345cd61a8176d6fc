"""One service and the thread that starts it, watches it, and starts it again when it died."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from photon.deploy import tether
from photon.deploy.logs import MOST_LINE_BYTES, BoundedLog, readable
from photon.deploy.ports import require_free
from photon.deploy.service import (
    Kind,
    Service,
    ServiceEvent,
    ServiceStatus,
    State,
    exit_words,
)
from photon.environment import given
from photon.errors import DeployError, PhotonError, ServiceLostError

#: A service that never came up is not tried longer: most often its configuration is wrong.
_FIRST_ATTEMPTS = 3
#: How often a service that starts is asked whether it is ready.
_ASK_READY_S = 0.1
#: How often one that is up is asked, where it says so at all.
_ASK_HEALTH_S = 5.0
#: One that does not answer hangs if it used less than this share of a processor, for so many times
#: its `silence_s`.
_WORKING, _HUNG = 0.01, 5.0
#: Lines of a service that are quoted when it is lost, and searched for what it died of.
_QUOTED_LINES = 12
_SEARCHED_LINES = 60
#: Pauses differ a little, so that many nodes don't come back in the same instant.
_JITTER = 0.1
#: After its death a service's pipe ends at once, unless somebody that can't be found holds it.
_READER_S = 5.0


@dataclass
class _Life:
    """One process of a service, from its start to its end."""

    process: subprocess.Popen[bytes]
    started: float
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_SEARCHED_LINES))
    threads: list[threading.Thread] = field(default_factory=list)
    exit_code: int | None = None


class Keeper:
    """One service and the thread that starts it, watches it and starts it again.

    The kernel ends a child when the *thread* ends that started it, so a service is started by its
    keeper's thread and nobody else's; that thread outlives it.
    """

    def __init__(
        self,
        service: Service,
        mark: str,
        log: BoundedLog,
        line: Callable[[str, str], None],
        tell: Callable[[ServiceEvent, PhotonError | None], None],
    ) -> None:
        self.service = service
        self.failure: PhotonError | None = None
        self._mark = mark
        self._log = log
        self._line = line
        self._tell = tell
        self._change = threading.Condition()
        self._goal: Literal["up", "down", "closed"] = "up"
        self._status = ServiceStatus(service.name, "starting", None, time.time(), 0, "")
        self._ever_up = False
        self._up: _Life | None = None
        self._deaths: list[float] = []
        self._doublings = 0
        self._thread = threading.Thread(
            target=self._run, name=f"photon-keeper-{service.name}", daemon=True
        )

    # --- called from other threads -----------------------------------------------------------

    def begin(self, stopping: Callable[[], bool]) -> None:
        """Return when it is up or nobody wants it any more; raise what kept it from coming up."""
        self._thread.start()
        with self._change:
            while self._status.state not in ("up", "stopped", "lost") and not stopping():
                self._change.wait(0.25)
            if self._status.state == "lost" and self.failure is not None:
                raise self.failure

    def stop(self) -> None:
        with self._change:
            if self._goal == "up":
                self._goal = "down"
            self._change.notify_all()
            while self._status.state not in ("stopped", "lost") and self._thread.is_alive():
                self._change.wait(1.0)

    def close(self) -> None:
        """End the thread of a service that is stopped or lost."""
        with self._change:
            self._goal = "closed"
            self._change.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._log.close()

    def status(self) -> ServiceStatus:
        with self._change:
            return self._status

    def send(self, number: signal.Signals) -> bool:
        """Signal the program itself, if it is up; whether it was."""
        with self._change:
            life = self._up
            if life is None or life.exit_code is not None:
                return False
            with contextlib.suppress(ProcessLookupError):
                life.process.send_signal(number)
                return True
            return False

    # --- the keeper's own thread -------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._change:
                while self._goal == "down" or (self._goal == "up" and self.failure is not None):
                    self._change.wait()
                if self._goal == "closed":
                    return
            try:
                pause_s = self._live()
            except Exception as error:  # a fault of ours must not leave a service unwatched
                self._lose(DeployError(f"service {self.service.name}: {error!r}"))
                continue
            if pause_s is not None:
                self._pause(pause_s)

    def _live(self) -> float | None:
        """One life of the service. Returns the pause before the next; None if there is none."""
        restarted = self._status.restarts > 0
        self._become("starting")
        try:
            life = self._launch()
        except PhotonError as error:
            # What is wrong before it ran at all won't mend itself, unless it ran once already.
            if self._ever_up:
                return self._mourn(None, [], error.message, 0.0)
            self._lose(error)
            return None
        self._event(
            "restarted" if restarted else "started",
            f"{'started again' if restarted else 'started'}, pid {life.process.pid}",
        )
        try:
            why = self._until_ready(life) or self._watch(life)
        finally:
            wanted = self._goal == "up"
            if not wanted:
                self._become("stopping", life.process.pid)
            self._end(life, gently=not wanted)
        if not wanted:
            self._become("stopped")
            self._event("stopped", "stopped", exit_code=life.exit_code)
            return None
        if self.service.once and why is None:
            with self._change:
                self._goal = "down"
            words = exit_words(life.exit_code)
            self._become("stopped", detail=words, exit_code=life.exit_code)
            self._event("stopped", f"ended: {words}", exit_code=life.exit_code)
            return None
        up_s = time.monotonic() - life.started
        return self._mourn(life.exit_code, list(life.lines), why, up_s)

    def _launch(self) -> _Life:
        service = self.service
        for host, port in service.ports:
            require_free(host, port)
        environment = given() if service.environment is None else service.environment
        program = shutil.which(service.command[0], path=environment.get("PATH"))
        if program is None:
            raise DeployError(
                f"service {service.name}: there is no program {service.command[0]}",
                hint="Install Photon anew with its dependencies, or correct the path.",
            )
        # `run` compares this id with its parent's, so it must be the id as the child sees it.
        tied = [sys.executable, "-I", "-S", str(Path(tether.__file__)), "run", str(os.getpid())]
        try:
            process = subprocess.Popen(
                [*tied, *service.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=service.folder,
                env={**environment, tether.MARK: self._mark},
                start_new_session=True,
                umask=0o077,
            )
        except OSError as error:
            raise DeployError(f"service {service.name} can't be started: {error}") from error
        life = _Life(process, time.monotonic())
        self._log.write(f"-- {time.strftime('%Y-%m-%d %H:%M:%S')} started, pid {process.pid}")
        for does in (self._read, self._await_death):
            thread = threading.Thread(
                target=does, args=(life,), name=f"photon-{service.name}", daemon=True
            )
            life.threads.append(thread)
            thread.start()
        self._become("starting", process.pid)
        return life

    def _until_ready(self, life: _Life) -> str | None:
        """Wait for it to be ready. None: it is, or it died, or is not wanted; else why it ends."""
        deadline = life.started + self.service.ready_s
        ready, problem = self.service.ready is None, "it did not answer"
        while not ready and self._runs(life):
            ready, problem = _ask(self.service.ready, problem)
            if ready:
                break
            if time.monotonic() > deadline:
                return f"it was not ready within {self.service.ready_s:.0f} s: {problem}"
            with self._change:
                if self._runs(life):
                    self._change.wait(_ASK_READY_S)
        if self._runs(life):
            self._ever_up = True
            with self._change:
                self._up = life
            self._become("up", life.process.pid)
            self._event("ready", f"up after {time.monotonic() - life.started:.1f} s")
        return None

    def _watch(self, life: _Life) -> str | None:
        """Wait until it dies or is not wanted (None), or hangs: then what it is ended for.

        One that does not answer may be busy, with transfers of hours: it is told of and left alone
        for as long as it works. Only what neither answers nor works for long is ended.
        """
        healthy, silence_s, pid = self.service.healthy, self.service.silence_s, life.process.pid
        heard = worked = looked = time.monotonic()
        spent_s, well_so_far = math.inf, True
        while self._runs(life):
            with self._change:
                if self._runs(life):
                    pause_s = None if healthy is None else min(_ASK_HEALTH_S, silence_s / 4)
                    self._change.wait(pause_s)
            if healthy is None or not self._runs(life):
                continue
            well, problem = _ask(healthy, "it did not answer")
            now = time.monotonic()
            if not well:
                cpu_s = sum(map(tether.cpu_s, tether.marked(self._mark)))
                if cpu_s - spent_s > _WORKING * (now - looked):
                    worked = now
                looked, spent_s = now, cpu_s
            if well:
                heard, spent_s = now, math.inf
                if not well_so_far:
                    self._become("up", pid)
                    self._event("well", "answers again")
                well_so_far = True
            elif now - max(heard, worked) > _HUNG * silence_s:
                return f"it runs, but for {now - heard:.0f} s {problem}; it does nothing"
            elif well_so_far and now - heard > silence_s:
                well_so_far = False
                self._become("unwell", pid, f"does not answer: {problem}")
                self._event(
                    "unwell",
                    f"runs, but has not answered for {now - heard:.0f} s ({problem}); it is left "
                    f"alone while it works, and started anew once it did nothing for "
                    f"{_HUNG * silence_s:.0f} s",
                )
        return None

    def _runs(self, life: _Life) -> bool:
        return life.exit_code is None and self._goal == "up"

    def _end(self, life: _Life, *, gently: bool) -> None:
        """Have it gone, with all it started."""
        with self._change:
            self._up = None
        if gently:
            with contextlib.suppress(ProcessLookupError):
                life.process.send_signal(self.service.stop_signal)
            life.threads[1].join(self.service.stop_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(life.process.pid, signal.SIGKILL)
        tether.kill_marked(self._mark)
        life.threads[1].join()
        # What it said last matters most.
        life.threads[0].join(_READER_S)
        self._log.write(
            f"-- {time.strftime('%Y-%m-%d %H:%M:%S')} ended: {exit_words(life.exit_code)}"
        )

    def _mourn(
        self, exit_code: int | None, lines: list[str], why: str | None, up_s: float
    ) -> float | None:
        """Decide what follows a death: the pause before the next attempt, or None: given up."""
        policy, now = self.service.restarts, time.monotonic()
        words = why or exit_words(exit_code)
        if up_s >= policy.forgotten_after_s:
            self._deaths.clear()
            self._doublings = 0
        self._deaths = [at for at in self._deaths if now - at < policy.within_s] + [now]
        pause_s = min(policy.longest_pause_s, policy.first_pause_s * 2**self._doublings)
        self._doublings = min(self._doublings + 1, 30)
        most = policy.most_deaths
        if most is not None and not self._ever_up:
            most = min(most, _FIRST_ATTEMPTS)
        if most is not None and len(self._deaths) >= most:
            self._lose(self._lost(words, lines), exit_code)
            return None
        pause_s *= 1 + _JITTER * (2 * secrets.randbelow(1000) / 1000 - 1)
        with self._change:
            self._status = replace(self._status, restarts=self._status.restarts + 1)
            self._become("pausing", detail=words)
        text = f"died: {words}; starting it again in {pause_s:.0f} s"
        self._event("died", text, exit_code=exit_code, pause_s=pause_s)
        return pause_s

    def _lost(self, words: str, lines: list[str]) -> ServiceLostError:
        times = len(self._deaths)
        how = f"died {times} times in {self.service.restarts.within_s / 60:.0f} minutes"
        if not self._ever_up:
            how = f"did not come up, tried {times} times" if times > 1 else "did not come up"
        quoted = "".join(f"\n    {line}" for line in lines[-_QUOTED_LINES:])
        return ServiceLostError(
            f"service {self.service.name} {how}; the last time: {words}. "
            + (f"Its last lines:{quoted}" if quoted else "It said nothing."),
            hint=f"Mend what its log says ({self._log.path}), then start again.",
        )

    def _lose(self, error: PhotonError, exit_code: int | None = None) -> None:
        with self._change:
            self.failure = error
        self._become("lost", detail=error.message.partition("\n")[0])
        # Whoever waits in `start` gets it there; everybody else by `Supervisor.wait`.
        failure = error if self._ever_up else None
        self._event("given up", error.message, exit_code=exit_code, failure=failure)

    def _pause(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        with self._change:
            while self._goal == "up" and (left := until - time.monotonic()) > 0:
                self._change.wait(left)
            wanted = self._goal == "up"
        if not wanted:
            self._become("stopped")
            self._event("stopped", "stopped while it waited to be started again")

    def _become(
        self,
        state: State,
        pid: int | None = None,
        detail: str = "",
        exit_code: int | None = None,
    ) -> None:
        with self._change:
            before = self._status
            since = before.since if before.state == state else time.time()
            detail = "" if state == "up" else detail or before.detail
            self._status = ServiceStatus(
                before.name, state, pid, since, before.restarts, detail, exit_code
            )
            self._change.notify_all()

    def _event(
        self,
        kind: Kind,
        text: str,
        *,
        exit_code: int | None = None,
        pause_s: float | None = None,
        failure: PhotonError | None = None,
    ) -> None:
        event = ServiceEvent(time.time(), self.service.name, kind, text, exit_code, pause_s)
        try:
            self._tell(event, failure)
        except Exception as error:  # whoever listens must not take the service down with him
            self._log.write(f"-- could not tell of it ({error!r}): {text}")

    # --- threads of one life -----------------------------------------------------------------

    def _read(self, life: _Life) -> None:
        assert life.process.stdout is not None
        with life.process.stdout as pipe:
            while line := pipe.readline(MOST_LINE_BYTES):
                self._log.write(line)
                text = readable(line.decode(errors="replace"))
                life.lines.append(text)
                # A service must never wait for its log, nor end because nobody wants to hear it.
                with contextlib.suppress(Exception):
                    shown = self.service.wording(text)
                    if shown:
                        self._line(self.service.name, shown)

    def _await_death(self, life: _Life) -> None:
        exit_code = life.process.wait()
        with self._change:
            life.exit_code = exit_code
            self._change.notify_all()


def _ask(check: Callable[[], bool] | None, problem: str) -> tuple[bool, str]:
    """Whether a check says yes; if it does not, why."""
    try:
        well = check is None or check()
    except Exception as error:  # whatever a check meets, the service isn't well
        return False, str(error).partition("\n")[0][:200] or type(error).__name__
    return well, problem
