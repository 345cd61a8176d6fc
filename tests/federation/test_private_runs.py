"""Runs of DP-SGD: one noise for one question, in every engine and after a kill."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

from photon.config import parse_run_config
from photon.errors import CheckpointCorruptError
from photon.federation import Node, NodeSettings, stages
from photon.federation.engine import Version
from photon.federation.layout import initial_model
from photon.federation.private import Purse, Spending
from photon.federation.tasks import WEIGHTS, FitTask
from photon.models import trainable_parameters
from photon.privacy import SECRET_FILE
from photon.runs import load_weights, resume, simulate, train
from photon.training import Trainer

SHORT = ("federation.rounds=2", "local.steps=2", "eval.every=0", "eval.max_tokens=300")
DP_SGD = ("privacy.mechanism=dp_sgd", "privacy.clip_norm=0.5", "privacy.noise_multiplier=0.2")
TASK = FitTask("run", 1, "red", 0, 2, None)


def config(*overrides):
    return parse_run_config({"model": {"preset": "tiny"}, "data": {"path": "unread"}}, overrides)


@pytest.fixture
def run(three_silos, make_config, tmp_path):
    def run(name, *overrides, start=simulate):
        return start(make_config(three_silos, *SHORT, *overrides), run_dir=tmp_path / name)

    return run


def test_a_kill_and_workers_change_nothing(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # or two runs have two secrets
        patch.setattr("photon.privacy.noise.secrets.token_bytes", lambda count: b"k" * count)
        undisturbed = run("undisturbed", *DP_SGD).summary["weights_sha256"]
    fit, asked = Node.fit, []

    def interrupted(self, task, version):
        asked.append((task.round, task.silo))
        if len(asked) == 5:  # of three silos, in the second round
            raise KeyboardInterrupt
        return fit(self, task, version)

    with monkeypatch.context() as patch:
        patch.setattr("photon.privacy.noise.secrets.token_bytes", lambda count: b"k" * count)
        patch.setattr(Node, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut", *DP_SGD)
    shutil.copytree(tmp_path / "cut", tmp_path / "workers")
    assert resume(tmp_path / "cut").summary["weights_sha256"] == undisturbed
    others = resume(tmp_path / "workers", overrides=["federation.workers=2"])
    assert others.summary["weights_sha256"] == undisturbed
    assert asked[-1][0] == 2


def test_with_no_noise_and_a_wide_clip_it_is_the_plain_run(run):
    wide = ("privacy.clip_norm=1e9", "privacy.noise_multiplier=0")
    runs = [run("plain"), run("wide", DP_SGD[0], *wide), run("noised", *DP_SGD)]
    plain, same, noised = (load_weights(one)[0].state_dict() for one in runs)
    for name, tensor in plain.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=2e-5)
    assert any((noised[name] - plain[name]).abs().max() > 1e-3 for name in plain)
    assert (runs[2].folder / "nodes" / SECRET_FILE).exists()
    assert not (runs[1].folder / "nodes" / SECRET_FILE).exists()


def test_what_merges_state_and_weights_goes_with_it(run):
    after = ("federation.merge=adopt", "federation.optimizer_state=average")
    more = ("link.update_codec=fp32", "federation.normalise=false")
    summary = run("adopted", *DP_SGD, *after, *more, "local.optimizer=muon").summary
    assert math.isfinite(summary["global_loss"])


def test_nothing_is_noised_where_nothing_leaves(run):
    central = run("central", start=train).summary["weights_sha256"]
    assert run("central noised", *DP_SGD, start=train).summary["weights_sha256"] == central


def test_the_same_question_has_the_same_answer(three_silos, make_config, tmp_path):
    """Of a node that was started again too; another node, and another state, has other noise."""
    made = make_config(three_silos, *DP_SGD, "local.steps=2")

    def fit(folder, moved=0.0):
        node = Node(NodeSettings(made, tmp_path / folder), lambda _: None)
        model = initial_model(made, node._data)
        state = {
            WEIGHTS + name: one.detach() + moved
            for name, one in trainable_parameters(model).items()
        }
        update = node.fit(TASK, Version(0, state))
        found = {name: tensor.clone() for name, tensor in update.tensors()}
        node.close()
        return found

    first, again, other, near = fit("a"), fit("a"), fit("b"), fit("a", 1e-4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for answer in (other, near):
        for name, tensor in answer.items():
            if tensor.numel() > 500:
                pair = torch.stack([tensor.flatten(), first[name].flatten()])
                assert torch.corrcoef(pair)[0, 1] < 0.5, name


def test_steps_are_noised_and_what_leaves_is_not_noised_again(tmp_path):
    pays = Spending(config(*DP_SGD).privacy, Purse(tmp_path, "run"), TASK, "0" * 64)
    steps = pays.steps()
    assert (steps.clip_norm, steps.noise_multiplier) == (0.5, 0.2)
    assert steps.secret == (tmp_path / SECRET_FILE).read_bytes()
    assert steps.secret.hex() not in repr(steps)
    assert repr(steps.secret) not in repr(steps)
    delta = {"weights/matrix": torch.full((30, 50), 3.0)}
    shapes = {name: tensor.shape for name, tensor in delta.items()}
    made = config(*DP_SGD)
    update = stages.leaving(pays, made.link, tmp_path, TASK, lambda: iter(delta.items()), shapes)
    assert torch.equal(dict(update.tensors())["weights/matrix"], delta["weights/matrix"])
    for other in ([], ["privacy.mechanism=client", *DP_SGD[1:]]):
        assert replace(pays, privacy=config(*other).privacy).steps() is None
    (tmp_path / SECRET_FILE).write_bytes(b"")
    with pytest.raises(CheckpointCorruptError, match="0 bytes instead of 32"):
        pays.steps()


def test_a_group_says_how_its_silos_step(run, monkeypatch):
    steps, fit = {}, Trainer.fit

    def note(self, *args, private, **options):
        steps[len(steps)] = private and private.clip_norm
        return fit(self, *args, private=private, **options)

    monkeypatch.setattr(Trainer, "fit", note)
    own = 'privacy={mechanism="dp_sgd", clip_norm=0.7, noise_multiplier=0.1}'
    run("tree", f'federation.children.west={{silos=["red"], {own}}}', "federation.rounds=1")
    assert sorted(steps.values(), key=str) == [0.7, None, None]
