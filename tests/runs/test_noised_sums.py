"""Whole runs whose sums are noised: what they cost, what they restart to, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from served_in_process import SMALL, Served

from photon.config import LinkConfig, PrivacyConfig, parse_run_config
from photon.errors import ConfigError, IncompatibleConfigError, PolicyError
from photon.federation import FitTask, secure_rounds
from photon.federation.checkpoint import CheckpointStore
from photon.federation.norm_bound import norm_of
from photon.federation.private import Purse, Spending
from photon.federation.secure_rounds import COHORTS_FILE
from photon.federation.server import Server
from photon.federation.stages import _noised, leaving
from photon.privacy.epsilon import epsilon
from photon.runs import resume, simulate
from photon.secure.member import COUNT
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished

NOISED = (
    *SMALL,
    "privacy.secure_aggregation=true",
    "privacy.mechanism=client",
    "privacy.noise_at=sum",
    "privacy.clip_norm=1.0",
    "privacy.noise_multiplier=0.5",
    "privacy.delta=1e-4",
    "serve.min_silos=5",
    "eval.per_silo=false",
)
QUANTILE = "privacy.clip_quantile=0.5"


def state_of(folder):
    store = CheckpointStore(folder / "checkpoints", 9)
    return store.states(store.rounds()[-1])[0]


@pytest.fixture(scope="module")
def config(make_config, five_silos):
    return make_config(five_silos, *NOISED, QUANTILE)


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm") / "run"
    result = simulate(config, run_dir=folder)
    return folder, result.summary


def test_a_run_says_what_its_sums_have_cost(calm):
    folder, summary = calm
    rounds = summary["rounds"]
    expected = epsilon(rounds / 0.5**2, 1e-4)
    assert summary["epsilon"] == {"value": expected, "delta": 1e-4, "unit": "client"}
    told = [one.epsilon for one in read_history(folder).of(LocalFinished) if one.round == 1]
    assert told == [epsilon(1 / 0.5**2, 1e-4)] * 5
    assert all(one.loss is None for one in read_history(folder).of(LocalFinished))
    # Nodes add none of it, and keep no account; the aggregator's secret is its own.
    assert not list((folder / "nodes").rglob("noise.key"))
    assert (folder / "noise.key").stat().st_mode & 0o77 == 0


def test_the_clip_moves_with_the_count(calm):
    folder, _ = calm
    clips = {
        one["cohort"]["clip"]
        for one in json.loads((folder / COHORTS_FILE).read_text())["rounds"].values()
    }
    assert 1.0 in clips
    assert len(clips) > 1
    moved = math.log(state_of(folder).clip_norm)
    assert 0 < abs(moved) <= 0.1 * len(clips) + 1e-9


def test_what_is_left_out_is_not_fed_back(calm):
    folder, _ = calm
    assert not list((folder / "nodes").rglob("feedback-*"))


def test_updates_are_within_the_clip(make_config, five_silos, tmp_path):
    """With z = 0 a round moves the weights by C at most, and by more where C is larger."""

    def moved(clip):
        config = make_config(
            five_silos,
            *NOISED,
            "privacy.noise_multiplier=0",
            f"privacy.clip_norm={clip}",
            "federation.rounds=1",
        )
        folder = tmp_path / str(clip)
        assert "epsilon" not in simulate(config, run_dir=folder).summary
        return state_of(folder).merged_norm

    tight = moved(0.01)
    assert 0.003 < tight <= 0.01 * (1 + 1e-5)
    assert moved(100.0) > 10 * tight


def test_a_node_clips_to_what_the_round_says_and_adds_nothing(tmp_path):
    privacy = PrivacyConfig(
        mechanism="client",
        clip_norm=1.0,
        noise_multiplier=9.0,
        noise_at="sum",
        secure_aggregation=True,
    )
    delta = {"weights/a": torch.full((16,), 2.0), "weights/b": torch.full((9,), -1.0)}
    task = FitTask("run", 1, "a", 0, 1, None)
    spending = Spending(privacy, Purse(tmp_path, "run"), task, "text")
    for clip, expected in ((4.0, 4.0), (0.25, 0.25), (100.0, math.sqrt(73))):
        tensors, share = _noised(spending, lambda: iter(delta.items()), clip)
        assert norm_of(dict(tensors())) == pytest.approx(expected)
        assert share == pytest.approx(expected / math.sqrt(73))
    assert not list(tmp_path.iterdir())


def test_a_killed_aggregator_draws_the_same_noise(config, tmp_path, monkeypatch):
    """Else the difference of what two processes published would tell of the sum."""
    step, noise_of, drawn, killed = Server.step, secure_rounds.noise_of, {}, []

    def seen(found, privacy, key, name, size):
        words = noise_of(found, privacy, key, name, size)
        drawn.setdefault((found.cohort.round, name), []).append(words.tobytes())
        return words

    def dying(self, **options):
        if self.version.number == 1 and not killed:
            killed.append(dict(drawn))
            raise KeyboardInterrupt  # the sum is open, and nothing of it is kept
        return step(self, **options)

    monkeypatch.setattr(secure_rounds, "noise_of", seen)
    monkeypatch.setattr(Server, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, run_dir=tmp_path / "run")
    summary = resume(tmp_path / "run").summary
    assert killed
    second = [times for (number, _), times in drawn.items() if number == 2]
    assert COUNT in {name for number, name in drawn if number == 2}
    assert all(len(times) == 2 and times[0] == times[1] for times in second)
    tensors = [times[0] for (_, name), times in drawn.items() if name != COUNT]  # one word each
    assert len(set(tensors)) == len(tensors)
    assert all(any(words) for words in tensors)
    assert summary["epsilon"]["value"] == epsilon(3 / 0.5**2, 1e-4)


def test_a_target_is_what_the_run_costs(make_config, five_silos, tmp_path):
    target = [one for one in NOISED if "noise_multiplier" not in one]
    config = make_config(five_silos, *target, "privacy.target_epsilon=3.0")
    told = simulate(config, run_dir=tmp_path / "run").summary["epsilon"]
    assert told["value"] == pytest.approx(3.0, rel=1e-6)


def test_sites_come_to_the_weights_of_simulate(make_config, five_silos, tmp_path):
    """Without noise, which nobody draws twice in two runs."""
    config = make_config(five_silos, *NOISED, QUANTILE, "privacy.noise_multiplier=0")
    calm = simulate(config, run_dir=tmp_path / "calm")
    served = Served(config, tmp_path, names=tuple("abcde"))
    assert served.go_on().summary["weights_sha256"] == calm.summary["weights_sha256"]
    ask = next(ask for ask in served.wire.asked if ask.kind == "fit" and ask.round == 2)
    silo = served.silos[ask.silo]
    cohort = json.loads(ask.fit.sealing)
    for change in ({"clip": 1e4}, {"clip": None, "counted": False}):
        text = json.dumps(cohort | change, sort_keys=True, separators=(",", ":"))
        other = ask.model_copy(update={"fit": ask.fit.model_copy(update={"sealing": text})})
        assert "updates clipped to" in json.dumps(str(silo.answer(other)))


BASE = {"model": {"preset": "tiny"}, "data": {"path": "unread"}}
PRIVATE = [one for one in NOISED if one.startswith("privacy.")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.secure_aggregation=false"], "would see single updates without noise"),
        (["privacy.mechanism=dp_sgd"], 'noise_at = "sum" needs mechanism = "client"'),
        (["privacy.noise_at=node", QUANTILE], 'clip_quantile needs noise_at = "sum"'),
        (["link.error_feedback=true"], "adds to it what was left out of earlier updates"),
        (["federation.normalise=true"], "scales update and noise after the clip"),
    ],
)
def test_what_does_not_go_with_it_is_told(overrides, words):
    parse_run_config(BASE, PRIVATE)
    with pytest.raises((IncompatibleConfigError, ConfigError)) as caught:
        parse_run_config(BASE, [*PRIVATE, *overrides])
    assert words in caught.value.message


@pytest.mark.parametrize(("at_sum", "sealing"), [(True, ""), (False, "clipped")])
def test_nothing_leaves_that_nobody_noises(at_sum, sealing, tmp_path, monkeypatch):
    """A silo of several nodes has no masks; a federation among members has no clip of its own."""
    monkeypatch.setattr("photon.federation.stages.Seal", lambda *a: SimpleNamespace(clip=1.0))
    task = replace(FitTask("run", 1, "a", 0, 1, None), sealing=sealing)
    privacy = parse_run_config(BASE, PRIVATE).privacy if at_sum else PrivacyConfig()
    spending = Spending(privacy, Purse(tmp_path, "run"), task, "text")
    with pytest.raises(PolicyError, match="nobody would noise what a sends"):
        leaving(spending, LinkConfig(), tmp_path, task, lambda: iter(()), {})


def test_a_silo_of_several_nodes_is_told_when_the_run_is_loaded():
    own = parse_run_config(BASE, PRIVATE).privacy.model_dump(exclude_none=True)
    tree = BASE | {"federation": {"children": {"a": {"nodes": 2, "privacy": own}}}}
    with pytest.raises(IncompatibleConfigError, match="has nodes, whose sum nobody masks"):
        parse_run_config(tree)


def test_groups_are_no_members_of_a_noised_sum():
    group = {"silos": ["a", "b", "c"]}
    tree = BASE | {"federation": {"children": {"east": group, "west": group | {"silos": ["d"]}}}}
    with pytest.raises(IncompatibleConfigError, match="silos, which clip by themselves"):
        parse_run_config(tree, PRIVATE)


def test_a_group_noises_the_sum_of_its_silos(make_config, five_silos, tmp_path):
    own = [one for one in NOISED if not one.startswith("privacy.")]
    tree = make_config(five_silos, *own, "local.steps=4").model_dump(exclude_none=True)
    noised = parse_run_config(BASE, PRIVATE).privacy.model_dump(exclude_none=True)
    east = {"silos": ["a", "b", "c"], "rounds": 2, "privacy": noised}
    tree["federation"]["children"] = {"east": east}
    result = simulate(parse_run_config(tree), run_dir=tmp_path / "run")
    rounds = result.summary["rounds"]
    told = state_of(tmp_path / "run").epsilon
    assert told["east"]["value"] == epsilon(2 * rounds / 0.5**2, 1e-4)
    assert told["d"] is None  # and so the run as a whole promises nothing
    assert "epsilon" not in result.summary
    assert (tmp_path / "run" / "nodes" / "east" / "noise.key").is_file()
