"""Invariant 3: kill -9 at any moment, resume, identical weights. Real processes, real signals."""

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


@pytest.fixture(scope="module")
def run_file(three_silos, tmp_path_factory):
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
preset = "tiny"
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
max_tokens = 2000
"""
    )
    return path


def photon(*words, check=True, **options):
    command = [sys.executable, "-m", "photon.cli.main", *map(str, words)]
    return subprocess.run(command, check=check, capture_output=True, text=True, **options)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(run_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    photon("simulate", run_file, "--run-dir", folder, "--quiet")
    return summary_of(folder), state_hashes(folder)


def state_hashes(folder):
    """Hashes of everything a next round would start from."""
    state, groups, problems = CheckpointStore(folder / "checkpoints", 2).load_latest()
    assert not problems
    hashes = {name: tensors_sha256(tensors) for name, tensors in groups.items()}
    from photon.federation.node_state import read_node_state

    for silo, number in state.node_rounds.items():
        kept = read_node_state(folder / "nodes", silo, number)
        hashes[silo] = (kept.cursor, tensors_sha256(dict(kept.optimizer)))
    return hashes


def start(*words):
    command = [sys.executable, "-m", "photon.cli.main", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A suite started in the background inherits an ignored SIGINT; a person's shell does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


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
@pytest.mark.slow
def test_kill_at_chosen_and_random_moments(run_file, undisturbed, tmp_path, workers):
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
        code = kill_after(start(*words), folder, event, number, delay_s)
        assert code == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
        words = ["resume", folder, "--quiet"]
    photon("resume", folder, "--quiet")
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


@pytest.mark.slow
def test_killed_workers_are_replaced_and_change_nothing(run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = start(
        "simulate", run_file, "--run-dir", folder, "--quiet", "--set", "federation.workers=2"
    )
    killed = 0
    seen = 0
    while process.poll() is None and killed < 2:
        path = folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        fresh = [line for line in lines[seen:] if '"local_progress"' in line]
        seen = len(lines)
        if fresh:
            workers = workers_of(process.pid)
            if workers:
                os.kill(workers[killed % len(workers)], signal.SIGKILL)
                killed += 1
                time.sleep(1.0)
        time.sleep(0.02)
    assert process.wait(timeout=120) == 0
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


def test_workers_die_with_a_killed_aggregator(run_file, tmp_path):
    folder = tmp_path / "run"
    process = start(
        "simulate", run_file, "--run-dir", folder, "--quiet", "--set", "federation.workers=2"
    )
    deadline = time.monotonic() + 60
    workers = []
    while len(workers) < 2:
        assert time.monotonic() < deadline, "no two workers within 60 s"
        assert process.poll() is None
        workers = workers_of(process.pid)
        time.sleep(0.02)
    process.kill()
    process.wait()
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline + 30, "workers outlived the aggregator"
        time.sleep(0.05)


def test_ctrl_c_is_resumable(run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = start("simulate", run_file, "--run-dir", folder, "--quiet")
    path = folder / "events.jsonl"
    while not (path.exists() and '"round":2,' in path.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert '"run_stopped"' in path.read_text()
    photon("resume", folder, "--quiet")
    assert summary_of(folder)["weights_sha256"] == undisturbed[0]["weights_sha256"]


def test_a_second_process_is_refused(run_file, tmp_path):
    folder = tmp_path / "run"
    process = start("simulate", run_file, "--run-dir", folder, "--quiet")
    try:
        while not (folder / "checkpoints").exists():
            assert process.poll() is None
            time.sleep(0.01)
        second = photon("resume", folder, "--quiet", check=False)
        assert process.poll() is None, "the first process ended too early for this test"
        assert second.returncode == 46, second.stderr
        assert "another process is working" in second.stderr
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_stops_resumably(run_file, undisturbed, tmp_path):
    """The kernel refuses writes beyond a size limit: the run stops, then goes on without it."""
    folder = tmp_path / "run"
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "from photon.cli.main import main\n"
        "sys.argv = ['photon'] + sys.argv[1:]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "simulate", run_file, "--run-dir", folder, "--quiet"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 51, done.stderr
    assert "no room" in done.stderr
    assert not list(folder.rglob("*.partial"))
    photon("resume", folder, "--quiet")
    assert summary_of(folder)["weights_sha256"] == undisturbed[0]["weights_sha256"]
