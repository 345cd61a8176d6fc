"""Ranks that Photon starts itself, from the command line: training on, profiling."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import write_resolved
from photon.telemetry import read_history
from photon.telemetry.events import ComputeChosen, Evaluated, LocalFinished

pytestmark = pytest.mark.slow


def photon(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_training_goes_on_from_a_model_folder_on_two_ranks(three_silos, make_config, tmp_path):
    """Export, then continued pre-training under FSDP2: it starts where the export stood."""
    config = make_config(three_silos, "federation.rounds=2")
    write_resolved(config, tmp_path / "run.toml")
    photon("simulate", tmp_path / "run.toml", "--run-dir", tmp_path / "first", "--quiet")
    photon("export", tmp_path / "first", "--out", tmp_path / "model")
    config = make_config(three_silos, "federation.rounds=2", "local.optimizer=muon")
    model = {"path": str(tmp_path / "model"), "init": "pretrained", "preset": None}
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    write_resolved(config, tmp_path / "more.toml")
    photon(
        "simulate",
        tmp_path / "more.toml",
        "--run-dir",
        tmp_path / "second",
        "--set",
        "compute.processes=2",
        "--set",
        "compute.strategy=fsdp",
        "--quiet",
    )
    before = json.loads((tmp_path / "first/summary.json").read_text())
    history = read_history(tmp_path / "second")
    scores = [event.loss for event in history.of(Evaluated) if event.silo is None]
    assert scores[0] == pytest.approx(before["global_loss"], rel=1e-5)
    assert scores[-1] < scores[0] - 0.01
    (chosen,) = history.of(ComputeChosen)
    assert (chosen.ranks, chosen.strategy) == (2, "fsdp")
    for event in history.of(LocalFinished):
        assert event.forward_s > 0
        assert event.micro_batch_size == 2  # half of the batch of four on each rank


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_tells_where_time_and_memory_go(three_silos, make_config, tmp_path, ranks):
    write_resolved(make_config(three_silos, preset="tiny"), tmp_path / "run.toml")
    words = ["profile", tmp_path / "run.toml", "--steps", "3", "--json"]
    result = photon(*words, "--set", f"compute.processes={ranks}")
    told = json.loads(result.stdout)
    assert told["ranks"] == ranks
    assert told["strategy"] == ("single" if ranks == 1 else "ddp")
    assert 0 < sum(told["phases_s"].values()) <= told["step_s"]
    assert told["tokens_per_s"] == pytest.approx(4 * 32 / told["step_s"], rel=1e-6)
    assert (told["communication_s"] > 0) == (ranks == 2)
    assert told["mfu"] is None  # no peak is stated for a CPU
    assert told["estimated_memory_bytes"] > 1e8
    assert told["flops_per_token"] > 6 * 700_000
    assert not list(tmp_path.glob("runs"))
    if ranks == 1:
        table = photon(*words[:-1]).output
        assert "forward" in table
        assert "6 x" in table
