"""One contract suite, every engine."""

import os
import signal
import time

import pytest
import torch
from scores import scored

from photon.data import open_data
from photon.engines.local import LocalEngine
from photon.engines.workers import WorkerEngine
from photon.federation import EvalTask, FitTask, Node, NodeSettings, Version, fitted
from photon.federation.layout import initial_model
from photon.federation.tasks import WEIGHTS, update_header
from photon.link import plain_bytes, tensors_sha256
from photon.models import trainable_parameters
from photon.telemetry.events import LocalProgress, WorkerLost


class Bench:
    """An engine with its state, tasks and what it told."""

    def __init__(self, kind, config, folder):
        self.config, self.told = config, []
        self.data = open_data(config.data.path)
        model = initial_model(config, self.data)
        self.state = {
            WEIGHTS + name: parameter.detach().clone()
            for name, parameter in trainable_parameters(model).items()
        }
        if kind == "local":
            settings = NodeSettings(config, folder / "nodes")
            self.engine = LocalEngine(Node(settings, self.told.append))
        else:
            settings = NodeSettings(config, folder / "nodes", processes=kind)
            self.engine = WorkerEngine(settings, folder / "exchange", self.told.append)

    @property
    def version(self):
        return Version(0, self.state)

    def tasks(self, number=1):
        return [
            FitTask("bench", number, silo, 0, self.config.local.steps, None)
            for silo in sorted(self.data.silos)
        ]

    def fit(self, tasks=None):
        return [
            (update.receipt, tensors_sha256({k: v.clone() for k, v in update.tensors()}))
            for update in fitted(self.engine, tasks or self.tasks(), self.version)
        ]


@pytest.fixture(scope="module", params=["local", 1, 2], ids=["local", "one worker", "two workers"])
def lasting(request, three_silos, make_config, tmp_path_factory):
    """An engine that serves test after test, as it serves round after round."""
    config = make_config(three_silos, "compute.threads=1")
    bench = Bench(request.param, config, tmp_path_factory.mktemp("engine"))
    yield bench
    bench.engine.close()


@pytest.fixture
def bench(lasting):
    kept = dict(lasting.state)
    lasting.told.clear()
    yield lasting
    lasting.state = kept


def test_answers_come_in_the_order_of_tasks(bench):
    tasks = bench.tasks()
    answers = bench.fit(tasks)
    assert [receipt.silo for receipt, _ in answers] == [task.silo for task in tasks]
    shapes = {name: tensor.shape for name, tensor in bench.state.items()}
    for task, (receipt, _) in zip(tasks, answers, strict=True):
        assert receipt.failure is None
        assert receipt.tokens == bench.config.local.steps * bench.config.local.batch_size * 32
        assert receipt.train_s > 0
        assert receipt.bytes_down is None  # nothing was carried
        header = update_header(task, bench.state)
        assert receipt.bytes_up == plain_bytes(header, shapes, 16 << 20)
    steps = [event for event in bench.told if isinstance(event, LocalProgress)]
    assert {event.silo for event in steps} == set(bench.data.silos)


def test_a_task_done_again_gives_the_same_update(bench):
    first = bench.fit()
    second = bench.fit()
    assert [digest for _, digest in first] == [digest for _, digest in second]


def test_every_engine_gives_the_same_bits(three_silos, make_config, tmp_path):
    config = make_config(three_silos, "compute.threads=1")
    seen = {}
    for kind in ("local", 2):
        bench = Bench(kind, config, tmp_path / str(kind))
        seen[kind] = [digest for _, digest in bench.fit()]
        scores = list(scored(bench.engine, [EvalTask(1, None)], bench.version))
        seen[kind].append(scores[0].loss)
        bench.engine.close()
    assert seen["local"] == seen[2]


def test_the_state_is_left_alone(bench):
    before = tensors_sha256(bench.state)
    bench.fit()
    list(scored(bench.engine, [EvalTask(1, None)], bench.version))
    assert tensors_sha256(bench.state) == before


def test_evaluation_scores_each_set(bench):
    tasks = [EvalTask(1, None), *(EvalTask(1, silo) for silo in sorted(bench.data.silos))]
    scores = list(scored(bench.engine, tasks, bench.version))
    assert [score.silo for score in scores] == [task.silo for task in tasks]
    for score in scores:
        # An untrained model is no better than a uniform guess over the vocabulary.
        assert score.perplexity == pytest.approx(bench.data.vocab_size, rel=0.2)
        assert score.tokens > 0


def test_a_diverged_silo_answers_with_its_failure(bench):
    name = next(iter(bench.state))
    bench.state[name] = torch.full_like(bench.state[name], float("nan"))
    for update in fitted(bench.engine, bench.tasks(), bench.version):
        assert "loss became nan" in update.receipt.failure
        assert list(update.tensors()) == []


def test_a_silent_worker_is_replaced_by_its_deadline(three_silos, make_config, tmp_path):
    """SIGSTOP makes a worker silent without killing it."""
    config = make_config(
        three_silos,
        "compute.threads=1",
        "run.log_every=1",
        "federation.silence_s=6",
        "local.steps=20",
    )
    calm = Bench("local", config, tmp_path / "calm")
    expected = [digest for _, digest in calm.fit()]
    bench = Bench(1, config, tmp_path / "stopped")
    bench.fit()  # the worker is up and warm
    stopped = []

    def stop_once(event):
        bench.told.append(event)
        if isinstance(event, LocalProgress) and not stopped:
            stopped.extend(bench.engine.process_ids)
            os.kill(stopped[0], signal.SIGSTOP)

    bench.engine._on_event = stop_once
    started = time.monotonic()
    answers = bench.fit()
    waited_s = time.monotonic() - started
    (lost,) = [event for event in bench.told if isinstance(event, WorkerLost)]
    assert "no step and no answer for 6 s" in lost.reason
    assert waited_s > 6
    assert stopped[0] not in bench.engine.process_ids
    assert [digest for _, digest in answers] == expected
    bench.engine.close()


def test_a_worker_lost_again_and_again_fails_its_task_only(three_silos, make_config, tmp_path):
    # Steps enough that the kill hits before the answer is given.
    config = make_config(three_silos, "compute.threads=1", "run.log_every=1", "local.steps=20")
    bench = Bench(1, config, tmp_path)
    victim = sorted(bench.data.silos)[1]

    def kill(event):
        bench.told.append(event)
        if isinstance(event, LocalProgress) and event.silo == victim:
            os.kill(bench.engine.process_ids[0], signal.SIGKILL)

    bench.engine._on_event = kill
    receipts = [update.receipt for update in fitted(bench.engine, bench.tasks(), bench.version)]
    bench.engine.close()
    assert [receipt.failure is not None for receipt in receipts] == [False, True, False]
    assert "lost 3 times" in receipts[1].failure
    assert len([event for event in bench.told if isinstance(event, WorkerLost)]) == 3
