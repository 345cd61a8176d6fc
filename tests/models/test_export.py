"""Train -> export -> transformers: the same logits, tokens and ties, for every family."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from photon.config import ModelConfig
from photon.errors import DiskFullError, ModelError
from photon.models import build_model, export_model, license_of
from photon.models import export as export_module

VOCABULARY, LENGTH = 320, 32  # of conftest.py
README = "# A model\n"
ConfigOf = Callable[[str], ModelConfig]


def trained(config: ModelConfig) -> Any:
    """A model whose every weight has moved."""
    model = build_model(config, vocab_size=VOCABULARY, sequence_length=LENGTH, eos_id=0, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % VOCABULARY
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits


def test_logits_are_equal_in_transformers(
    family: str, config_of: ConfigOf, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = trained(config_of(family))
    out = tmp_path / "out"
    export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    # Same code, same weights, same order of operations: equal, not close.
    assert logits(loaded).equal(logits(model))
    named = dict(loaded.named_parameters())
    assert all(named[n].equal(p) for n, p in model.named_parameters())
    assert {p.dtype for p in named.values()} == {torch.float32}


def test_ties_survive(
    family: str, config_of: ConfigOf, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_model(trained(config_of(family)), out, tokenizer_folder=tokenizer_folder, readme=README)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (not family.startswith("mistral"))
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118


def test_an_export_is_a_model_to_train_on(
    family: str, config_of: ConfigOf, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = trained(config_of(family))
    out = tmp_path / "out"
    export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README)
    again = trained(ModelConfig(path=str(out), init="random"))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    kept = build_model(
        ModelConfig(path=str(out), init="pretrained"),
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        eos_id=0,
        seed=0,
    )
    assert logits(kept).equal(logits(model))


@pytest.fixture
def model() -> Any:
    return trained(ModelConfig(preset="tiny"))


@pytest.fixture
def out(model: Any, tokenizer_folder: Path, tmp_path: Path) -> Path:
    export_model(model, tmp_path / "out", tokenizer_folder=tokenizer_folder, readme=README)
    return tmp_path / "out"


def test_the_tokenizer_gives_the_tokens_of_training(out: Path, tokenizer_folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(out)
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for text in ("The silo keeps its text.", "  two  spaces\n\n", "naïve ☃", "<|endoftext|>a"):
        assert loaded(text)["input_ids"] == raw.encode(text).ids
        assert loaded.decode(raw.encode(text).ids) == text


def test_a_tokenizers_own_files_are_kept_and_nothing_else(
    model: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_bytes(b"weights of another model")
    (source / "config.json").write_text("{}")
    out = tmp_path / "out"
    export_model(model, out, tokenizer_folder=source, readme=README)
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"


def test_what_a_tokenizer_would_put_around_a_text_is_taken_out(
    model: Any,
    tokenizer_folder: Path,
    put_around: Callable[[Tokenizer, str], None],
    tmp_path: Path,
) -> None:
    """Training never saw it: a first token before a prompt, an end that closes it."""
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    text = "The silo keeps its text."
    expected = raw.encode(text).ids
    put_around(raw, "<|endoftext|>")
    assert raw.encode(text).ids == [0, *expected, 0]
    source = tmp_path / "tokenizer"
    source.mkdir()
    raw.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    settings["bos_token"] = "!"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export_model(model, tmp_path / "out", tokenizer_folder=source, readme=README)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(text)["input_ids"] == expected
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for ids in (exported.config, exported.generation_config):  # as the tokenizer says, not before
        assert ids.bos_token_id == loaded.bos_token_id == raw.token_to_id("!") != 0
        assert ids.eos_token_id == loaded.eos_token_id == 0


def test_a_batch_of_prompts_goes_through_a_pipeline(out: Path) -> None:
    (out / "tokenizer_config.json").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    again = out.parent / "again"
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    export_model(trained(ModelConfig(preset="tiny")), again, tokenizer_folder=out, readme=README)
    write = pipeline("text-generation", model=str(again), device="cpu")
    prompts = ["The silo", "Rounds are rare, and every update"]
    together = write(prompts, batch_size=2, max_new_tokens=4, do_sample=False)
    for prompt, made in zip(prompts, together, strict=True):
        assert write(prompt, max_new_tokens=4, do_sample=False) == made
    # No row of the embedding is left out when the export is trained on.
    kept = ModelConfig(path=str(again), init="pretrained")
    model = build_model(kept, vocab_size=VOCABULARY, sequence_length=LENGTH, eos_id=0, seed=0)
    assert model.get_input_embeddings().padding_idx is None


def test_everybody_may_read_it_whom_the_umask_lets(
    model: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        export_model(model, tmp_path / "out", tokenizer_folder=tokenizer_folder, readme=README)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_the_configuration_suits_servers(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float32"
    assert config["use_cache"] is True
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == LENGTH
    assert config["eos_token_id"] == 0
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["use_cache"] is True
    assert generation["eos_token_id"] == 0


def test_bfloat16_halves_the_weights(model: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README, dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(model.get_parameter(name).bfloat16())
    assert model.dtype == torch.float32


def test_large_models_are_sharded(model: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README, max_shard_size="1MB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").exists()
    assert logits(AutoModelForCausalLM.from_pretrained(out)).equal(logits(model))


def test_exporting_leaves_the_model_as_it_was(
    model: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    before, config = logits(model), model.config.to_dict()
    model.train()
    for dtype in ("float32", "bfloat16"):
        export_model(
            model, tmp_path / dtype, tokenizer_folder=tokenizer_folder, readme=README, dtype=dtype
        )
    assert model.config.to_dict() == config
    assert model.training
    assert logits(model).equal(before)


def test_the_licence_of_a_folder_is_its_readmes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A card\n")
    assert license_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("# A card\n\nlicense: of another kind\n")
    assert license_of(tmp_path) is None
    assert license_of(tmp_path / "nowhere") is None


def test_what_is_there_is_kept(out: Path, model: Any, tokenizer_folder: Path) -> None:
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match=r"already exists\n.* overwrite"):
        export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README)
    assert (out / "mine.txt").read_text() == "keep"


def test_overwriting_leaves_nothing_of_the_old(
    out: Path, model: Any, tokenizer_folder: Path
) -> None:
    (out / "mine.txt").write_text("old")
    export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_only_a_model_folder_is_overwritten(
    model: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="not a model folder"):
        export_model(
            model, tmp_path, tokenizer_folder=tokenizer_folder, readme=README, overwrite=True
        )
    assert (tmp_path / "thesis.tex").exists()


def test_a_tokenizer_folder_without_a_tokenizer(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        export_model(model, tmp_path / "out", tokenizer_folder=tmp_path, readme=README)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ValueError("odd"), ModelError),
        (OSError(28, "No space left on device"), DiskFullError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_nothing_behind(
    failure: BaseException,
    kind: type[BaseException],
    model: Any,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fired = []

    def fail(*_: object) -> None:
        fired.append(True)
        raise failure

    monkeypatch.setattr(export_module, "_save_weights", fail)
    with pytest.raises(kind):
        export_model(model, tmp_path / "out", tokenizer_folder=tokenizer_folder, readme=README)
    assert fired
    assert list(tmp_path.iterdir()) == []


def test_a_failed_swap_gives_the_old_model_back(
    out: Path, model: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "mine.txt").write_text("old")
    rename = Path.rename
    fired = []

    def fail(self: Path, target: Path) -> Path:
        if (self / "README.md").exists() and self != out and self.suffix != ".old":
            fired.append(True)
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ModelError, match="can't be exported"):
        export_model(model, out, tokenizer_folder=tokenizer_folder, readme=README, overwrite=True)
    assert fired
    assert (out / "mine.txt").read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_too_little_room_is_said_before_writing(
    model: Any, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("photon.store.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskFullError, match=r"exporting needs 0\.0\d GB at .*, 0\.00 GB are free"):
        export_model(model, tmp_path / "out", tokenizer_folder=tokenizer_folder, readme=README)
    assert list(tmp_path.iterdir()) == []


def test_exporting_is_silent(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert out.exists()
    assert capfd.readouterr() == ("", "")
