"""Silos elsewhere: the engine contract, and what silos tell of themselves on the way."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from remote_bench import Bench, Federated, calm_of, only_fails
from scores import scored

from photon.engines.remote.errand import Errand
from photon.errors import NonFiniteError, PolicyError
from photon.federation import EvalTask, fitted
from photon.link import tensors_sha256
from photon.membership.roster import Presence
from photon.telemetry.events import LocalProgress, Notice

#: Norms come to a node once; each silo's embedding (and so its head) never leaves it.
PARTS = ('parts.frozen=["*norm*"]', 'parts.personal=["model.embed*"]')


@pytest.mark.parametrize(
    "link", [(), ('link.update_codec="int8"',), ('link.broadcast_codec="int8"',), PARTS]
)
def test_the_same_bits_as_in_one_process(link, three_silos, make_config, tmp_path):
    config = make_config(three_silos, "local.steps=2", *link)
    federated = Federated(config, tmp_path)
    bench = Bench(federated, tmp_path)
    expected, node_round = [], None
    for number in (1, 2):
        tasks = federated.tasks(number, node_round)
        alone = {}
        for update in fitted(federated.local, tasks, federated.version):
            tensors = {name: tensor.clone() for name, tensor in update.tensors()}
            alone[update.receipt.silo] = (update.receipt, tensors_sha256(tensors))
        seen = bench.answers(tasks)
        assert list(seen) == [task.silo for task in tasks]  # the wire gives the last one first
        expected.append((alone, seen))
        node_round = number
        federated.move(number)
    for alone, seen in expected:
        for silo, (receipt, digest) in alone.items():
            found, found_digest = seen[silo]
            assert found_digest == digest
            for name in ("round", "silo", "tokens", "loss", "bytes_up", "left_out", "failure"):
                assert getattr(found, name) == getattr(receipt, name), name
            assert found.train_s > 0
    first, second = (seen["red"][0].bytes_down for _, seen in expected)
    if link == ('link.broadcast_codec="int8"',):
        assert 0 < second < first / 3  # the outer update only
    if link == PARTS:
        embedding = 4 * federated.once["model.embed_tokens.weight"].numel()
        assert 0 < second < first - embedding
        tasks = [EvalTask(2, silo, 2) for silo in sorted(bench.silos)]
        here, there = (
            [score.loss for score in scored(engine, tasks, federated.version)]
            for engine in (federated.local, bench.engine)
        )
        assert here == there
        assert len(set(here)) == 3
        begun = [replace(task, node_round=None) for task in tasks]
        assert here != [one.loss for one in scored(federated.local, begun, federated.version)]
    assert not list((tmp_path / "arrivals").iterdir())
    assert bench.roster.tasks.open_for("red") == []
    bench.roster.close()
    federated.local.close()


def test_every_set_is_scored(bench):
    names = [None, *sorted(bench.silos)]
    tasks = [EvalTask(0, name) for name in names]
    expected = {score.silo: score for score in scored(bench.federated.local, tasks, calm_of(bench))}
    scores = list(scored(bench.engine, tasks, calm_of(bench)))
    assert [score.silo for score in scores] == names
    for score in scores:
        assert score.loss == expected[score.silo].loss
        assert score.tokens == expected[score.silo].tokens
    assert bench.roster.tasks.open_for("red") == []


def test_a_silo_that_scores_nothing_is_named_and_the_rest_counts(bench):
    bench.silos["green"].start('policy.runs=["another"]')
    try:
        tasks = [EvalTask(0, name) for name in sorted(bench.silos)]
        scores = list(scored(bench.engine, tasks, calm_of(bench)))
    finally:
        bench.silos["green"].start()
    assert [score.silo for score in scores] == ["blue", "red"]
    (notice,) = [event for event in bench.told if isinstance(event, Notice)]
    assert notice.silo == "green"
    assert "policy.runs" in notice.text


def test_the_state_is_left_alone(bench):
    before = tensors_sha256(calm_of(bench).tensors)
    bench.answers()
    assert tensors_sha256(calm_of(bench).tensors) == before


def test_a_diverged_silo_answers_with_its_failure(calm, tmp_path):
    kept, bench = dict(calm.state), None
    name = next(iter(calm.state))
    calm.state[name] = torch.full_like(kept[name], 3e38)
    try:
        bench = Bench(calm, tmp_path)
        ((receipt, digest),) = bench.answers(calm.tasks()[-1:]).values()
        assert "loss became nan" in receipt.failure
        assert receipt.failure_code == NonFiniteError.exit_code
        assert digest is None
    finally:
        calm.state = kept
        if bench is not None:
            bench.roster.close()


def test_progress_is_what_silos_tell(bench):
    def steps(silo, ask, times):
        figures = {"loss": 5.5, "lr": 1e-3, "gradient_norm": None, "tokens_per_s": 900.0}
        # Nothing of a silo that has not said how a step went, and nothing twice.
        for said in ({}, figures, figures):
            doing = {"state": "training", "round": 1, "step": 1, "of": 2, "task": ask.task_id}
            bench.wire.be_here(silo.name, **doing, **said)
            seen = bench.roster.presences()[silo.name]
            bench.engine._messenger._watch(Errand(ask), seen, time.time())
        # Beyond the task's steps there are none, and none comes again.
        for step in (2**52, 1, 2**51):
            bench.wire.be_here(silo.name, **doing | {"step": step}, **figures)
            seen = bench.roster.presences()[silo.name]
            bench.engine._messenger._watch(Errand(ask), seen, time.time())
        return silo.answer(ask)

    bench.on("red", steps)
    bench.answers()
    event, last = [event for event in bench.told if isinstance(event, LocalProgress)]
    assert (event.silo, event.round, event.step, event.global_step) == ("red", 1, 1, 1)
    assert (event.loss, event.lr, event.gradient_norm, event.tokens_per_s) == (5.5, 1e-3, None, 900)
    assert (last.step, last.global_step) == (2, 2)


def test_steps_of_another_round_are_not_told(bench):
    def claiming(silo, ask, times):
        for number, step in ((1, 0), (2, 1), (0, 1)):
            said = Presence("training", round=number, step=step, task=ask.task_id, loss=5.5)
            bench.engine._messenger._progress(ask, said)
        return silo.answer(ask)

    bench.on("red", claiming)
    bench.answers()
    assert bench.wire.fired == ["red"]
    assert not [event for event in bench.told if isinstance(event, LocalProgress)]


def test_a_spool_is_closed_to_others(bench):
    assert (bench.folder / "arrivals").stat().st_mode & 0o077 == 0


def test_a_refusal_has_the_silos_own_words_and_code(bench):
    bench.silos["red"].start("policy.max_local_steps=1")
    try:
        words = only_fails(bench.answers(), "red", PolicyError, bench.federated.expected)
    finally:
        bench.silos["red"].start()
    assert "red: this site's policy refuses the run: a task takes 2 local steps" in words
    assert "policy.max_local_steps allows 1" in words
    assert bench.wire.times("red") == 1
    assert any(event.what == "refused" for event in bench.roster.journal.events())
