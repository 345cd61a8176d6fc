"""Services are started, kept up and stopped; kill -9 of anybody leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.deploy import logs as logs_module
from photon.deploy import tether
from photon.deploy.logs import BoundedLog, Herald, merged_line, readable
from photon.deploy.ports import free_ports
from photon.deploy.service import RestartPolicy, Service, ServiceEvent, exit_words, troubles_to
from photon.deploy.supervisor import Supervisor, runner
from photon.errors import DeployError, PortInUseError, ServiceLostError

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


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def alive(pid: int) -> bool:
    return tether.birth(pid) is not None


def said(watched, pattern: str) -> re.Match[str] | None:
    return next((found for line in watched.lines[:] if (found := re.search(pattern, line))), None)


def grandchild_of(watched) -> int:
    until(lambda: said(watched, r"grandchild (\d+)"), "the grandchild's id")
    found = [int(m[1]) for line in watched.lines if (m := re.search(r"grandchild (\d+)", line))]
    return found[-1]


# --- starting and stopping ------------------------------------------------------------------------


def test_services_start_in_order_and_stop_in_reverse(watched) -> None:
    for name in ("store", "link", "door"):
        watched.supervisor.start(sleeper(name))
    assert [one.state for one in watched.supervisor.status()] == ["up"] * 3
    pids = [one.pid for one in watched.supervisor.status()]
    watched.supervisor.close()
    ended = [event.service for event in watched.events if event.kind == "stopped"]
    assert ended == ["door", "link", "store"]
    assert not any(map(alive, pids))


def test_start_waits_until_a_service_is_ready(watched, home) -> None:
    flag = home / "flag"
    program = f"import time; time.sleep(0.4); open({str(flag)!r}, 'w'); time.sleep(600)"
    watched.supervisor.start(python("slow", program, ready=flag.exists))
    assert flag.exists()
    assert watched.kinds("slow")[:1] == ["started"]
    until(lambda: "ready" in watched.kinds("slow"), "the event")


def test_a_service_that_never_comes_up_is_given_up_after_three_attempts(watched) -> None:
    program = "import sys; print('no such key: serve.ports'); sys.exit(7)"
    with pytest.raises(ServiceLostError) as caught:
        watched.supervisor.start(python("broken", program, ready=lambda: False, restarts=FINITE))
    assert "broken" in caught.value.message
    assert "exit code 7" in caught.value.message
    assert "no such key: serve.ports" in caught.value.message
    assert str(watched.home / "logs" / "broken.log") in (caught.value.hint or "")
    assert watched.kinds("broken").count("died") == 2
    until(lambda: watched.kinds("broken")[-1] == "given up", "the event")
    # It was raised where it was waited for; there is no second telling.
    assert watched.supervisor.wait(0.05) is False


def test_a_service_that_is_not_ready_in_time_says_what_was_amiss(watched) -> None:
    def ready() -> bool:
        raise OSError("connection refused by port 1")

    with pytest.raises(ServiceLostError, match="not ready within 0 s: connection refused by port"):
        watched.supervisor.start(sleeper(ready=ready, ready_s=0.2, restarts=FINITE))
    assert tether.marked(watched.supervisor._mark) == []


def test_a_program_that_is_not_there(watched) -> None:
    with pytest.raises(DeployError, match="no program /nowhere/weed") as caught:
        watched.supervisor.start(Service("store", ("/nowhere/weed", "server")))
    assert caught.value.hint
    assert watched.status("store").state == "lost"


def test_a_port_that_is_taken_is_named_with_its_holder(watched) -> None:
    port = free_ports(1)[0]
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PortInUseError) as caught:
        watched.supervisor.start(sleeper(ports=(("127.0.0.1", port),)))
    assert f"port {port} on 127.0.0.1 is taken by " in caught.value.message
    assert f"(pid {os.getpid()})" in caught.value.message
    # One that was lost can be tried again under its name.
    watched.supervisor.start(sleeper(ports=(("127.0.0.1", port),)))
    assert watched.status("sleeper").state == "up"


def test_one_that_does_not_want_to_stop_is_killed(watched) -> None:
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('not me', flush=True))\n"
        "print('deaf', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    watched.supervisor.start(python("deaf", program, stop_s=3))
    until(lambda: said(watched, "deaf [|] deaf"), "the handler")
    pid = watched.status("deaf").pid
    watched.supervisor._keeper("deaf").stop()
    assert not alive(pid)
    until(lambda: said(watched, "not me"), "the signal that it did not obey")
    until(lambda: watched.kinds("deaf")[-1] == "stopped", "the event")
    assert watched.events[-1].exit_code == -signal.SIGKILL


def test_one_service_is_stopped_and_started_by_itself(watched) -> None:
    for name in ("one", "two"):
        watched.supervisor.start(sleeper(name))
    first, other = watched.status("one").pid, watched.status("two").pid
    watched.supervisor._keeper("one").stop()
    assert not alive(first)
    assert watched.status("one").state == "stopped"
    time.sleep(0.3)
    assert watched.status("one").pid is None, "a stopped service stays down"
    assert watched.status("two").pid == other
    watched.supervisor.start(sleeper("one"))
    assert watched.status("one").state == "up"
    assert watched.status("one").pid != first
    with pytest.raises(DeployError, match="runs already"):
        watched.supervisor.start(sleeper("one"))
    with pytest.raises(DeployError, match="no service 'three'") as caught:
        watched.supervisor.signal_one("three", signal.SIGTERM)
    assert "one" in (caught.value.hint or "")


def test_one_that_waits_to_be_started_again_can_be_stopped_at_once(watched) -> None:
    policy = RestartPolicy(first_pause_s=60, most_deaths=None)
    watched.supervisor.start(sleeper(restarts=policy))
    os.kill(watched.status("sleeper").pid, signal.SIGKILL)
    until(lambda: watched.status("sleeper").state == "pausing", "the pause")
    began = time.monotonic()
    watched.supervisor._keeper("sleeper").stop()
    assert time.monotonic() - began < 20, "it waited for the pause"
    assert watched.status("sleeper").state == "stopped"


# --- deaths ---------------------------------------------------------------------------------------


def test_kill_9_is_survived_and_takes_grandchildren_along(watched) -> None:
    watched.supervisor.start(python("parent", WITH_GRANDCHILD))
    grandchild, pid = grandchild_of(watched), watched.status("parent").pid
    assert alive(grandchild)
    assert os.getsid(grandchild) != os.getsid(pid), "it left its parent's session"
    os.kill(pid, signal.SIGKILL)
    until(lambda: watched.kinds("parent").count("ready") == 2, "the next life")
    assert [event.exit_code for event in watched.deaths("parent")] == [-signal.SIGKILL]
    assert not alive(grandchild)
    assert watched.kinds("parent")[-2:] == ["restarted", "ready"]
    assert watched.status("parent").restarts == 1
    assert watched.status("parent").pid not in (pid, None)


def test_ten_kills_leak_neither_descriptors_nor_threads(watched) -> None:
    watched.supervisor.start(sleeper())

    def kill_once() -> None:
        before = watched.status("sleeper")
        os.kill(before.pid, signal.SIGKILL)
        until(
            lambda: (
                watched.status("sleeper").restarts > before.restarts
                and watched.status("sleeper").state == "up"
            ),
            "the restart",
        )

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    kill_once()
    time.sleep(0.2)
    before = held()
    for _ in range(10):
        kill_once()
    assert len(watched.deaths("sleeper")) == 11
    # What is held for a moment (a record being written) goes by itself, and the test's own process
    # may open a file of its own once; a leak of each death is ten, and stays.
    until(lambda: all(now < was + 5 for now, was in zip(held(), before, strict=True)), "no leak")


def test_pauses_double_up_to_the_longest(watched) -> None:
    policy = RestartPolicy(first_pause_s=0.1, longest_pause_s=0.4, most_deaths=5)
    # It must have been up once, as one that never was is given up sooner.
    watched.supervisor.start(python("short", "import time; time.sleep(0.5)", restarts=policy))
    with pytest.raises(ServiceLostError):
        watched.supervisor.wait(60)
    pauses = [event.pause_s for event in watched.deaths("short")]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.4], rel=0.11)


def test_one_that_dies_too_often_is_given_up_in_words(watched) -> None:
    policy = RestartPolicy(first_pause_s=0.02, most_deaths=4)
    # It must be seen to have been up, which it is while it lives.
    program = "import sys, time; print('state.db is locked'); time.sleep(0.5); sys.exit(3)"
    watched.supervisor.start(sleeper("healthy"))
    watched.supervisor.start(python("link", program, restarts=policy))
    with pytest.raises(ServiceLostError) as caught:
        watched.supervisor.wait(60)
    message = caught.value.message
    assert "service link died 4 times" in message
    assert "exit code 3" in message
    assert "state.db is locked" in message
    assert len(watched.deaths("link")) == 3
    assert watched.status("link").state == "lost"
    assert watched.status("healthy").state == "up"


def test_after_a_good_while_deaths_are_forgotten(watched) -> None:
    policy = RestartPolicy(first_pause_s=0.05, forgotten_after_s=0.2, most_deaths=2)
    watched.supervisor.start(python("on-and-off", "import time; time.sleep(0.3)", restarts=policy))
    until(lambda: len(watched.deaths("on-and-off")) >= 3, "more deaths than would be too many")
    assert all(event.pause_s < 0.06 for event in watched.deaths("on-and-off"))


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [("sys.exit(7)", 7, "exit code 7"), ("os.kill(os.getpid(), 9)", -9, "killed by SIGKILL")],
)
def test_one_that_runs_to_its_end_is_not_started_again(watched, ends, code, words) -> None:
    service = python("loop", f"import os, sys; {ends}", once=True)
    for times in (1, 2):
        watched.supervisor.start(service)
        until(lambda: watched.status("loop").state == "stopped", "its end")
        assert watched.status("loop").exit_code == code
        assert watched.status("loop").detail == words
        told = ["started", "ready", "stopped"] * times
        until(lambda told=told: watched.kinds("loop") == told, "it is told")
    assert not watched.supervisor.wait(0.1), "it is no failure"


def test_one_that_hangs_is_started_anew(watched, home) -> None:
    """SIGSTOP: it lives, and does nothing."""
    beat = home / "beat"
    program = (
        f"import pathlib, time\n"
        f"while True:\n    pathlib.Path({str(beat)!r}).touch()\n    time.sleep(0.05)\n"
    )

    def beats() -> bool:
        return time.time() - beat.stat().st_mtime < 2.0

    watched.supervisor.start(python("heart", program, ready=beats, healthy=beats, silence_s=0.8))
    pid = watched.status("heart").pid
    time.sleep(4.5)
    assert watched.status("heart").pid == pid, "one that beats is left alone"
    os.kill(pid, signal.SIGSTOP)
    until(lambda: "unwell" in watched.kinds("heart"), "the alarm", 60)
    until(lambda: watched.status("heart").restarts == 1, "the restart", 60)
    until(lambda: watched.status("heart").state == "up", "the next life", 60)
    assert "it runs, but for" in watched.deaths("heart")[0].text
    assert not alive(pid)


def test_one_that_is_too_busy_to_answer_is_told_of_and_left_alone(watched, home) -> None:
    """A door in the middle of a transfer of hours: to end it would end the transfer."""
    free = home / "free"
    free.touch()
    work = "import time\nwhile True:\n    until = time.monotonic() + 0.02\n"
    work += "    while time.monotonic() < until: pass\n    time.sleep(0.05)\n"
    # A child does it, as of a server with workers.
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}])\n"
    service = python("door", program, ready=free.exists, healthy=free.exists, silence_s=0.4)
    watched.supervisor.start(service)
    pid = watched.status("door").pid
    free.unlink()
    until(lambda: "unwell" in watched.kinds("door"), "the alarm", 60)
    assert watched.status("door").state == "unwell"
    assert "it did not answer" in watched.status("door").detail
    assert "left alone while it works" in watched.events[-1].text
    # Far longer than one that does nothing is given.
    mark = watched.supervisor._mark

    def computed_s() -> float:
        return sum(map(tether.cpu_s, tether.marked(mark)))

    looked_s = computed_s()
    until(lambda: computed_s() > looked_s + 1.0, "work", 120)
    assert watched.status("door").pid == pid
    free.touch()
    # Told after it is so.
    until(lambda: watched.kinds("door")[-1:] == ["well"], "its answer", 60)
    assert watched.status("door").state == "up"
    assert watched.kinds("door") == ["started", "ready", "unwell", "well"]
    assert watched.status("door").pid == pid


def test_the_same_death_again_and_again_is_told_once_in_a_while() -> None:
    told: list[str] = []
    tell = troubles_to(told.append)
    for at, code in ((0.0, 96), (5.0, 96), (10.0, 96), (15.0, 1), (20.0, 96), (700.0, 96)):
        tell(ServiceEvent(at, "door", "died", f"died at {at:g}", exit_code=code))
        tell(ServiceEvent(at, "door", "restarted", "started again, pid 7"))
    assert told == [f"door: died at {at}" for at in (0, 15, 20, 700)]
    for _ in range(2):
        tell(ServiceEvent(701.0, "door", "ready", "up after 0.3 s"))
    assert told[4:] == ["door: again up after 0.3 s"]


# --- the end of the supervisor itself ------------------------------------------------------------

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


# --- one supervisor per home ----------------------------------------------------------------------


def test_a_second_supervisor_in_a_home_is_refused(watched, watch) -> None:
    watched.supervisor.start(sleeper())
    pid = watched.status("sleeper").pid
    assert runner(watched.home / "serve.json") == os.getpid()
    with pytest.raises(DeployError, match=rf"another Photon \(pid {os.getpid()}\)"):
        watch(watched.home).supervisor.__enter__()
    assert alive(pid)
    watched.supervisor.close()
    assert runner(watched.home / "serve.json") is None
    with watch(watched.home).supervisor:
        pass


def test_a_copy_of_a_home_is_another_home(watched, watch, short_folder) -> None:
    watched.supervisor.start(sleeper())
    pid = watched.status("sleeper").pid
    copy = short_folder("copy") / "home"
    until(lambda: "ready" in watched.kinds("sleeper"), "the last of the record's versions")
    shutil.copytree(watched.home, copy)
    # The record names a process that is not the copy's to end.
    record = copy / "serve.json"
    assert json.loads(record.read_text())["services"]["sleeper"]["pid"] == pid
    record.unlink()
    with watch(copy).supervisor:
        assert alive(pid)


def test_nobody_runs_in_a_home_that_is_not_there(tmp_path) -> None:
    assert runner(tmp_path / "none" / "serve.json") is None


def test_the_record_says_who_runs_and_is_removed_at_the_end(home) -> None:
    record = home / "serve.json"
    with Supervisor(record, home / "logs", facts={"desk_port": 4711}) as supervisor:
        supervisor.start(sleeper())
        until(lambda: "up" in record.read_text(), "the record")
        found = json.loads(record.read_text())
        assert found["pid"] == os.getpid()
        assert found["desk_port"] == 4711
        one = found["services"]["sleeper"]
        assert one["pid"] == supervisor.status()[0].pid
        assert one["birth"] == tether.birth(one["pid"])
        assert record.stat().st_mode & 0o777 == 0o600
    assert not record.exists()


# --- logs -----------------------------------------------------------------------------------------


def test_lines_of_all_services_are_merged_and_kept_apart(watched) -> None:
    watched.supervisor.start(
        python("one", "print('\\x1b[31mred\\x1b[0m alert'); input()", stop_s=0)
    )
    watched.supervisor.start(python("two", "import time; print('hello'); time.sleep(600)"))
    until(lambda: said(watched, r"^\d\d:\d\d:\d\d one \| red alert$"), "one's line")
    until(lambda: said(watched, r"^\d\d:\d\d:\d\d two \| hello$"), "two's line")
    assert said(watched, r"^\d\d:\d\d:\d\d two \| -- started, pid \d+$")
    log = (watched.home / "logs" / "two.log").read_text()
    assert "hello\n" in log
    assert "alert" not in log


def test_wording_shortens_or_leaves_out_a_line(watched) -> None:
    def wording(line: str) -> str | None:
        return None if line.startswith("debug") else line.upper()

    program = "import time; print('debug: x'); print('warn: y'); time.sleep(600)"
    watched.supervisor.start(python("one", program, wording=wording))
    until(lambda: said(watched, "WARN: Y"), "the line")
    assert not said(watched, "debug")
    assert "debug: x" in (watched.home / "logs" / "one.log").read_text()


def test_a_flood_fills_neither_the_disk_nor_memory_and_blocks_nobody(home, monkeypatch) -> None:
    """20 MB of lines into 200 kB of log, while nobody takes the merged lines."""
    monkeypatch.setattr(logs_module, "_MOST_BYTES", 200_000)
    stuck = threading.Event()
    done = home / "done"
    program = (
        "import os, time\n"
        "line = b'x' * 999 + b'\\n'\n"
        "for _ in range(20): os.write(1, line * 1000)\n"
        "os.write(1, b'y' * 300_000 + b'\\nlast words\\n')\n"
        f"open({str(done)!r}, 'w'); time.sleep(600)\n"
    )
    with Supervisor(home / "serve.json", home / "logs", log=lambda _: stuck.wait()) as supervisor:
        supervisor.start(python("flood", program))
        until(done.exists, "the last of 20 MB", 120)
        log = home / "logs" / "flood.log"
        # For a moment, while files change places, there is none of that name.
        until(lambda: "last words" in text_of(log), "the last line")
        sizes = [path.stat().st_size for path in (home / "logs").iterdir()]
        assert len(sizes) == 2
        assert 100_000 < sum(sizes) <= 200_000
        stuck.set()


def test_a_listener_that_raises_does_no_harm(home) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("the terminal went away")

    with Supervisor(home / "serve.json", home / "logs", log=broken, events=broken) as supervisor:
        supervisor.start(sleeper())
        os.kill(supervisor.status()[0].pid, signal.SIGKILL)
        until(lambda: supervisor.status()[0].restarts == 1, "the restart")
        until(lambda: supervisor.status()[0].state == "up", "the next life")
    assert "the terminal went away" in (home / "logs" / "sleeper.log").read_text()


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    log = BoundedLog(tmp_path / "logs" / "one.log")
    log.write("lost")
    log.close()


def test_a_herald_says_how_much_it_left_out() -> None:
    heard: list[str] = []
    gate = threading.Event()

    def slow(line: str) -> None:
        gate.wait()
        heard.append(line)

    herald = Herald(slow, most_lines=10)
    for number in range(100):
        herald.say(f"line {number}")
    gate.set()
    herald.close()
    kept = [line for line in heard if line.startswith("line")]
    assert kept[0] == "line 0"
    assert len(kept) in (10, 11)
    assert any(f"{100 - len(kept)} lines are not shown" in line for line in heard)


def test_words() -> None:
    assert exit_words(3) == "exit code 3"
    assert exit_words(-9) == "killed by SIGKILL"
    assert exit_words(-250) == "killed by signal 250"
    assert exit_words(None) == "it did not run"
    assert readable("a\x1b]0;title\x07b\x1b[2Jc\x00d\r") == "abcd"
    assert len(readable("x" * 5000)) == 1000
    assert merged_line("store", "up\r").endswith(" store | up")
    with pytest.raises(DeployError, match="letters, digits and hyphens"):
        Service("../door", ("sleep", "1"))


# --- what a service gets --------------------------------------------------------------------------


def test_a_service_has_the_environment_that_was_given_and_private_files(watched, home) -> None:
    program = (
        "import os, time\n"
        f"open({str(home / 'made')!r}, 'w')\n"
        "print(sorted(name for name in os.environ if name != 'LC_CTYPE'), os.getcwd())\n"
        "time.sleep(600)\n"
    )
    folder = home / "inside"
    folder.mkdir()
    watched.supervisor.start(python("one", program, environment={"A": "b"}, folder=folder))
    until(lambda: said(watched, f"'A', '{tether.MARK}'"), "its environment")
    assert said(watched, re.escape(f"['A', '{tether.MARK}'] {folder}"))
    assert (home / "made").stat().st_mode & 0o077 == 0


def test_supervising_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "import photon.deploy.supervisor, photon.deploy.certificates, photon.deploy.checks\n"
        "import photon.deploy.embedded_store, photon.deploy.front_door\n"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
