"""The recorder's clock and order, and a file that survives kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from photon.telemetry import JsonlWriter, Recorder, read_events
from photon.telemetry.events import CheckpointSaved


class Told:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def on_event(self, event):
        self.log.append((self.name, event))

    def close(self):
        self.log.append((self.name, "closed"))


def saved(number):
    return CheckpointSaved(round=number, bytes=1, save_s=0.5)


def test_listeners_are_told_in_order_with_the_same_stamp():
    log, now = [], [50.0]
    recorder = Recorder([Told(log, "a"), Told(log, "b")], clock=lambda: now[0])
    now[0] = 52.5
    recorder.emit(saved(1))
    recorder.close()
    (_, first), (_, second) = log[:2]
    assert [name for name, _ in log] == ["a", "b", "a", "b"]
    assert first is second
    assert first.time_s == 2.5
    assert log[2:] == [("a", "closed"), ("b", "closed")]


def test_a_resumed_run_goes_on_counting():
    log, now = [], [7.0]
    recorder = Recorder([Told(log, "a")], elapsed_s=100.0, clock=lambda: now[0])
    now[0] = 8.0
    recorder.emit(saved(1))
    assert log[0][1].time_s == 101.0
    assert recorder.elapsed_s == 101.0


def test_a_stamp_does_not_change_the_event_it_was_given():
    event = saved(1)
    Recorder([], elapsed_s=9.0).emit(event)
    assert event.time_s == 0.0


def test_a_line_is_on_disk_when_the_writer_returns(tmp_path):
    writer = JsonlWriter(tmp_path / "events.jsonl")
    for number in range(1, 4):
        writer.on_event(saved(number))
        assert [event.round for event in read_events(tmp_path)] == list(range(1, number + 1))
    writer.close()


@pytest.mark.parametrize("torn", [b'{"event":"checkpoint_sav', b"{", b"\xff\xfe\x00", b"nul\x00"])
def test_a_torn_line_costs_itself_only(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    writer = JsonlWriter(path)
    writer.on_event(saved(1))
    writer.close()
    path.write_bytes(path.read_bytes() + torn)
    again = JsonlWriter(path)
    again.on_event(saved(2))
    again.close()
    assert [event.round for event in read_events(tmp_path)] == [1, 2]
    assert path.read_bytes().endswith(b"\n")


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "events.jsonl"
    writer = JsonlWriter(path)
    writer.on_event(saved(1))
    writer.close()
    path.write_bytes(path.read_bytes()[:-1])
    again = JsonlWriter(path)
    again.on_event(saved(2))
    again.close()
    assert [event.round for event in read_events(tmp_path)] == [1, 2]


def test_a_clean_file_gets_no_blank_lines(tmp_path):
    for number in (1, 2):
        writer = JsonlWriter(tmp_path / "events.jsonl")
        writer.on_event(saved(number))
        writer.close()
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 2


def test_a_killed_process_leaves_every_event_it_was_told(tmp_path):
    code = (
        "import os, signal, sys, pathlib\n"
        "from photon.telemetry import JsonlWriter\n"
        "from photon.telemetry.events import CheckpointSaved\n"
        "writer = JsonlWriter(pathlib.Path(sys.argv[1]) / 'events.jsonl')\n"
        "for n in range(1, 6): writer.on_event(CheckpointSaved(round=n, bytes=1, save_s=0.1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [event.round for event in read_events(tmp_path)] == [1, 2, 3, 4, 5]
