"""Services are started in order and stopped in reverse, by one supervisor for each home."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from service_programs import FINITE, alive, python, said, sleeper, until

from photon.deploy import tether
from photon.deploy.ports import free_ports
from photon.deploy.service import RestartPolicy, Service
from photon.deploy.supervisor import Supervisor, runner
from photon.errors import DeployError, PortInUseError, ServiceLostError

# --- starting and stopping ---


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


# --- one supervisor per home ---


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


# --- what a service gets ---


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
