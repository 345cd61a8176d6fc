"""Merging rules inside real rounds: they finish, refuse by name, and survive a resume."""

import math
import tempfile

import pytest
import torch

from photon.config.run import MERGING_RULE_NAMES
from photon.engines.local import LocalEngine
from photon.federation.checkpoint import CheckpointStore
from photon.runs import resume, session, simulate
from photon.telemetry import read_history
from photon.telemetry.events import RoundMerged, UpdateDropped

NEEDS = {
    "clipped_mean": ["federation.clip_update_norm=0.5"],
    "trimmed_mean": ["federation.trim=0.4"],
}


def disturb(monkeypatch, silo, *, shift=(), interrupt=()):
    """Move one silo's model far away, or stop the process, before local steps of these rounds.

    Returns the rounds in which either fired.
    """
    fired = []
    build = LocalEngine.__init__

    def hook(task, trainer):
        if task.silo != silo:
            return
        if task.round in interrupt:
            fired.append(task.round)
            raise KeyboardInterrupt
        if task.round in shift:
            fired.append(task.round)
            with torch.no_grad():
                next(iter(trainer.optimizer.parameters.values())).add_(5.0)

    def with_fault(self, node):
        node._fault = hook
        build(self, node)

    monkeypatch.setattr(LocalEngine, "__init__", with_fault)
    return fired


def rule_state(folder):
    _, groups, _ = CheckpointStore(folder / "checkpoints", keep=2).load_latest()
    return groups.get("rule")


@pytest.mark.parametrize("rule", MERGING_RULE_NAMES)
def test_a_run_finishes_with_each_rule(rule, three_silos, make_config, tmp_path):
    chosen = [f"federation.merging_rule={rule}", *NEEDS.get(rule, [])]
    config = make_config(three_silos, "federation.rounds=2", "eval.per_silo=false", *chosen)
    summary = simulate(config, run_dir=tmp_path / "run").summary
    assert math.isfinite(summary["global_loss"])
    merged = read_history(tmp_path / "run").of(RoundMerged)
    assert [len(event.participants) for event in merged] == [3, 3]
    assert all(event.pseudo_gradient_norm > 0 for event in merged)
    if rule == "clipped_mean":
        assert all(event.pseudo_gradient_norm <= 0.5 + 1e-5 for event in merged)
    assert (rule_state(tmp_path / "run") is not None) == (rule == "edit")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["federation.max_update_norm=50"], "exceeds federation.max_update_norm = 50"),
        (["federation.merging_rule=median"], "2 times what 4 steps of this recipe can move"),
        (["federation.merge=adopt"], "2 times what 4 steps of this recipe can move"),
        (["local.optimizer=sgd", "local.clip_norm=0"], "10 times the median of what round"),
    ],
)
def test_an_oversize_update_is_dropped_by_name(
    chosen, words, three_silos, make_config, tmp_path, monkeypatch
):
    """By default too; and after an interruption the same is decided."""
    config = make_config(three_silos, "eval.every=0", *chosen)
    with monkeypatch.context() as patch:
        fired = disturb(patch, "green", shift={2}, interrupt={3})
        with pytest.raises(KeyboardInterrupt):
            simulate(config, run_dir=tmp_path / "run")
        assert fired == [2, 3]
    with monkeypatch.context() as patch:
        fired = disturb(patch, "green", shift={3})
        resume(tmp_path / "run")
        assert fired == [3]
    history = read_history(tmp_path / "run")
    dropped = history.of(UpdateDropped)
    assert [(event.round, event.silo) for event in dropped] == [(2, "green"), (3, "green")]
    assert all(event.reason.startswith("its norm ") and words in event.reason for event in dropped)
    merged = {event.round: event.participants for event in history.of(RoundMerged)}
    assert merged == {1: ["blue", "green", "red"], 2: ["blue", "red"], 3: ["blue", "red"]}


def test_updates_that_wait_lie_in_the_run_folder_and_room_for_them_is_looked_for(
    three_silos, make_config, tmp_path, monkeypatch
):
    asked, require = [], session.require_disk
    monkeypatch.setattr(
        session,
        "require_disk",
        lambda folder, needed, what: asked.append(needed) or require(folder, needed, what),
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    for rule in ("mean", "median"):
        config = make_config(
            three_silos, f"federation.merging_rule={rule}", "federation.rounds=1", "eval.every=0"
        )
        simulate(config, run_dir=tmp_path / rule)
    parameters = read_history(tmp_path / "median").started.parameters
    mean_bytes, median_bytes = asked
    assert median_bytes - mean_bytes == 4 * 3 * parameters


def test_one_participant_adopted_through_the_median_is_itself(one_silo, make_config, tmp_path):
    hashes = set()
    for rule in ("mean", "median", "trimmed_mean"):
        config = make_config(
            one_silo, "federation.merge=adopt", f"federation.merging_rule={rule}", "eval.every=0"
        )
        hashes.add(simulate(config, run_dir=tmp_path / rule).summary["weights_sha256"])
    assert len(hashes) == 1


@pytest.mark.slow
def test_what_edit_has_learned_survives_an_interrupted_run(
    three_silos, make_config, tmp_path, monkeypatch
):
    """Of 3 silos, 16 norms are known from round 7 on; a rule that forgot would not refuse in 8."""
    config = make_config(
        three_silos,
        "federation.merging_rule=edit",
        "federation.max_update_norm=none",
        "federation.rounds=8",
        "local.steps=1",
        "local.schedule=constant",
        "eval.every=0",
    )
    with monkeypatch.context() as patch:
        fired = disturb(patch, "green", shift={2, 8})
        calm = simulate(config, run_dir=tmp_path / "calm").summary
        assert fired == [2, 8]
    with monkeypatch.context() as patch:
        fired = disturb(patch, "green", shift={2}, interrupt={8})
        with pytest.raises(KeyboardInterrupt):
            simulate(config, run_dir=tmp_path / "cut")
        assert fired == [2, 8]
    with monkeypatch.context() as patch:
        fired = disturb(patch, "green", shift={8})
        again = resume(tmp_path / "cut").summary
        assert fired == [8]
    for folder in ("calm", "cut"):
        (dropped,) = read_history(tmp_path / folder).of(UpdateDropped)
        assert (dropped.round, dropped.silo) == (8, "green")
        assert "federation.anomaly_z = 3" in dropped.reason
    assert again["weights_sha256"] == calm["weights_sha256"]
    assert rule_state(tmp_path / "cut") == rule_state(tmp_path / "calm")
    assert rule_state(tmp_path / "cut")["norm_count"].item() == 23
