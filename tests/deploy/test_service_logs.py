"""Lines of services: merged, kept apart, made printable, and bounded."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from service_programs import python, said, sleeper, until

from photon.deploy import logs as logs_module
from photon.deploy.logs import BoundedLog, Herald, merged_line, readable
from photon.deploy.service import Service, exit_words
from photon.deploy.supervisor import Supervisor
from photon.errors import DeployError


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


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
