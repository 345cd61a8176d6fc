"""A node of several ranks: same answers as one process, and what happens when a rank is lost."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from scores import scored

from photon.data import open_data
from photon.engines.local import LocalEngine
from photon.engines.workers import WorkerEngine
from photon.federation import EvalTask, FitTask, Node, NodeSettings, Version, fitted
from photon.federation.layout import initial_model, layout_of
from photon.federation.tasks import OPTIMIZER, WEIGHTS
from photon.telemetry.events import ComputeChosen, LocalProgress, WorkerLost
from photon.training import InnerOptimizer

pytestmark = pytest.mark.slow


class Bench:
    """A node behind an engine, in this process or as `ranks` processes."""

    def __init__(self, config, folder, *, ranks=0):
        self.config, self.told = config, []
        self.data = open_data(config.data.path)
        model = initial_model(config, self.data)
        layout = layout_of(model)
        self.once = layout.once_of(model)
        self.state = {
            WEIGHTS + name: model.get_parameter(name).detach().clone() for name in layout.merged
        }
        if config.federation.optimizer_state == "average":
            zeros = InnerOptimizer(model, config.local).initial_state()
            self.state |= {OPTIMIZER + name: tensor for name, tensor in zeros.items()}
        settings = NodeSettings(config, folder / "nodes")
        if ranks:
            exchange = folder / "exchange"
            self.engine = WorkerEngine(settings, exchange, self.told.append, ranks=ranks)
        else:
            self.engine = LocalEngine(Node(settings, self.told.append))

    @property
    def version(self):
        return Version(0, self.state, once=self.once, once_sha256="of the bench")

    def fit(self, silos, number=1, node_round=None):
        steps = self.config.local.steps
        tasks = [
            FitTask("bench", number, silo, (number - 1) * steps, steps, node_round)
            for silo in silos
        ]
        return [
            (update.receipt, {name: tensor.clone() for name, tensor in update.tensors()})
            for update in fitted(self.engine, tasks, self.version)
        ]

    def of(self, kind):
        return [event for event in self.told if isinstance(event, kind)]


def assert_close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        # Adam moves by its learning rate (3e-3) whatever the size of a gradient near zero.
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=5e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_answer_as_one_process_does(three_silos, make_config, tmp_path, strategy):
    """Fit from a kept state, another silo between, evaluation: the whole life of a node.

    The embedding, and so the head, is each silo's own: what FSDP2 gathered of one must not stay.
    """
    recipe = ["local.optimizer=muon", "local.lr=1e-2", "federation.optimizer_state=keep"]
    recipe += ["parts.personal=['*embed*']", "parts.frozen=['*layers.0.*']"]
    alone = Bench(make_config(three_silos, *recipe), tmp_path / "alone")
    recipe += ["compute.processes=2", f"compute.strategy={strategy}"]
    config = make_config(three_silos, *recipe)
    pair = Bench(config, tmp_path / "pair", ranks=2)
    try:
        for bench in (alone, pair):
            bench.answers = [
                *bench.fit(["red", "blue"]),
                *bench.fit(["red"], number=2, node_round=1),
            ]
            tasks = [EvalTask(2, None), EvalTask(2, "red", 2), EvalTask(2, "blue", 1)]
            bench.scores = list(scored(bench.engine, tasks, bench.version))
    finally:
        pair.engine.close()
    for (mine, update), (theirs, expected) in zip(pair.answers, alone.answers, strict=True):
        assert mine.failure is None
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert (mine.tokens, mine.bytes_up) == (theirs.tokens, theirs.bytes_up)
        assert_close(update, expected)
    for mine, theirs in zip(pair.scores, alone.scores, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.tokens == theirs.tokens
    (chosen,) = pair.of(ComputeChosen)
    assert (chosen.ranks, chosen.strategy) == (2, strategy)


def test_averaged_state_travels_through_cut_ranks(three_silos, make_config, tmp_path):
    recipe = ["local.optimizer=adamw", "federation.optimizer_state=average"]
    alone = Bench(make_config(three_silos, *recipe), tmp_path / "alone")
    recipe += ["compute.processes=2", "compute.strategy=fsdp"]
    config = make_config(three_silos, *recipe)
    pair = Bench(config, tmp_path / "pair", ranks=2)
    try:
        for bench in (alone, pair):
            ((_, update),) = bench.fit(["red"])
            bench.first = update
            # The aggregator's part, for one participant: the deltas off, the moments as they are.
            for name, tensor in update.items():
                if name.startswith(WEIGHTS):
                    bench.state[name] -= tensor
                else:
                    bench.state[name] = tensor
            ((_, bench.second),) = bench.fit(["red"], number=2, node_round=1)
    finally:
        pair.engine.close()
    assert any(name.endswith(".exp_avg_sq") for name in pair.first)
    assert_close(pair.first, alone.first)
    assert_close(pair.second, alone.second)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_the_task_done_again(three_silos, make_config, tmp_path, victim):
    config = make_config(
        three_silos, "compute.processes=2", "compute.strategy=ddp", "run.log_every=1"
    )
    bench = Bench(config, tmp_path, ranks=2)
    killed = []

    def kill_once(event):
        bench.told.append(event)
        if isinstance(event, LocalProgress) and event.step == 2 and not killed:
            killed.append(bench.engine.process_ids[victim])
            os.kill(killed[0], signal.SIGKILL)

    try:
        ((_, expected),) = bench.fit(["red"])
        bench.engine._on_event = kill_once
        ((receipt, update),) = bench.fit(["red"])
    finally:
        bench.engine.close()
    assert killed
    (lost,) = bench.of(WorkerLost)
    assert f"rank {victim} ended with exit code -9 after local step" in lost.reason
    assert receipt.failure is None
    assert all(torch.equal(update[name], expected[name]) for name in expected)
