"""What a service is, when it is started again, and what is told of it."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from photon.deploy.logs import readable
from photon.errors import DeployError

State = Literal["starting", "up", "unwell", "pausing", "stopping", "stopped", "lost"]
Kind = Literal["started", "ready", "unwell", "well", "died", "restarted", "stopped", "given up"]


#: A death like the one before is not told again within so many seconds.
_SAME_S = 600.0


@dataclass(frozen=True)
class RestartPolicy:
    """When a service that died is started again, and when not any more.

    Attributes:
        first_pause_s: after a death; doubles with each further one.
        longest_pause_s: what it doubles to.
        forgotten_after_s: a service that was up for so long starts with a clean record.
        most_deaths: given up at that many deaths within `within_s`; None: never given up.
    """

    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    forgotten_after_s: float = 300.0
    most_deaths: int | None = 10
    within_s: float = 900.0


@dataclass(frozen=True)
class Service:
    """A program that is kept running.

    Attributes:
        name: in logs and errors; letters, digits and hyphens.
        command: program and arguments.
        environment: all of it; None: what `photon.environment.given` leaves of this process's own.
        ready: whether it does its work now; asked from a thread of the service's own, so it may
            take a second or two, and may raise (which is a no). None: as soon as it runs.
        ready_s: how long it may take to become ready.
        healthy: as `ready`, but asked every few seconds while it is up; None: not asked.
        silence_s: told of when it runs but `healthy` says no for so long; started anew only if it
            does not work either, five times as long.
        restarts: see RestartPolicy.
        stop_signal: asks it to end; only the program itself gets it, not its children.
        stop_s: how long it may take to end before it and all it started are killed.
        ports: (host, port) it will listen on; must be free when it starts.
        folder: it runs in; this process's own by default.
        wording: turns a line of its output into what the merged log shows; None leaves it out.
        once: it runs to its end, in whatever way; it is not started again.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] | None = None
    ready: Callable[[], bool] | None = None
    ready_s: float = 60.0
    healthy: Callable[[], bool] | None = None
    silence_s: float = 60.0
    restarts: RestartPolicy = RestartPolicy()
    stop_signal: signal.Signals = signal.SIGTERM
    stop_s: float = 10.0
    ports: tuple[tuple[str, int], ...] = ()
    folder: Path | None = None
    wording: Callable[[str], str | None] = readable
    once: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", self.name):
            raise DeployError(f"a service is called by letters, digits and hyphens: {self.name!r}")


@dataclass(frozen=True)
class ServiceEvent:
    """What happened to a service.

    Attributes:
        at: seconds since the epoch.
        text: the same in words.
        exit_code: of a death; negative: the signal that killed it.
        pause_s: until the next attempt.
    """

    at: float
    service: str
    kind: Kind
    text: str
    exit_code: int | None = None
    pause_s: float | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """How a service is.

    Attributes:
        since: seconds since the epoch at which it came into this state.
        restarts: how often it was started again after a death.
        detail: why, where there is something to say.
        exit_code: of one that ran to its end; negative: the signal that killed it.
    """

    name: str
    state: State
    pid: int | None
    since: float
    restarts: int
    detail: str
    exit_code: int | None = None


def troubles_to(tell: Callable[[str], None]) -> Callable[[ServiceEvent], None]:
    """A listener that passes on, in words, what an operator should see of services.

    One that dies in the same way again and again is said so once in a while, not each time.
    """
    last: dict[str, tuple[int | None, float]] = {}
    down: set[str] = set()

    def told(event: ServiceEvent) -> None:
        if event.kind in ("unwell", "well", "given up"):
            tell(f"{event.service}: {event.text}")
        elif event.kind == "died":
            exit_code, at = last.get(event.service, (None, -_SAME_S))
            if exit_code != event.exit_code or event.at - at >= _SAME_S:
                last[event.service] = (event.exit_code, event.at)
                down.add(event.service)
                tell(f"{event.service}: {event.text}")
        elif event.kind == "ready" and event.service in down:
            down.remove(event.service)
            tell(f"{event.service}: again {event.text}")

    return told


def exit_words(exit_code: int | None) -> str:
    """How a process ended, as subprocess has it, in words."""
    if exit_code is None:
        return "it did not run"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"killed by signal {-exit_code}"
