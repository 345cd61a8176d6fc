"""torchrun starts the ranks; rank 0 keeps the run and speaks, the others follow."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from photon.config import write_resolved
from photon.runs import simulate, train

pytestmark = pytest.mark.slow


PROGRAM = Path(__file__).parent / "programs" / "torchrun.py"
SEATED = Path(__file__).parents[1] / "training" / "programs" / "seated.py"


def port_option():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"--master-port={listener.getsockname()[1]}"


def launch(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [port_option(), "-m", "photon.cli.main", *map(str, words)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout_s=200):
    try:
        out, error = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, error


@pytest.fixture
def start(forks, tmp_path_factory):
    """Starts it as `launch` does, but forked, its ranks too: none of the three imports anything."""

    def start(*words):
        folder = tmp_path_factory.mktemp("torchrun")
        given = {
            "argv": [str(PROGRAM), port_option(), *map(str, words)],
            "environment": {},
            "out": str(folder / "out"),
            "error": str(folder / "error"),
        }
        process = forks.Process(target=runpy.run_path, args=(str(SEATED), given, "__main__"))
        process.start()
        return process, folder

    return start


def ended(process, folder, timeout_s=200):
    """As `finish`, of what `start` started."""
    try:
        process.join(timeout_s)
        code = process.exitcode
    finally:
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return code, (folder / "out").read_text(), (folder / "error").read_text()


RECIPE = ("local.optimizer=muon", "local.lr=1e-2", "federation.optimizer_state=keep")


@pytest.mark.parametrize(("kind", "strategy"), [("simulate", "fsdp"), ("train", "ddp")])
def test_a_run_under_torchrun_is_the_run_of_one_process(
    start, three_silos, make_config, tmp_path, kind, strategy
):
    """Of `train` as a user starts it."""
    config = make_config(three_silos, *RECIPE)
    alone = {"simulate": simulate, "train": train}[kind](config, run_dir=tmp_path / "alone").summary
    write_resolved(config, tmp_path / "run.toml")
    words = [kind, tmp_path / "run.toml", "--run-dir", tmp_path / "pair"]
    words += ["--set", f"compute.strategy={strategy}", "--json"]
    code, out, error = finish(launch(*words)) if kind == "train" else ended(*start(*words))
    assert code == 0, error[-3000:]
    told = json.loads(out)  # one JSON object: only rank 0 speaks
    assert told["tokens"] == alone["tokens"]
    assert told["global_loss"] == pytest.approx(alone["global_loss"], rel=1e-4)
    assert f"trains with {strategy} on two ranks" in error
    events = (tmp_path / "pair/events.jsonl").read_text().splitlines()
    assert sum('"event":"run_started"' in line for line in events) == 1


def test_a_killed_rank_ends_the_run_and_a_resume_goes_on(start, three_silos, make_config, tmp_path):
    """torchrun ends the others; the newest checkpoint stands, and two ranks or one go on."""
    more = ("federation.rounds=6", "run.log_every=1")
    config = make_config(three_silos, *RECIPE, *more)
    alone = simulate(config, run_dir=tmp_path / "alone").summary
    write_resolved(config, tmp_path / "run.toml")
    folder = tmp_path / "pair"
    more = ("--run-dir", folder, "--set", "compute.strategy=fsdp", "--quiet")
    process, told = start("simulate", tmp_path / "run.toml", *more)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints/round-000001").exists():
        assert process.is_alive(), (told / "error").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim = follower_of(process.pid)
    os.kill(victim, signal.SIGKILL)
    code, _, error = ended(process, told)
    assert code != 0
    assert "rank" in error
    assert not (folder / "summary.json").exists()
    code, _, error = ended(*start("resume", folder, "--quiet"))
    assert code == 0, error[-3000:]
    resumed = json.loads((folder / "summary.json").read_text())
    assert resumed["tokens"] == alone["tokens"]
    assert resumed["global_loss"] == pytest.approx(alone["global_loss"], rel=1e-4)


def follower_of(launcher: int) -> int:
    """Process id of rank 1, the launcher's youngest child."""
    children = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher:
                children.append(int(entry.name))
    return max(children)
