"""Every tensor has a role: what is merged, what stays with a silo, what never changes."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from photon.config import parse_run_config
from photon.config.parts import ROLES, PartsConfig
from photon.errors import ConfigError, IncompatibleConfigError, InvalidValueError
from photon.federation.layout import lay_out, layout_of
from photon.models import trainable_parameters

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def small(**settings):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | settings)))


def laid_out(**parts):
    return lay_out(small(), PartsConfig(**parts))


def test_each_tensor_has_one_role_and_is_shared_by_default():
    model = small()
    assert set(layout_of(model).roles.values()) == {"shared"}
    parts = PartsConfig(personal=["lm_head*"], key=["*norm*"], frozen=["model.embed*"])
    layout = lay_out(model, parts)
    assert layout is layout_of(model)
    assert layout.personal == (HEAD,)
    assert layout.named("frozen") == (EMBEDDING,)
    assert all("norm" in name for name in layout.named("key"))
    assert set(layout.merged) == set(layout.roles) - {HEAD, EMBEDDING}
    assert sum(len(layout.named(role)) for role in ROLES) == len(layout.roles)
    assert set(trainable_parameters(model)) == set(layout.roles) - {EMBEDDING}


def test_shares_take_whole_tensors_from_either_end_and_none_twice():
    both = laid_out(frozen=["first:0.4"], personal=["last:0.3"])
    names = list(both.roles)
    assert names[0] == EMBEDDING
    assert both.named("frozen") == tuple(names[: len(both.named("frozen"))])
    assert both.personal == tuple(names[-len(both.personal) :])
    # Where they meet, no tensor is in both and none in neither.
    assert not laid_out(personal=["first:0.7"], shared=["last:0.3"], frozen=["*"]).named("frozen")


def test_a_star_takes_what_no_other_list_names():
    layout = laid_out(frozen=["*"], shared=["*norm*"])
    assert all("norm" in name for name in layout.merged)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"personal": ["lm_head*"], "key": ["lm*"]}, r"parts\.key \('lm\*'\).*parts\.personal"),
        ({"personal": ["*"], "frozen": ["*"]}, r'parts\.personal and parts\.frozen both name "\*"'),
        ({"frozen": ["lm_hed*"]}, r"parts\.frozen names 'lm_hed\*'.*\n.*'?lm_head\.weight"),
        ({"personal": ["last:0.01"]}, r"which is less than half of that end's one tensor"),
        ({"personal": ["*"]}, r"leaves no tensor shared"),
    ],
)
def test_what_means_nothing_or_two_things_is_refused_by_name(parts, words):
    with pytest.raises(IncompatibleConfigError, match=words):
        laid_out(**parts)


def test_a_tied_head_is_named_by_the_embedding():
    with pytest.raises(IncompatibleConfigError, match=rf"'{HEAD}' is the same tensor.*embed_toke"):
        lay_out(small(tie_word_embeddings=True), PartsConfig(personal=["lm_head*"]))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["parts.personal=['last:1.5']"], InvalidValueError, "neither a shell pattern"),
        (["parts.key_rule=edit"], InvalidValueError, "not one of mean, median, trimmed_mean"),
        (["parts.personal=['a']", "eval.per_silo=false"], ConfigError, "whole global model"),
        (
            ["parts.personal=['a']", "federation.optimizer_state=average"],
            ConfigError,
            r"state of parts\.personal to the aggregator",
        ),
    ],
)
def test_a_run_file_that_can_not_be_is_refused_when_it_is_read(overrides, error, words):
    tree = {"model": {"preset": "tiny"}, "data": {"path": "data"}}
    with pytest.raises(error, match=words):
        parse_run_config(tree, overrides)


def test_pooled_text_has_nothing_personal():
    parts = PartsConfig(personal=["lm_head*"], key=["*norm*"], frozen=["*"]).pooled()
    layout = lay_out(small(), parts)
    assert HEAD in layout.named("shared")
    assert EMBEDDING in layout.named("frozen")
    assert not layout.personal
