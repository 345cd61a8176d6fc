"""Invariant 3: kill -9 at any moment, resume, identical weights. Real processes, real signals."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from photon.federation import CheckpointStore
from photon.link import tensors_sha256
from photon.telemetry import read_history
from photon.telemetry.events import RoundFinished, RunStarted

ROUNDS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_file(three_silos, small_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("kill") / "run.toml"
    path.write_text(
        f"""
[run]
name = "kill"
seed = 3
log_every = 1
[compute]
threads = 1

[model]
path = "{small_model}"
[data]
path = "{three_silos}"
sequence_length = 32
[federation]
rounds = {ROUNDS}
optimizer_state = "keep"
[local]
steps = 4
batch_size = 4
optimizer = "muon"
lr = 1e-2
[outer]
name = "nesterov"
lr = 0.7
[eval]
max_tokens = 600
"""
    )
    return path


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(run_file, tmp_path_factory):
    """Started by the interpreter; the others are forked from one that has imported Photon."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "photon.cli.main", "simulate", run_file, "--quiet"]
    subprocess.run([*map(str, command), "--run-dir", str(folder)], check=True)
    return summary_of(folder), state_hashes(folder)


def state_hashes(folder):
    """Hashes of everything a next round would start from."""
    state, groups, problems = CheckpointStore(folder / "checkpoints", 2).load_latest()
    assert not problems
    hashes = {name: tensors_sha256(tensors) for name, tensors in groups.items()}
    hashes["cursors"] = str(state.cursors)
    from photon.federation.node_state import read_node_state

    for silo, number in state.node_rounds.items():
        kept = read_node_state(folder / "nodes", silo, number)
        hashes[silo] = tensors_sha256(dict(kept))
    return hashes


def kill_after(process, folder, event, number, delay_s):
    """SIGKILL the process `delay_s` after the given event of the given round is on disk."""
    deadline = time.monotonic() + 120
    needle = f'"event":"{event}"'
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended by itself before {event} of round {number}"
        path = folder / "events.jsonl"
        text = path.read_text() if path.exists() else ""
        if any(needle in line and f'"round":{number},' in line for line in text.splitlines()):
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
            return process.wait()
        time.sleep(0.01)
    raise AssertionError(f"no {event} of round {number} within 120 s")


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_at_chosen_and_random_moments(photon, run_file, undisturbed, tmp_path, workers):
    """Kills in one run, in different phases; the result is the undisturbed one's."""
    folder = tmp_path / "run"
    draw = random.Random(workers)
    moments = [
        ("round_started", 1, 0.0),
        ("local_progress", 3, draw.uniform(0.0, 0.1)),
        ("round_merged", 4, draw.uniform(0.0, 0.05)),
        ("evaluated", 5, draw.uniform(0.0, 0.05)),
    ]
    if workers:  # each start takes seconds, and phases are those of the aggregator
        moments = moments[1:3]
    words = ["simulate", run_file, "--run-dir", folder, "--quiet"]
    words += ["--set", f"federation.workers={workers}"]
    for event, number, delay_s in moments:
        code = kill_after(photon(*words), folder, event, number, delay_s)
        assert code == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
        words = ["resume", folder, "--quiet"]
    assert photon("resume", folder, "--quiet").wait() == 0
    summary, hashes = undisturbed
    resumed = summary_of(folder)
    assert resumed["weights_sha256"] == summary["weights_sha256"]
    assert resumed["global_loss"] == summary["global_loss"]
    for key in ("tokens", "bytes_up", "bytes_down", "rounds", "per_silo"):
        assert resumed[key] == summary[key], key
    assert state_hashes(folder) == hashes
    history = read_history(folder)
    resumes = [event for event in history.of(RunStarted) if event.resumed_from_round is not None]
    assert len(resumes) >= 1
    rounds = [event.round for event in history.of(RoundFinished)]
    assert rounds == sorted(set(rounds))
    assert not (folder / "exchange").exists()


def test_kill_at_random_moments_of_nested_rounds(photon, run_file, tmp_path):
    """A group in a group: kills fall into rounds of any level."""
    nested = tmp_path / "nested.toml"
    groups = """
[federation.children.west]
silos = ["red"]
rounds = 2
outer = {name = "nesterov"}
update_codec = "int8"
[federation.children.west.children.coast]
silos = ["blue", "green"]
rounds = 2
"""
    nested.write_text(run_file.read_text() + groups)
    words = ["simulate", nested, "--quiet", "--run-dir"]
    assert photon(*words, tmp_path / "whole").wait() == 0
    whole = summary_of(tmp_path / "whole")
    rounds = read_history(tmp_path / "whole").of(RoundFinished)
    folder = tmp_path / "run"
    draw = random.Random(5)
    words.append(folder)
    for number in (2, 3, 4, 5):
        delay_s = draw.uniform(0.0, rounds[number - 1].round_s)
        code = kill_after(photon(*words), folder, "round_started", number, delay_s)
        assert code == -signal.SIGKILL
        words = ["resume", folder, "--quiet"]
    assert photon(*words).wait() == 0
    resumed = summary_of(folder)
    for key in ("weights_sha256", "tokens", "bytes_up", "bytes_down", "bytes_inside"):
        assert resumed[key] == whole[key], key
    kept = kept_by_nodes(tmp_path / "whole")
    assert {path.split("/")[1] for path in kept} >= {"red", "blue", "green", "west", "coast"}
    assert kept_by_nodes(folder) == kept


def kept_by_nodes(folder):
    """Hashes of tensors; what lies beside them has times in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "nodes").rglob("*")
        if path.suffix in (".safetensors", ".distcp")
    }


def test_killed_workers_are_replaced_and_change_nothing(photon, run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = photon(
        "simulate", run_file, "--run-dir", folder, "--quiet", "--set", "federation.workers=2"
    )
    killed = 0
    seen = 0
    while process.poll() is None and killed < 2:
        path = folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        fresh = [line for line in lines[seen:] if '"local_progress"' in line]
        seen = len(lines)
        missed = sum('"worker_lost"' in line for line in lines)
        if fresh and missed == killed:  # the second one dies when the first one is replaced
            workers = workers_of(process.pid)
            if workers:
                os.kill(workers[killed % len(workers)], signal.SIGKILL)
                killed += 1
        time.sleep(0.01)
    assert process.wait() == 0
    assert killed == 2
    lost = [
        line for line in (folder / "events.jsonl").read_text().splitlines() if "worker_lost" in line
    ]
    assert lost
    assert summary_of(folder)["weights_sha256"] == undisturbed[0]["weights_sha256"]


def workers_of(pid):
    """Worker processes of an aggregator: what its fork server started."""
    return [
        worker for server in children(pid) if is_fork_server(server) for worker in children(server)
    ]


def is_fork_server(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"multiprocessing.forkserver" in file.read()


def children(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found


def test_workers_die_with_a_killed_aggregator(photon, run_file, tmp_path):
    folder = tmp_path / "run"
    words = ["simulate", run_file, "--run-dir", folder, "--quiet", "--set", "federation.workers=2"]
    process = photon(*words, starts_fork_server=True)
    deadline = time.monotonic() + 180
    workers = []
    while len(workers) < 2:
        assert time.monotonic() < deadline, "no two workers within 180 s"
        assert process.poll() is None
        workers = workers_of(process.pid)
        time.sleep(0.02)
    process.kill()
    process.wait()
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline + 60, "workers outlived the aggregator"
        time.sleep(0.05)


def test_ctrl_c_is_resumable(photon, run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = photon("simulate", run_file, "--run-dir", folder, "--quiet")
    path = folder / "events.jsonl"
    while not (path.exists() and '"round":2,' in path.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert '"run_stopped"' in path.read_text()
    assert photon("resume", folder, "--quiet").wait() == 0
    assert summary_of(folder)["weights_sha256"] == undisturbed[0]["weights_sha256"]


def test_a_second_process_is_refused(photon, run_file, tmp_path):
    folder = tmp_path / "run"
    process = photon("simulate", run_file, "--run-dir", folder, "--quiet")
    try:
        while not (folder / "checkpoints").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # it keeps its lock, and doesn't end before the other
        second = photon("resume", folder, "--quiet")
        code = second.wait()
        assert process.poll() is None, "the first process ended too early for this test"
        assert code == 46, second.stderr
        assert "another process is working" in second.stderr
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_stops_resumably(photon, run_file, undisturbed, tmp_path):
    """The kernel refuses writes beyond a size limit: the run stops, then goes on without it."""
    folder = tmp_path / "run"
    words = ("simulate", run_file, "--run-dir", folder, "--quiet")
    done = photon(*words, file_limit_bytes=100_000)
    assert done.wait() == 51, done.stderr
    assert "no room" in done.stderr
    assert not list(folder.rglob("*.partial"))
    assert photon("resume", folder, "--quiet").wait() == 0
    assert summary_of(folder)["weights_sha256"] == undisturbed[0]["weights_sha256"]
