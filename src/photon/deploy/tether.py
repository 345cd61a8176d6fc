"""What ties child processes to the one that started them, kill -9 of any of them included.

Run as a program, by path and with nothing but the standard library:

    tether.py run PARENT PROGRAM ARGUMENT...   become PROGRAM, and be killed when PARENT ends
    tether.py guard MARK                       at the end of standard input, kill all of MARK

`run` is why a child does not outlive its parent. What a child started in turn is found by an
environment variable that is inherited down the tree: by the supervisor when the child died, and by
`guard`, which notices the supervisor's own end, however it came, when its pipe breaks.

Where there is no /proc and no prctl (anywhere but Linux), `run` only starts the program and nothing
is found by mark.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

#: The environment variable that marks all processes of a service.
MARK = "PHOTON_SUPERVISOR"

_LINUX = sys.platform == "linux"
#: How long killed processes may take to go; only one in uninterruptible I/O takes longer.
_GONE_S = 10.0


def marked(mark: str) -> list[int]:
    """Ids of living processes of this user whose mark begins with `mark`; never this one."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir() if _LINUX else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # it ended, or is another user's
            continue
        if environment.startswith(wanted) or b"\0" + wanted in environment:
            found.append(int(entry.name))
    return found


def kill_marked(mark: str) -> tuple[int, list[int]]:
    """Kill every process whose mark begins with `mark`, until none is left.

    Returns how many were killed, and the ids of those still there after some seconds.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + _GONE_S
    while left := marked(mark):
        if time.monotonic() > deadline:
            return len(killed), left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.02)
    return len(killed), []


def birth(pid: int) -> str | None:
    """Tells a process from a later one with the same id; None if there is none (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    # The name, in brackets, may hold spaces; the start time is field 22, the 20th after it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else f"{boot[:8]}-{fields[19]}"


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed so far; 0 if there is none (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _run(parent: int, command: list[str]) -> None:
    if _LINUX:
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before it could be watched
            sys.exit(128 + signal.SIGKILL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"can't start {command[0]}: {error.strerror}")


def _guard(mark: str) -> None:
    # Ctrl-C and a service manager's signals are for the supervisor, which closes the pipe.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.read(0, 1024):
        continue
    kill_marked(mark)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        _run(int(sys.argv[2]), sys.argv[3:])
    else:
        _guard(sys.argv[2])
