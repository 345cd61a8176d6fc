"""Runs whose tensors have other roles than merged: carried once, or each silo's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, RoFormerConfig

import photon
from photon.config import load_run_config
from photon.errors import ModelError
from photon.federation.node_state import PERSONAL, read_node_state
from photon.link import TensorFile
from photon.runs import load_weights
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 64}
HEAD = "lm_head.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
POSITIONS = "roformer.encoder.embed_positions.weight"

#: Two rounds of one step, and hardly any text to score.
QUICK = ("federation.rounds=2", "local.steps=1", "local.batch_size=2", "eval.max_tokens=100")


def saved(folder, config, edit=lambda model: None):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(config)
        edit(model)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    return saved(tmp_path_factory.mktemp("llama") / "model", config)


@pytest.fixture(scope="module")
def run(three_silos, make_config):
    """Runs a pretrained model; gives its summary."""

    def run(source, folder, *overrides):
        config = make_config(three_silos, *QUICK, *overrides)
        model = config.model.model_validate({"path": str(source), "init": "pretrained"})
        return photon.simulate(config.model_copy(update={"model": model}), run_dir=folder).summary

    return run


def deepseek(folder):
    """With a routing bias of its own: a buffer that no optimizer sees."""

    def bias(model):
        model.get_buffer(BIAS).copy_(torch.tensor([5.0, 0, -5, 0]))

    config = DeepseekV3Config(
        **SMALL, num_hidden_layers=2, num_key_value_heads=2, n_routed_experts=4, n_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, topk_group=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    return saved(folder, config, bias)


def roformer(folder):
    """Its positions are a parameter that the architecture does not train; with values of ours."""

    def positions(model):
        model.get_parameter(POSITIONS).copy_(torch.linspace(-1, 1, 16))

    config = RoFormerConfig(**SMALL, num_hidden_layers=1, is_decoder=True)
    return saved(folder, config, positions)


@pytest.mark.parametrize(("make", "name"), [(deepseek, BIAS), (roformer, POSITIONS)])
def test_what_is_never_trained_is_trained_with_everywhere(make, name, run, tmp_path, three_silos):
    source = make(tmp_path / "model")
    here = run(source, tmp_path / "here")
    worker = run(source, tmp_path / "worker", "federation.workers=1")
    for key in ("weights_sha256", "global_loss"):
        assert here[key] == worker[key]
    first = AutoModelForCausalLM.from_pretrained(source).state_dict()[name]
    ours, _ = load_weights(tmp_path / "worker")
    assert torch.equal(ours.state_dict()[name], first)
    scored = photon.evaluate(tmp_path / "here", three_silos, max_tokens=100, device="cpu").overall
    assert scored.loss == pytest.approx(here["global_loss"], rel=1e-6)
    photon.export(tmp_path / "here", tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[name]
    assert torch.equal(out, first)


def test_what_parts_freeze_never_changes_and_has_no_optimizer_state(llama, run, tmp_path):
    run(
        llama, tmp_path / "run", "parts.frozen=['model.embed*','first:0.4']",
        "federation.optimizer_state=keep",
    )  # fmt: skip
    first = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    last = load_weights(tmp_path / "run")[0].state_dict()
    checkpoint = tmp_path / "run/checkpoints/round-000002"
    with TensorFile(checkpoint / "once.safetensors") as file:
        frozen = file.names()
    assert "model.embed_tokens.weight" in frozen
    assert {name for name in first if torch.equal(first[name], last[name])} == set(frozen)
    kept = read_node_state(tmp_path / "run/nodes", "red", 2)
    assert {name.rpartition(".")[0] for name in kept} == set(first) - set(frozen)


def test_what_is_frozen_reaches_the_members_of_a_group(llama, run, tmp_path):
    one, frozen = "federation.rounds=1", "parts.frozen=['model.embed*']"
    run(llama, tmp_path / "run", one, frozen, "federation.children.west.silos=['blue','red']")
    ours, first = load_weights(tmp_path / "run")[0], AutoModelForCausalLM.from_pretrained(llama)
    ours, first = (model.get_input_embeddings().weight for model in (ours, first))
    assert torch.equal(ours, first)


FEDPER = ("parts.personal=['lm_head*']",)


@pytest.fixture(scope="module", params=["reset", "keep"])
def fedper(request, llama, run, tmp_path_factory):
    """A finished run with a personal head, and its summary."""
    folder = tmp_path_factory.mktemp("fedper") / "run"
    mode = f"federation.optimizer_state={request.param}"
    return folder, run(llama, folder, *FEDPER, mode)


def test_personal_parts_differ_and_never_leave(fedper):
    folder, summary = fedper
    heads = {
        silo: read_node_state(folder / "nodes", silo, 2)[HEAD + PERSONAL]
        for silo in ("blue", "green", "red")
    }
    assert not torch.equal(heads["blue"], heads["red"])
    assert not torch.equal(heads["green"], heads["red"])
    with TensorFile(folder / "checkpoints/round-000002/global.safetensors") as file:
        assert not any(HEAD in name for name in file.names())
    scores = summary["per_silo"]
    assert set(scores) == {"blue", "green", "red"}
    assert min(scores.values()) <= summary["global_perplexity"] <= max(scores.values())


def test_a_resumed_run_has_the_same_personal_parts(fedper, tmp_path):
    folder, summary = fedper
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/round-000002")
    for path in (tmp_path / "run/nodes").glob("*/round-000002"):
        shutil.rmtree(path)
    (tmp_path / "run/summary.json").unlink()
    again = photon.resume(tmp_path / "run", overrides=["federation.workers=1"]).summary
    for key in ("weights_sha256", "global_loss", "per_silo"):
        assert again[key] == summary[key]
    one, other = (load_weights(at, "red")[0] for at in (folder, tmp_path / "run"))
    assert torch.equal(one.get_parameter(HEAD), other.get_parameter(HEAD))


def test_each_silos_model_comes_out_and_no_other(fedper, tmp_path, three_silos):
    folder, summary = fedper
    with pytest.raises(ModelError, match=r"personal are 'lm_head\.weight'\n.*blue, green, red"):
        photon.export(folder, tmp_path / "none")
    with pytest.raises(ModelError, match="has no 'grey'"):
        photon.export(folder, tmp_path / "none", of="grey")
    photon.export(folder, tmp_path / "out", of="green")
    ours, _ = load_weights(folder, "green")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(30)[None]
    assert torch.equal(out(tokens).logits, ours.eval()(tokens).logits)
    scores = photon.evaluate(folder, three_silos, max_tokens=100, device="cpu", of="green")
    assert scores.per_silo["green"].perplexity == pytest.approx(summary["per_silo"]["green"])


def test_pooled_text_is_trained_whole(llama, three_silos, make_config, tmp_path):
    config = make_config(three_silos, *QUICK, "federation.rounds=1", *FEDPER)
    model = config.model.model_validate({"path": str(llama), "init": "pretrained"})
    photon.train(config.model_copy(update={"model": model}), run_dir=tmp_path / "run")
    ours = load_weights(tmp_path / "run")[0]
    first = AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.equal(ours.state_dict()[HEAD], first.state_dict()[HEAD])
    assert json.loads((tmp_path / "run/summary.json").read_text())["global_loss"] > 0


def test_key_tensors_are_merged_by_their_rule_and_others_as_ever(llama, run, tmp_path):
    one = ("federation.rounds=1", "parts.key=['*norm*']")
    run(llama, tmp_path / "mean", one[0])
    run(llama, tmp_path / "key", *one, "parts.key_rule=median")
    mean, key = (load_weights(tmp_path / name)[0].state_dict() for name in ("mean", "key"))
    differ = {name for name in mean if not torch.equal(mean[name], key[name])}
    assert differ == {name for name in mean if "norm" in name}


def test_with_local_embeddings_only_the_body_is_shared(three_silos, tmp_path):
    """recipes/dept.toml, and DEPT's GLOB, as the recipe says it is had."""
    recipe = Path(__file__).parents[2] / "recipes/dept.toml"
    short = [
        *QUICK,
        "local.warmup_steps=0",
        f"data.path={three_silos}",
        "data.sequence_length=16",
        "compute.threads=1",
    ]
    config = load_run_config(recipe, short)
    result = photon.simulate(config, run_dir=tmp_path / "run")
    silos = ("blue", "green", "red")
    models = [load_weights(tmp_path / "run", silo)[0] for silo in silos]
    own = {
        name
        for name, tensor in models[0].named_parameters()
        if not all(torch.equal(tensor, other.get_parameter(name)) for other in models[1:])
    }
    (name,) = own
    embedding = models[0].get_input_embeddings().weight
    assert models[0].get_parameter(name) is embedding
    assert models[0].get_output_embeddings().weight is embedding
    with pytest.raises(ModelError, match="has a model of its own"):
        photon.export(tmp_path / "run", tmp_path / "out")
    photon.export(tmp_path / "run", tmp_path / "out", of="blue")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight
    assert torch.equal(out, embedding)
    # The silos' own scores as one: of all their text, so it compares over any vocabularies.
    scores = {one.silo: one for one in read_history(tmp_path / "run").of(Evaluated)}
    sizes = [one.loss * one.tokens / one.bits_per_byte for one in map(scores.get, silos)]
    bits = [scores[silo].bits_per_byte * size for silo, size in zip(silos, sizes, strict=True)]
    assert scores[None].bits_per_byte == pytest.approx(sum(bits) / sum(sizes))
    shared = load_run_config(recipe, [*short, "parts.personal=[]"])
    all_of_it = photon.simulate(shared, run_dir=tmp_path / "glob").summary
    saved = all_of_it["bytes_up"] - result.summary["bytes_up"]
    assert saved == pytest.approx(2 * 3 * 4 * embedding.numel(), rel=2e-3)  # and names
