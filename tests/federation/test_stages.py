"""What is done to an update before it leaves: clip, noise, feedback, in this order."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from photon.config import parse_run_config
from photon.errors import CheckpointCorruptError, ConfigError, NonFiniteError
from photon.federation import Node, NodeSettings, stages
from photon.federation.checkpoint import RunState
from photon.federation.engine import Version
from photon.federation.layout import initial_model
from photon.federation.merging import Merging
from photon.federation.norm_bound import norm_bound, norm_of
from photon.federation.outbox import feedback_path, pack
from photon.federation.private import Purse, Spending
from photon.federation.tasks import WEIGHTS, FitTask
from photon.link import TensorFile
from photon.models import trainable_parameters
from photon.privacy import SECRET_FILE, gaussian
from photon.runs import simulate, train

CLIENT = ("privacy.mechanism=client", "privacy.clip_norm=0.5", "privacy.noise_multiplier=0.1")
TARGET = (
    "privacy.mechanism=dp_sgd",
    "privacy.clip_norm=1",
    "privacy.target_epsilon=2",
    "privacy.delta=1e-5",
)
TASK = FitTask("run", 3, "red", 8, 4, None)
DELTA = {
    "weights/matrix": torch.randn(700, 300, generator=torch.Generator().manual_seed(1)),
    "weights/vector": torch.full((501,), 3.0),
}
PARAMETERS = 700 * 300 + 501


def config(*overrides):
    tree = {"model": {"preset": "tiny"}, "data": {"path": "unread"}}
    return parse_run_config(tree, overrides)


def leaving(folder, *overrides, task=TASK, delta=DELTA, asked=""):
    run = config(*(overrides or CLIENT))
    return dict(sent(run, folder, task, delta, asked).tensors())


def sent(run, folder, task=TASK, delta=DELTA, asked=""):
    shapes = {name: tensor.shape for name, tensor in delta.items()}
    # One run has one multiplier.
    purse = Purse(folder, f"run {run.privacy.noise_multiplier}")
    pays = Spending(run.privacy, purse, task, "0" * 64, asked)
    return stages.leaving(pays, run.link, folder, task, lambda: iter(delta.items()), shapes)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("norm", [0.5, 1e4], ids=["beyond C", "within C"])
def test_the_whole_update_is_clipped(norm, tmp_path):
    found = leaving(tmp_path, *CLIENT, f"privacy.clip_norm={norm}", "privacy.noise_multiplier=0")
    if norm > 1e3:
        assert same(found, DELTA)
    else:
        assert norm_of(found) == pytest.approx(norm)
        share = norm / norm_of(DELTA)
        torch.testing.assert_close(found["weights/vector"], share * DELTA["weights/vector"])
    assert not list(tmp_path.iterdir())  # no noise, no secret


def test_noise_is_gaussian_of_the_promised_size(tmp_path):
    found = leaving(tmp_path)
    noise = found["weights/matrix"] - 0.5 / norm_of(DELTA) * DELTA["weights/matrix"]
    noise = noise.double().reshape(-1) / 0.05
    within = 4 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < within
    assert abs(noise.square().mean() - 1) < within * math.sqrt(2)
    assert abs(noise.pow(4).mean() - 3) < within * math.sqrt(96)
    assert abs((noise[1:] * noise[:-1]).mean()) < within
    for bound, share in ((1.0, 0.31731), (2.0, 0.0455), (3.0, 0.0027)):
        assert abs((noise.abs() > bound).double().mean() - share) < within * math.sqrt(share)


def test_values_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    key = bytes(range(32))
    monkeypatch.setattr("photon.privacy.noise._PIECE", 8)
    pieces = gaussian(key, torch.Size([3, 7]), 2.0)
    assert torch.equal(gaussian(key, torch.Size([3, 7]), 2.0), pieces)
    assert pieces.unique().numel() == 21
    assert gaussian(key, torch.Size([0]), 1.0).numel() == 0


def test_the_same_question_has_the_same_answer_and_another_one_other_noise(tmp_path):
    once = leaving(tmp_path / "a")
    assert same(leaving(tmp_path / "a"), once)
    secret = tmp_path / "a" / SECRET_FILE
    assert secret.stat().st_mode & 0o777 == 0o600
    kept = {path.name: path.stat().st_mode & 0o777 for path in secret.parent.glob("*.json")}
    assert kept == dict.fromkeys([f"ledger-{'0' * 32}.json", "ledgers.json"], 0o600)
    others = [
        leaving(tmp_path / "a", task=replace(TASK, round=4)),
        leaving(tmp_path / "a", task=replace(TASK, silo="blue")),
        leaving(tmp_path / "a", task=replace(TASK, run="other")),
        leaving(tmp_path / "b"),  # the run file alone tells nothing of it
    ]
    for other in others:
        apart = norm_of({name: other[name] - once[name] for name in once})
        assert apart == pytest.approx(0.05 * math.sqrt(2 * PARAMETERS), rel=0.02)


def test_two_answers_under_one_name_have_no_noise_in_common(tmp_path):
    """Or an aggregator that asks twice could subtract one from the other."""
    once = leaving(tmp_path)
    moved = DELTA | {"weights/vector": -DELTA["weights/vector"]}  # of the same norm
    for other in (
        leaving(tmp_path, delta=moved),
        leaving(tmp_path, *CLIENT, "privacy.noise_multiplier=0.10001"),
        leaving(tmp_path, *CLIENT, "privacy.clip_norm=0.50001"),
        # The same noise would tell that another state, or clock, came to the same update.
        leaving(tmp_path, asked="of another state"),
        leaving(tmp_path, task=replace(TASK, global_step=9)),
        leaving(tmp_path, task=replace(TASK, node_round=2)),
    ):
        apart = other["weights/matrix"] - once["weights/matrix"]
        assert float(apart.std()) == pytest.approx(0.05 * math.sqrt(2), rel=0.02)


def test_feedback_sees_noised_updates_only(tmp_path):
    noised = leaving(tmp_path)
    coded = config(*CLIENT, "link.update_codec=int4")
    left = sent(coded, tmp_path).receipt.left_out
    pack(coded.link, tmp_path / "plain", TASK, lambda: iter(noised.items()))
    with (
        TensorFile(feedback_path(tmp_path, "red", 3)) as kept,
        TensorFile(feedback_path(tmp_path / "plain", "red", 3)) as expected,
    ):
        assert kept.sha256() == expected.sha256()
    assert left > 0


def test_bad_deltas_and_bad_secrets_are_named(tmp_path):
    with pytest.raises(NonFiniteError, match="weights/vector"):
        leaving(tmp_path, delta=DELTA | {"weights/vector": torch.tensor([math.nan])})
    leaving(tmp_path)
    (tmp_path / SECRET_FILE).write_bytes(b"")
    with pytest.raises(CheckpointCorruptError, match="0 bytes instead of 32"):
        leaving(tmp_path)


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk(density=0.05)"])
def test_the_aggregator_s_own_bound_takes_noised_updates(codec, tmp_path):
    run = config(*CLIENT, f'link.update_codec="{codec}"')
    state = {name: torch.zeros_like(tensor) for name, tensor in DELTA.items()}
    before = RunState(0, 0, "model", "data")
    bound = norm_bound(run, before, state)
    update = sent(run, tmp_path)
    verdict = Merging(run.federation).offer(update, state, 1.0, bound)
    assert verdict.refused is None
    noise = 0.05 * math.sqrt(PARAMETERS)
    assert bound.norm == pytest.approx(2 * (0.5 + noise))
    assert "and its noise" in bound.refuse(3 * (0.5 + noise))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.mechanism=client", "privacy.clip_norm=1"], "target_epsilon, not neither"),
        ([*CLIENT, "privacy.target_epsilon=1"], "target_epsilon, not both"),
        (
            ["privacy.mechanism=dp_sgd", "privacy.clip_norm=1", "privacy.target_epsilon=1"],
            "needs privacy.delta too",
        ),
        ([*TARGET, "federation.pace=buffered"], "nobody knows how often"),
        (["privacy.mechanism=client", "privacy.noise_multiplier=1"], "needs privacy.clip_norm"),
        (["privacy.clip_norm=1"], "makes nothing of privacy.clip_norm"),
        (["privacy.delta=1e-6"], "makes nothing of privacy.delta"),
        ([*CLIENT, "privacy.delta=1"], "less than 1"),
        ([*TARGET, "data.mixture.red=1"], "sources then count by their size"),
        ([*TARGET, 'parts.key=["*mlp*"]', "parts.key_down=best"], 'use "attention"'),
        ([*TARGET, "compute.strategy=fsdp"], 'use "ddp"'),
        ([*CLIENT, "privacy.clip_norm=0"], "greater than 0"),
        ([*CLIENT, "privacy.noise_multiplier=-1"], "greater than or equal to 0"),
        ([*CLIENT, "federation.merge=adopt"], "sends weights"),
        ([*CLIENT, "federation.optimizer_state=average"], "leaves unclipped and without noise"),
        ([*CLIENT, "federation.normalise=true"], "after the clip"),
    ],
)
def test_what_would_void_the_promise_is_refused_with_the_run_file(overrides, words):
    with pytest.raises(ConfigError, match="privacy") as caught:
        config(*overrides)
    assert words in caught.value.message


def test_what_comes_after_the_noise_of_dp_sgd_is_allowed():
    for also in (
        ["federation.merge=adopt"],
        ["federation.optimizer_state=average"],
        ["federation.normalise=true"],
        ["privacy.secure_aggregation=true"],
    ):
        assert config(*TARGET, *also).privacy.deviation == 0


def test_nodes_noise_what_they_trained(three_silos, make_config, tmp_path):
    """The same bits from a node that was started again, others from another node's folder."""
    run = make_config(three_silos, *CLIENT, "local.steps=1")

    def fit(folder):
        node = Node(NodeSettings(run, tmp_path / folder), lambda _: None)
        model = initial_model(run, node._data)
        state = {WEIGHTS + name: one.detach() for name, one in trainable_parameters(model).items()}
        update = node.fit(FitTask("run", 1, "red", 0, 1, None), Version(0, state))
        found = {name: tensor.clone() for name, tensor in update.tensors()}
        node.close()
        return found

    first, again, other = fit("a"), fit("a"), fit("b")
    assert same(first, again)
    assert not same(first, other)


def test_a_clip_that_is_never_reached_changes_no_bit(three_silos, make_config, tmp_path):
    short = ("federation.rounds=2", "local.steps=2", "eval.every=0", "eval.max_tokens=300")

    def weights(name, *overrides, run=simulate):
        made = make_config(three_silos, *short, *overrides)
        return run(made, run_dir=tmp_path / name).summary["weights_sha256"]

    wide = ("privacy.clip_norm=1e9", "privacy.noise_multiplier=0")
    plain = weights("plain")
    assert weights("wide", CLIENT[0], *wide) == plain
    assert weights("noised", *CLIENT, "link.update_codec=int8") != plain
    assert (tmp_path / "noised/nodes" / SECRET_FILE).exists()
    central = weights("central", run=train)
    assert weights("central noised", *CLIENT, run=train) == central  # nothing leaves a node there
