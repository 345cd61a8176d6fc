"""Models of a folder or of the hub: their own weights, or an error that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from built_models import VOCABULARY, ConfigOf, build, pretrained, skeleton_of, weights
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MixtralConfig, T5Config

from photon.config import ModelConfig
from photon.errors import ModelError
from photon.models import load_pretrained, tokenizer_file_of


def test_pretrained_weights_are_the_folders(folders: dict[str, Path], config_of: ConfigOf) -> None:
    for name in ("gpt2", "mistral", "qwen2"):
        found = weights(build(config_of(f"{name}-pretrained")))
        saved = weights(AutoModelForCausalLM.from_pretrained(folders[name]))
        assert found.keys() == saved.keys()
        assert all(found[key].equal(saved[key]) for key in saved)


def test_bf16_weights_are_read_as_fp32(folders: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders["qwen2"]).bfloat16().save_pretrained(tmp_path)
    for init in ("pretrained", "random"):
        model = build(ModelConfig.model_validate({"path": str(tmp_path), "init": init}))
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def copy_of(folder: Path, tmp_path: Path, **config: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return copy


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        build(pretrained(tmp_path))


def test_a_configuration_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        build(pretrained(tmp_path))


def test_a_configuration_without_a_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="model_type"):
        build(pretrained(tmp_path))


def test_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron9000"}')
    with pytest.raises(ModelError, match="perceptron9000"):
        build(pretrained(tmp_path))


def test_values_that_can_not_be(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["qwen2"], tmp_path, hidden_size="wide")
    with pytest.raises(ModelError, match="can't be loaded"):
        build(pretrained(folder))


def test_a_model_that_is_not_a_causal_lm(tmp_path: Path) -> None:
    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'t5', not a causal"):
        build(ModelConfig(path=str(tmp_path)))


def test_an_encoder_would_read_the_answer(tmp_path: Path) -> None:
    BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="looks at later tokens"):
        build(ModelConfig(path=str(tmp_path)))


def test_a_model_that_wants_to_run_code(folders: dict[str, Path], tmp_path: Path) -> None:
    auto = {"AutoModelForCausalLM": "evil.Model"}
    folder = copy_of(folders["qwen2"], tmp_path, auto_map=auto)
    with pytest.raises(ModelError, match="never runs"):
        build(pretrained(folder))


def test_a_quantised_model(folders: dict[str, Path], tmp_path: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    folder = copy_of(folders["qwen2"], tmp_path, quantization_config=quantised)
    with pytest.raises(ModelError, match="quantised"):
        build(pretrained(folder))


def test_cut_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["qwen2"], tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match="can't be loaded") as raised:
        build(pretrained(folder))
    assert "cut or damaged" in str(raised.value)


def test_no_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["qwen2"], tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded"):
        build(pretrained(folder))
    build(ModelConfig(path=str(folder)))


def test_missing_weights_are_never_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["mistral"], tmp_path, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no weights for tensors 'model.layers.2"):
        build(pretrained(folder))


def test_weights_of_another_shape(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["qwen2"], tmp_path, intermediate_size=128)
    with pytest.raises(
        ModelError, match=r"mlp.*has shape \(32, 64\), config.json says \(32, 128\)"
    ):
        build(pretrained(folder))


def saved_llama(folder: Path, edit: Callable[[Any], None] = lambda _: None, **settings: Any) -> Any:
    """A llama of two layers in a folder, its weights edited first."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | settings)))
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)


def test_tensors_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    """Layers or biases that config.json does not know would be dropped without a word."""
    saved_llama(tmp_path / "layers")
    saved_llama(tmp_path / "biases", attention_bias=True)
    for name, config, tensor in (
        ("layers", {"num_hidden_layers": 1}, r"model\.layers\.1\."),
        ("biases", {"attention_bias": False}, r"proj\.bias"),
    ):
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        with pytest.raises(ModelError, match=f"no place for tensors '.*{tensor}"):
            build(pretrained(tmp_path / name))


def test_a_head_of_its_own_under_a_tied_flag_is_refused(tmp_path: Path) -> None:
    saved_llama(tmp_path, lambda model: model.lm_head.weight.fill_(0.5))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"of its own for 'lm_head\.weight'"):
        build(pretrained(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_told_as_that(tmp_path: Path, value: float) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value

    saved_llama(tmp_path, spoil)
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' holds NaN"):
        build(pretrained(tmp_path))


def test_a_loss_of_the_configuration_is_never_dropped(tmp_path: Path) -> None:
    MixtralConfig(output_router_logits=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="loss that balances its experts"):
        skeleton_of(ModelConfig(path=str(tmp_path)))


def test_a_folder_that_is_not_there() -> None:
    for path in ("./nowhere/model", "/nowhere/model", "~/no/model", "a/b/c"):
        with pytest.raises(ModelError, match="does not exist"):
            build(ModelConfig(path=path))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(ModelError, match="is a file"):
        build(ModelConfig(path=str(tmp_path / "model")))


def test_a_hub_name_that_can_not_be_reached() -> None:
    with pytest.raises(ModelError, match="nobody/nothing") as raised:
        build(ModelConfig(path="hf:nobody/nothing"))
    assert "hub" in str(raised.value)
    with pytest.raises(ModelError, match="no model on the hub"):
        build(ModelConfig(path="hf:../nothing"))


def test_only_a_name_that_says_so_is_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_up(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", looked_up)
    for path in ("runs/frist", "gpt2"):
        with pytest.raises(ModelError, match=f"'{path}' does not exist"):
            build(ModelConfig(path=path))
        with pytest.raises(ModelError, match=f"'{path}' does not exist"):
            load_pretrained(path)


def test_a_local_folder_never_asks_the_network(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in folders:
        build(pretrained(folders[name]))


def test_the_tokenizer_of_a_local_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    assert tokenizer_file_of(str(folders["gpt2"])) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_file_of(str(tmp_path)) == tmp_path / "tokenizer.json"


def test_the_tokenizer_of_a_model_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else pretrained weights could be trained on another tokenizer's tokens."""
    assert tokenizer_file_of("hf:owner/name") is None  # nothing known of it, and offline
    cached = tmp_path / "models--owner--name"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("a" * 40)
    (snapshot / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert tokenizer_file_of("hf:owner/name") == snapshot / "tokenizer.json"
