"""The end of the supervisor itself: kill -9 of it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from service_programs import WITH_GRANDCHILD, alive, said, sleeper, until

from photon.deploy.supervisor import Supervisor

_SUPERVISOR = """
import sys
from pathlib import Path
from photon.deploy.service import Service
from photon.deploy.supervisor import Supervisor

home = Path(sys.argv[1])
with Supervisor(home / "serve.json", home / "logs", log=lambda line: print(line, flush=True)) as it:
    it.start(Service("parent", (sys.executable, "-I", "-S", "-u", "-c", sys.argv[2])))
    it.wait()
"""


@pytest.fixture
def supervising(home):
    """A process of its own with a supervisor, its service and grandchild: (process, ids)."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, str(home), WITH_GRANDCHILD],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    grandchild = next(
        int(found[1])
        for line in process.stdout
        if (found := re.search(r"parent \| grandchild (\d+)", line))
    )

    def recorded() -> dict[str, Any]:
        return json.loads((home / "serve.json").read_text())["services"].get("parent", {})

    # The child speaks before the supervisor has written down that it runs.
    until(lambda: recorded().get("state") == "up", "the record")
    guards = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if _ppid(entry) == process.pid and b"guard" in (entry / "cmdline").read_bytes()
    ]
    try:
        yield process, recorded()["pid"], grandchild, guards
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with Supervisor(home / "serve.json", home / "logs"):
            pass


def _ppid(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_kill_9_of_the_supervisor_leaves_no_process_behind(supervising) -> None:
    process, child, grandchild, guards = supervising
    assert alive(child)
    assert alive(grandchild)
    assert len(guards) == 1
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for pid in (child, grandchild, *guards):
        until(lambda pid=pid: not alive(pid), f"the end of {pid}", 30)


def test_what_survives_all_the_same_is_ended_by_the_next_supervisor(
    supervising, home, watch
) -> None:
    process, child, grandchild, guards = supervising
    process.send_signal(signal.SIGSTOP)  # or it would start another guard
    os.kill(guards[0], signal.SIGKILL)
    process.kill()
    process.wait()
    until(lambda: not alive(child), "the child's end")
    time.sleep(0.3)
    assert alive(grandchild), "without guard and supervisor nobody ends it: the fault fired"
    watched = watch(home)
    with watched.supervisor:
        assert not alive(grandchild)
        until(lambda: said(watched, "ended 1 processes that an earlier one left"), "the line")


def test_a_guard_that_was_killed_is_replaced(watched) -> None:
    watched.supervisor.start(sleeper())
    guard = watched.supervisor._guard.pid
    os.kill(guard, signal.SIGKILL)
    until(lambda: not alive(guard), "the guard's end")
    os.kill(watched.status("sleeper").pid, signal.SIGKILL)
    until(lambda: watched.kinds("sleeper").count("ready") == 2, "the restart")
    assert watched.supervisor._guard.pid != guard
    assert watched.supervisor._guard.poll() is None


def test_sigterm_handled_by_asking_to_stop(home) -> None:
    program = _SUPERVISOR.replace(
        "    it.wait()",
        "    import signal\n"
        "    signal.signal(signal.SIGTERM, lambda *_: it.ask_to_stop())\n"
        # At once: what other threads print may come between a print and its end of line.
        "    import os; os.write(1, b'\\nready\\n')\n"
        "    it.wait()\n"
        "print('done', flush=True)",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(home), WITH_GRANDCHILD],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        continue
    pid = json.loads((home / "serve.json").read_text())["services"]["parent"]["pid"]
    process.terminate()
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert rest.endswith("done\n")
    assert not alive(pid)
    assert not (home / "serve.json").exists()


def test_a_service_outlives_the_thread_that_asked_for_it(watched) -> None:
    """The kernel ends a child with the thread that forked it, and callers' threads come and go."""
    thread = threading.Thread(target=watched.supervisor.start, args=(sleeper(),))
    thread.start()
    thread.join()
    time.sleep(0.5)
    assert watched.status("sleeper").state == "up"
    assert watched.deaths("sleeper") == []
