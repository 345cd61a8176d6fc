"""Deaths of services: each is survived, told of, and at some number given up."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from service_programs import WITH_GRANDCHILD, alive, grandchild_of, python, sleeper, until

from photon.deploy import tether
from photon.deploy.service import RestartPolicy, ServiceEvent, troubles_to
from photon.errors import ServiceLostError


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
