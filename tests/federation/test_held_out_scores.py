"""Scores of a run: of the same tokens however they are asked for, and in little memory."""

from __future__ import annotations

import pytest
import torch

import photon
from photon.data import open_data
from photon.federation import EvalTask, Node, NodeSettings, Version
from photon.federation import node as node_module
from photon.federation.layout import initial_model
from photon.federation.tasks import WEIGHTS
from photon.models import trainable_parameters
from photon.telemetry.events import Evaluated, Notice


def test_documents_are_masked_as_in_training_and_the_sample_is_one(
    three_silos, make_config, tmp_path
):
    config = make_config(
        three_silos,
        "local.document_mask=true",
        "data.sequence_length=512",
        "eval.max_tokens=1500",
        "federation.rounds=1",
        "local.steps=1",
        preset="tiny",  # small_model's text is shorter
    )
    photon.simulate(config, run_dir=tmp_path / "run")
    events = photon.read_run(tmp_path / "run").events
    newest = {e.silo: e for e in events if isinstance(e, Evaluated) and e.round == 1}
    again = photon.evaluate(tmp_path / "run", three_silos, max_tokens=1500, device="cpu")
    for silo, score in {None: again.overall, **again.per_silo}.items():
        event = newest[silo]
        assert score.loss == pytest.approx(event.loss, rel=1e-6), silo
        assert score.bits_per_byte == pytest.approx(event.bits_per_byte, rel=1e-6)
        assert score.tokens == event.tokens <= 1500
    # An export does not say how it was trained, so its documents are scored as one text.
    out = photon.export(tmp_path / "run", tmp_path / "hf")
    apart = photon.evaluate(out, three_silos, sequence_length=512, max_tokens=1500, device="cpu")
    assert apart.overall.loss != pytest.approx(again.overall.loss, rel=1e-5)


@pytest.fixture
def short_of_memory(monkeypatch):
    """Scoring more than 8 sequences at once fails; the sizes that were tried."""
    tried, evaluate_loss = [], node_module.evaluate_loss

    def limited(*args, batch_size, **options):
        tried.append(batch_size)
        if batch_size > 8:
            raise torch.OutOfMemoryError("out of memory")
        return evaluate_loss(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(node_module, "evaluate_loss", limited)
    return tried


def test_scoring_backs_off_where_memory_is_short(
    three_silos, make_config, tmp_path, short_of_memory
):
    config, told = make_config(three_silos), []
    model = initial_model(config, open_data(three_silos))
    state = {WEIGHTS + n: p.detach().clone() for n, p in trainable_parameters(model).items()}

    def score(batch_size, tasks=1):
        settings = NodeSettings(
            config.model_copy(
                update={"eval": config.eval.model_copy(update={"batch_size": batch_size})}
            ),
            tmp_path / "nodes",
        )
        node = Node(settings, told.append)
        scores = [node.evaluate(EvalTask(1, None), Version(1, state)) for _ in range(tasks)]
        node.close()
        return scores

    whole = score(8)[0]
    short_of_memory.clear()
    first, second = score(32, tasks=2)
    assert short_of_memory == [32, 16, 8, 8]
    assert first.loss == second.loss == whole.loss
    words = [event.text for event in told if isinstance(event, Notice)]
    assert "scoring 32 sequences" in words[0]
    assert "going on with 8" in words[1]
    short_of_memory.clear()
    score(32)
    assert short_of_memory == [8]  # remembered
