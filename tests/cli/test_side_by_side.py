"""Runs side by side are the runs they are alone; they stop together and can be taken up again."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from photon.cli.bars import run_bars
from photon.cli.side_by_side import Training, train_side_by_side
from photon.config import write_resolved
from photon.errors import EmptySiloError
from photon.runs import train

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "programs" / "side_by_side.py"


def summary_of(folder: Path):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def eight_rounds(forks, three_silos, make_config, tmp_path_factory):
    """A configuration, and what "blue" and "red" come to with it, each alone in this process."""
    config = make_config(three_silos, "federation.rounds=8", "eval.every=8")
    folder = tmp_path_factory.mktemp("alone")
    ends = {silo: train(config, silos=[silo], run_dir=folder / silo) for silo in ("blue", "red")}
    return config, {silo: end.summary for silo, end in ends.items()}


def has_begun(folder: Path) -> bool:
    events = folder / "events.jsonl"
    return events.exists() and '"round_finished"' in events.read_text()


def test_each_run_is_the_run_it_is_alone_and_is_shown_by_name(eight_rounds, tmp_path):
    """Two at a time, the third when one of them is over."""
    config, ends = eight_rounds
    silos = {"first": "blue", "second": "red", "third": "red"}
    shown = io.StringIO()
    trainings = [Training(tmp_path / name, config, (silo,)) for name, silo in silos.items()]
    with run_bars(Console(file=shown, width=200), {name: f"alone: {name}" for name in silos}) as by:
        listeners = {tmp_path / name: by[name] for name in silos}
        train_side_by_side(trainings, at_once=2, listeners=listeners)
    for name, silo in silos.items():
        for key in ("weights_sha256", "global_loss", "tokens"):
            assert summary_of(tmp_path / name)[key] == ends[silo][key]
    lines = shown.getvalue().splitlines()
    assert all(line.startswith("alone: ") for line in lines)
    for name in silos:
        assert sum(line.startswith(f"alone: {name}: run finished") for line in lines) == 1


def test_a_run_that_fails_stops_the_others(eight_rounds, make_config, tmp_path):
    """The one that fails begins when the first is over, in the middle of the second."""
    config, _ = eight_rounds
    long = make_config(Path(config.data.path), "federation.rounds=2000", "eval.every=2000")
    trainings = [
        Training(tmp_path / "short", config, ("blue",)),
        Training(tmp_path / "long", long, ("red",)),
        Training(tmp_path / "wrong", config, ("nobody",)),
    ]
    with pytest.raises(EmptySiloError, match="nobody"):
        train_side_by_side(trainings, at_once=2, listeners={})
    assert (tmp_path / "short" / "summary.json").exists()
    assert has_begun(tmp_path / "long")
    assert '"run_stopped"' in (tmp_path / "long" / "events.jsonl").read_text()
    assert not (tmp_path / "long" / "summary.json").exists()
    assert not running(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_runs_leave_no_process_and_end_as_if_never_stopped(
    forks, eight_rounds, tmp_path, how
):
    """Ctrl-C is written down by each run; after kill -9 of their starter the runs end as well."""
    config, ends = eight_rounds
    write_resolved(config, tmp_path / "run.toml")
    out = tmp_path / "out"
    words = [str(PROGRAM), str(tmp_path / "run.toml"), str(out), "blue", "red"]
    given = {"argv": words, "environment": {}, "out": str(tmp_path / "o"), "error": "/dev/null"}
    seated = Path(__file__).parents[1] / "training" / "programs" / "seated.py"
    starter = forks.Process(target=runpy.run_path, args=(str(seated), given, "__main__"))
    starter.start()
    deadline = time.monotonic() + 150
    while not all(has_begun(out / silo) for silo in ends):
        assert starter.exitcode is None, "ended before both had begun"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(starter.pid, how)
    starter.join(60)
    assert starter.exitcode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    while running(out):
        assert time.monotonic() < deadline, "a run outlived its starter"
        time.sleep(0.05)
    stopped = [silo for silo in ends if not (out / silo / "summary.json").exists()]
    assert stopped
    if how == signal.SIGINT:
        for silo in stopped:
            assert '"run_stopped"' in (out / silo / "events.jsonl").read_text()
    trainings = [Training(out / silo, config, (silo,)) for silo in ends]
    train_side_by_side(trainings, at_once=2, listeners={})
    for silo, end in ends.items():
        assert summary_of(out / silo)["weights_sha256"] == end["weights_sha256"]


def running(folder: Path) -> list[int]:
    """Processes that hold a file below the folder open: a run does its lock and its events."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(path.startswith(f"{folder}/") for path in held):
            found.append(int(process.name))
    return found
