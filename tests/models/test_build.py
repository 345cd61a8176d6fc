"""From [model] to a module: shapes, seeds, skeletons, attention."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built_models import LENGTH, VOCABULARY, ConfigOf, build, pretrained, skeleton_of, weights
from transformers import ApertusConfig, AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from photon.config import ModelConfig
from photon.config.run import PRESETS
from photon.errors import ModelError, VocabularyMismatchError
from photon.models import (
    SHAPES,
    build_skeleton,
    context_length,
    hidden_matrices,
    model_fingerprint,
    require_document_masks,
    trainable_parameters,
    transformer_blocks,
)
from photon.training import materialise


def parameter_count(config: ModelConfig, **sizes: Any) -> int:
    skeleton = build_skeleton(config, eos_id=0, **sizes)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def test_the_table_holds_every_preset_of_the_config() -> None:
    assert tuple(SHAPES) == PRESETS


@pytest.mark.parametrize("family", ["llama", "mpt"])
@pytest.mark.parametrize(
    ("preset", "billions"), [("125m", 0.125), ("1.3b", 1.32), ("3b", 2.65), ("7b", 6.66)]
)
def test_presets_have_the_papers_parameter_counts(
    preset: str, billions: float, family: str
) -> None:
    config = ModelConfig.model_validate({"preset": preset, "family": family})
    count = parameter_count(config, vocab_size=50_368, sequence_length=2048)
    assert count == pytest.approx(billions * 1e9, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_tiny_is_about_a_million(family: str) -> None:
    config = ModelConfig.model_validate({"preset": "tiny", "family": family})
    count = parameter_count(config, vocab_size=2048, sequence_length=128)
    assert count == pytest.approx(1e6, rel=0.1)
    model = build(config, vocab_size=2048, sequence_length=128)
    assert count == sum(p.numel() for p in model.parameters())


def test_swiglu_costs_about_what_expansion_4_does() -> None:
    for shape in SHAPES.values():
        assert 3 * shape.swiglu_width == pytest.approx(8 * shape.d_model, rel=0.02)


def test_it_is_fp32_training_and_uncached(family: str, config_of: ConfigOf) -> None:
    model = build(config_of(family))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.training
    assert model.config.use_cache is False
    tokens = torch.arange(LENGTH + 1).unsqueeze(0)
    assert model(input_ids=tokens[:, :-1]).logits.shape == (1, LENGTH, VOCABULARY)


def test_the_seed_alone_decides_random_weights(family: str, config_of: ConfigOf) -> None:
    config = config_of(family)
    torch.manual_seed(1)
    one = weights(build(config, seed=5))
    torch.manual_seed(2)
    same = weights(build(config, seed=5))
    other = weights(build(config, seed=6))
    assert all(one[name].equal(same[name]) for name in one)
    pretrained = family.endswith("pretrained")
    assert all(one[name].equal(other[name]) for name in one) == pretrained


def test_no_global_random_state_is_touched(family: str, config_of: ConfigOf) -> None:
    config = config_of(family)
    torch.manual_seed(3)
    np.random.seed(3)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    build(config, seed=11)
    assert torch.get_rng_state().equal(before)
    assert (np.random.get_state()[1] == before_numpy).all()


def test_a_random_model_takes_the_datas_end_of_text(config_of: ConfigOf) -> None:
    for family in ("llama", "mpt", "qwen2-random"):
        model = build(config_of(family), eos_id=3)
        assert model.config.eos_token_id == model.config.bos_token_id == 3
        assert model.generation_config.eos_token_id == 3
        assert model.get_input_embeddings().padding_idx is None


def test_tied_weights_come_once(family: str, config_of: ConfigOf) -> None:
    model = build(config_of(family))
    named = trainable_parameters(model)
    assert len({p.data_ptr() for p in named.values()}) == len(named)
    tied = not family.startswith("mistral")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert ("lm_head.weight" in named) == (not tied)


def test_frozen_parameters_are_not_trainable(config_of: ConfigOf) -> None:
    model = build(config_of("gpt2-random"))
    model.transformer.wpe.weight.requires_grad_(False)
    assert "transformer.wpe.weight" not in trainable_parameters(model)


@pytest.mark.parametrize(
    ("family", "per_layer", "layers"),
    [("llama", 7, 4), ("mpt", 4, 4), ("gpt2-random", 4, 2), ("mistral-random", 7, 2)],
)
def test_hidden_matrices_are_those_of_the_blocks(
    family: str, per_layer: int, layers: int, config_of: ConfigOf
) -> None:
    model = build(config_of(family))
    names = hidden_matrices(model)
    named = trainable_parameters(model)
    assert len(names) == per_layer * layers
    assert all(named[name].ndim == 2 for name in names)
    rest = {n for n, p in named.items() if p.ndim == 2} - set(names)
    assert all(any(e in n for e in ("embed", "wte", "wpe", "lm_head")) for n in rest)
    assert len(rest) == {"gpt2-random": 2, "mistral-random": 2}.get(family, 1)


def test_the_fingerprint_is_of_names_and_shapes() -> None:
    tiny = ModelConfig(preset="tiny")
    one = model_fingerprint(build(tiny, seed=0))
    assert one == model_fingerprint(build(tiny, seed=1)), "not of values"
    assert one != model_fingerprint(build(tiny, vocab_size=VOCABULARY + 8))
    assert one != model_fingerprint(build(ModelConfig(preset="tiny", family="mpt")))
    assert len(one) == 64


def test_a_smaller_vocabulary_than_the_datas_is_refused(config_of: ConfigOf) -> None:
    config = config_of("qwen2-random")
    with pytest.raises(VocabularyMismatchError, match="knows 320 tokens, the data 321"):
        build(config, vocab_size=VOCABULARY + 1)
    build(config, vocab_size=VOCABULARY - 20)


def test_a_sequence_longer_than_the_model_is_refused(config_of: ConfigOf) -> None:
    with pytest.raises(ModelError, match="33 exceeds the 32 positions"):
        build(config_of("gpt2-random"), sequence_length=33)
    for family in ("llama", "mpt"):
        model = build(config_of(family), sequence_length=2100, vocab_size=300)
        assert model(input_ids=torch.zeros(1, 2100, dtype=torch.int64)).logits.shape[1] == 2100


DEEPSEEK = DeepseekV3Config(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, q_lora_rank=8,
    kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
    n_shared_experts=1,
)  # fmt: skip
APERTUS = ApertusConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("config", [DEEPSEEK, APERTUS], ids=["deepseek", "apertus"])
def test_a_skeleton_has_the_buffers_that_the_architecture_fills_in(
    config: Any, tmp_path: Path
) -> None:
    """Persistent ones, too: a routing bias of zeros, an activation's constants."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, skeleton = build(pretrained(tmp_path)), skeleton_of(pretrained(tmp_path))
    materialise(skeleton, torch.device("cpu"))
    found = dict(skeleton.named_buffers())
    assert any(name in skeleton.state_dict() for name in found)
    assert all(buffer.equal(found[name]) for name, buffer in model.named_buffers())


def test_building_is_silent(
    family: str, config_of: ConfigOf, capfd: pytest.CaptureFixture[str]
) -> None:
    build(config_of(family))
    assert capfd.readouterr() == ("", "")


def test_a_skeleton_is_the_model_without_its_weights(family: str, config_of: ConfigOf) -> None:
    """Filled with the model's weights it gives the model's logits: buffers are real."""
    config = config_of(family)
    model = build(config).eval()
    skeleton: Any = build_skeleton(
        config, vocab_size=VOCABULARY, sequence_length=LENGTH, eos_id=0
    ).eval()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    assert model_fingerprint(skeleton) == model_fingerprint(model)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    skeleton.tie_weights()
    tokens = torch.arange(LENGTH)[None] % VOCABULARY
    with torch.inference_mode():
        assert torch.equal(skeleton(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_skeleton_of_7b_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = ModelConfig(preset="7b")
    assert parameter_count(config, vocab_size=50_368, sequence_length=2048) > 6.5e9
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 500_000  # weights would take 26 million


def test_blocks_are_the_repeated_layers(family: str, config_of: ConfigOf) -> None:
    model = build(config_of(family))
    blocks = transformer_blocks(model)
    assert len(blocks) == model.config.get_text_config().num_hidden_layers
    assert len({type(block) for block in blocks}) == 1


def test_qk_norm_is_qwen3s(tmp_path: Path) -> None:
    model = build(ModelConfig(preset="tiny", qk_norm=True))
    assert model.config.model_type == "qwen3"
    names = [name for name in weights(model) if "q_norm" in name or "k_norm" in name]
    assert len(names) == 2 * 4  # layers
    plain = parameter_count(ModelConfig(preset="tiny"), vocab_size=320, sequence_length=32)
    assert sum(p.numel() for p in model.parameters()) == plain + 2 * 4 * 32  # head width
    model.save_pretrained(tmp_path)
    again = build(ModelConfig(path=str(tmp_path), init="pretrained"))
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_kernels_agree(attention: str) -> None:
    default, named = (
        build(ModelConfig(preset="tiny")),
        build(ModelConfig(preset="tiny"), attention=attention),
    )
    assert named.config._attn_implementation == attention
    tokens = torch.arange(LENGTH)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            named(input_ids=tokens).logits, default(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
        )


def test_attention_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ModelError, match=r"(?i)flash"):
        build(ModelConfig(preset="tiny"), attention="flash_attention_2")


def test_only_models_that_mask_documents_may_promise_it() -> None:
    require_document_masks(build(ModelConfig(preset="tiny")), "tiny")
    with pytest.raises(ModelError, match="cross from one document to the next"):
        require_document_masks(build(ModelConfig(preset="tiny", family="mpt")), "mpt")


@pytest.mark.parametrize(("stated", "limit"), [(-1, None), (0, None), (64, 64)])
def test_a_configuration_that_states_no_limit_has_none(stated: int, limit: int | None) -> None:
    config = LlamaConfig(max_position_embeddings=stated)
    assert context_length(config) == limit
