"""TensorBoard files, read back with TensorBoard's own reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from photon.telemetry.events import RunStopped, UpdateDropped
from photon.telemetry.tensorboard import BY_TOKENS, TensorBoardWriter


def scalars(folder):
    """Tag to [(step, value)], as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(point.step, pytest.approx(point.value)) for point in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def write(folder, events):
    writer = TensorBoardWriter(folder)
    for event in events:
        writer.on_event(event)
    writer.close()


def test_the_tags_steps_and_values_of_a_run(tmp_path, begin, one_round, evaluation):
    events = [begin(), evaluation(0, 9.0), *one_round(1), *one_round(2)]
    write(tmp_path, [*events, UpdateDropped(round=2, silo="north", reason="?")])
    shown = scalars(tmp_path)
    assert shown["train/loss/north"] == [(i, 9.0) for i in range(1, 5)] + [
        (i, 8.0) for i in range(5, 9)
    ]
    assert shown["train/loss/south"] == shown["train/loss/north"]
    assert shown["train/lr"] == [(i, 0.1 / i) for i in range(1, 9)]  # Once, not once per silo.
    assert shown["eval/loss"] == [(0, 9.0), (4, 8.0), (8, 7.0)]
    assert shown["eval/perplexity"] == [(0, 90.0), (4, 80.0), (8, 70.0)]
    assert shown["eval/bits_per_byte"] == [(0, 4.5), (4, 4.0), (8, 3.5)]
    assert shown["eval/perplexity/south"] == [(4, 80.0), (8, 70.0)]
    assert shown["round/bytes_up"] == [(4, 80.0), (8, 80.0)]
    assert shown["round/train_loss"] == [(4, 9.0), (8, 8.0)]
    assert shown["round/participants"] == [(0, 2.0), (4, 2.0)]
    assert shown["total/tokens"] == [(4, 2000.0), (8, 4000.0)]
    assert shown["time/round_s"] == [(4, 5.0), (8, 5.0)]
    assert {f"time/{name}_s" for name in ("local_train", "eval", "merge", "checkpoint")} <= set(
        shown
    )
    tokens = scalars(tmp_path / BY_TOKENS)
    assert tokens["eval_by_tokens/loss"] == [(0, 9.0), (2000, 8.0), (4000, 7.0)]
    assert tokens["eval_by_tokens/perplexity/north"] == [(2000, 80.0), (4000, 70.0)]


def test_a_resumed_run_shows_no_step_twice(tmp_path, begin, one_round, evaluation):
    first = [begin(), evaluation(0, 9.0), *one_round(1), *one_round(2), *one_round(3)]
    write(tmp_path, [*first, RunStopped(round=4, reason="?")])
    write(tmp_path, [begin(resumed_from_round=1), *one_round(2, 0.5), *one_round(3, 0.5)])
    shown = scalars(tmp_path)
    steps = [step for step, _ in shown["train/loss/north"]]
    assert steps == list(range(1, 13))
    assert shown["eval/loss"] == [(0, 9.0), (4, 8.0), (8, 7.5), (12, 6.5)]
    assert shown["time/round_s"] == [(4, 5.0), (8, 5.0), (12, 5.0)]
    assert shown["train/lr"] == [(i, 0.1 / i) for i in range(1, 13)]
    tokens = scalars(tmp_path / BY_TOKENS)
    assert tokens["eval_by_tokens/loss"] == [(0, 9.0), (2000, 8.0), (4000, 7.5), (6000, 6.5)]
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 2


def test_resuming_within_the_same_second_keeps_the_files_in_order(
    tmp_path, begin, one_round, monkeypatch
):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    write(tmp_path, [begin(), *one_round(1), *one_round(2)])
    for shift in (0.1, 0.2):
        write(tmp_path, [begin(resumed_from_round=1), *one_round(2, shift)])
    stamps = [path.name.split(".")[3] for path in sorted(tmp_path.glob("events.*"))]
    assert stamps == ["1800000000", "1800000001", "1800000002"]
    assert scalars(tmp_path)["eval/loss"] == [(4, 8.0), (8, 7.2)]


def test_a_killed_run_keeps_its_finished_rounds(tmp_path, begin, one_round):
    code = (
        "import os, pickle, signal, sys, pathlib\n"
        "from photon.telemetry.tensorboard import TensorBoardWriter\n"
        "writer = TensorBoardWriter(pathlib.Path(sys.argv[1]))\n"
        "for event in pickle.loads(sys.stdin.buffer.read()): writer.on_event(event)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    import pickle

    events = [begin(), *one_round(1), *one_round(2), *list(one_round(3))[:4]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        input=pickle.dumps(events),
        env=environment,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert scalars(tmp_path)["eval/loss"] == [(4, 8.0), (8, 7.0)]
    assert scalars(tmp_path / BY_TOKENS)["eval_by_tokens/loss"] == [(2000, 8.0), (4000, 7.0)]
    write(tmp_path, [begin(resumed_from_round=2), *one_round(3)])
    assert scalars(tmp_path)["eval/loss"] == [(4, 8.0), (8, 7.0), (12, 6.0)]


def test_a_figure_that_is_no_number_is_left_out(tmp_path, begin, evaluation):
    write(tmp_path, [begin(), evaluation(0, float("inf")), evaluation(1, float("nan"))])
    assert "eval/loss" not in scalars(tmp_path)
    write(tmp_path, [begin(), evaluation(1, float("nan")), evaluation(2, 3.0)])
    assert scalars(tmp_path)["eval/loss"] == [(8, 3.0)]


def test_nothing_is_made_before_the_first_event(tmp_path):
    TensorBoardWriter(tmp_path / "tensorboard").close()
    assert not (tmp_path / "tensorboard").exists()


def test_neither_torch_nor_tensorflow_is_needed(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from photon.telemetry.tensorboard import TensorBoardWriter\n"
        "from photon.telemetry.events import RoundStarted\n"
        "assert 'tensorboard' not in sys.modules\n"
        "writer = TensorBoardWriter(pathlib.Path(sys.argv[1]))\n"
        "writer.on_event(RoundStarted(round=1, global_step=0, participants=['a']))\n"
        "assert not {'torch', 'tensorflow', 'grpc'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True)
