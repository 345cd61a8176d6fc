"""A run owns its model's architecture: what becomes of the folder it came from is no matter."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import photon
from photon.errors import ModelMismatchError
from photon.models import model_fingerprint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A pretrained model, in a folder of its own."""
    folder = tmp_path_factory.mktemp("source") / "model"
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source, three_silos, make_config, tmp_path_factory):
    """A run of it from beginning to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = make_config(
        three_silos,
        "federation.rounds=2",
        "local.steps=1",
        "eval.max_tokens=300",
        "eval.per_silo=false",
    )
    model = config.model.model_validate({"path": str(source), "init": "pretrained"})
    photon.simulate(config.model_copy(update={"model": model}), run_dir=folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it that stopped after its first round."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/round-000002")
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_where_its_source_is_gone(whole, stopped, source, workers):
    away = source.rename(source.with_name("away"))
    try:
        result = photon.resume(stopped, overrides=[f"federation.workers={workers}"])
    finally:
        away.rename(source)
    expected = json.loads((whole / "summary.json").read_text())
    for key in ("weights_sha256", "global_loss"):
        assert result.summary[key] == expected[key]
    # Where it came from is still known: a served run tells its silos.
    assert str(source) in (stopped / "config.resolved.toml").read_text()


def test_a_changed_source_is_refused_and_never_scored(whole, stopped, source, three_silos):
    def score():
        return photon.evaluate(whole, three_silos, max_tokens=300, device="cpu").overall.loss

    before, file = score(), source / "config.json"
    written = file.read_text()
    changed = json.loads(written)
    changed["rope_parameters"]["rope_theta"] = 100.0  # no name and no shape tells
    file.write_text(json.dumps(changed))
    try:
        assert score() == before
        with pytest.raises(ModelMismatchError, match=r"config\.json describes another model"):
            photon.resume(stopped)
    finally:
        file.write_text(written)


def test_a_run_without_a_checkpoint_begins_with_its_sources_weights(whole, stopped):
    shutil.rmtree(stopped / "checkpoints")
    result = photon.resume(stopped)
    expected = json.loads((whole / "summary.json").read_text())
    assert result.summary["weights_sha256"] == expected["weights_sha256"]


def test_the_fingerprint_tells_models_of_one_shape_apart():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}

    def fingerprint(**changes):
        config = LlamaConfig(**sizes, **changes)
        return model_fingerprint(AutoModelForCausalLM.from_config(config))

    plain = fingerprint()
    assert fingerprint(rope_parameters={"rope_type": "default", "rope_theta": 100.0}) != plain
    assert fingerprint(hidden_act="gelu") != plain
    assert fingerprint(use_cache=False) == plain


def test_weights_that_a_model_has_no_place_for_are_no_checkpoint_of_its(stopped):
    """Of a run that an earlier version began: what its checkpoint holds is never dropped."""
    file = stopped / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ModelMismatchError, match=r"lm_head\.weight"):
        photon.export(stopped, stopped.parent / "out")
