"""Programs that a supervisor is to keep up in tests, and waiting for what it says of them."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable

from photon.deploy import tether
from photon.deploy.service import RestartPolicy, Service

QUICK = RestartPolicy(first_pause_s=0.05, longest_pause_s=0.2, most_deaths=None)
FINITE = RestartPolicy(first_pause_s=0.05, longest_pause_s=0.2)
#: Starts a grandchild in a session of its own, and says its id.
WITH_GRANDCHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    "print('grandchild', child.pid, flush=True)\n"
    "time.sleep(600)\n"
)


def python(name: str, program: str, **more) -> Service:
    """A service that is a short Python program."""
    more.setdefault("restarts", QUICK)
    return Service(name, (sys.executable, "-I", "-S", "-u", "-c", program), **more)


def sleeper(name: str = "sleeper", **more) -> Service:
    more.setdefault("restarts", QUICK)
    return Service(name, ("sleep", "600"), **more)


def until(happened: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return tether.birth(pid) is not None


def said(watched, pattern: str) -> re.Match[str] | None:
    return next((found for line in watched.lines[:] if (found := re.search(pattern, line))), None)


def grandchild_of(watched) -> int:
    until(lambda: said(watched, r"grandchild (\d+)"), "the grandchild's id")
    found = [int(m[1]) for line in watched.lines if (m := re.search(r"grandchild (\d+)", line))]
    return found[-1]
