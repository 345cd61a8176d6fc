"""Sampling from an exported folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon import products
from photon.config import ModelConfig
from photon.errors import DataNotFoundError, InvalidValueError, ModelError
from photon.models import build_model, export_model

VOCABULARY, LENGTH = 320, 32  # of conftest.py


@pytest.fixture(scope="module")
def exported(
    folders: dict[str, Path], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A random model per family, in a folder."""
    made = {}
    configs = {
        "llama": ModelConfig(preset="tiny"),
        "mpt": ModelConfig(preset="tiny", family="mpt"),
        "gpt2": ModelConfig(path=str(folders["gpt2"])),
    }
    for name, config in configs.items():
        model = build_model(config, vocab_size=VOCABULARY, sequence_length=LENGTH, eos_id=0, seed=0)
        made[name] = tmp_path_factory.mktemp("exported") / name
        export_model(model, made[name], tokenizer_folder=tokenizer_folder, readme="")
    return made


def generate(folder: Path, prompt: str = "The silo", **changes: Any) -> str:
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return products.generate(folder, prompt, **(settings | changes))


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "mpt", "gpt2"])
def test_the_seed_decides_the_text(exported: dict[str, Path], name: str) -> None:
    folder = exported[name]
    torch.manual_seed(1)
    one = generate(folder, seed=4)
    torch.manual_seed(2)
    assert generate(folder, seed=4) == one
    assert len({generate(folder, seed=s) for s in range(4)}) > 1


def test_no_global_random_state_is_touched(exported: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    generate(exported["llama"])
    assert torch.get_rng_state().equal(before)


def test_temperature_0_is_the_likeliest_token(exported: dict[str, Path]) -> None:
    folder = exported["llama"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tokenizer_of(folder)
    ids = tokenizer("The silo")["input_ids"]
    start = len(ids)
    for _ in range(5):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:])
    for seed in (0, 1):
        assert generate(folder, temperature=0.0, max_new_tokens=5, seed=seed) == expected
    assert generate(folder, top_k=1, max_new_tokens=5) == expected
    assert generate(folder, top_p=1e-6, max_new_tokens=5) == expected


def test_only_the_continuation_comes_back(exported: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(exported["llama"])
    text = generate(exported["llama"], temperature=0.0)
    assert "The silo" not in text
    assert len(tokenizer(text)["input_ids"]) >= 1


@pytest.mark.parametrize("name", ["llama", "mpt", "gpt2"])
def test_an_empty_prompt_starts_a_document(exported: dict[str, Path], name: str) -> None:
    assert isinstance(generate(exported[name], prompt=""), str)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_writes_on_past_the_context(exported: dict[str, Path], name: str) -> None:
    """GPT-2 has no embedding for position 32: reaching it would be an IndexError."""
    short = generate(exported[name], max_new_tokens=20, temperature=0.0)
    long = generate(exported[name], max_new_tokens=100, temperature=0.0)
    assert long.startswith(short)
    assert len(long) > 2 * len(short)
    assert isinstance(generate(exported[name], prompt="The silo keeps. " * 40), str)


def test_it_stops_at_the_end_of_text(
    folders: dict[str, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = build_model(
        ModelConfig(preset="tiny"), vocab_size=VOCABULARY, sequence_length=LENGTH, eos_id=0, seed=0
    )
    # A residual stream pointing along the end-of-text row, whatever was read.
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.copy_(torch.nn.functional.normalize(embedding[:1].clone(), dim=-1))
        embedding[1:] *= 0.1
    export_model(model, tmp_path / "out", tokenizer_folder=tokenizer_folder, readme="")
    assert generate(tmp_path / "out", temperature=0.0, max_new_tokens=50) == ""


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_settings_out_of_bounds(exported: dict[str, Path], setting: str, value: float) -> None:
    with pytest.raises(InvalidValueError, match=setting):
        generate(exported["llama"], **{setting: value})


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", Path("owner/name")):
        with pytest.raises(ModelError, match="no run or model"):
            generate(folder)


def test_a_folder_without_a_tokenizer(exported: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(exported["llama"], tmp_path / "copy")
    for file in (tmp_path / "copy").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataNotFoundError, match="tokenizer"):
        generate(tmp_path / "copy")


def test_a_prompt_is_cut_as_text_was_for_training(
    exported: dict[str, Path],
    put_around: Callable[[Tokenizer, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is put around it, and a special token that it spells is text."""
    folder = shutil.copytree(exported["llama"], tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "The silo <|endoftext|> keeps"
    plain = tokenizer.encode("The silo <").ids[:-1]
    put_around(tokenizer, "<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    started: list[list[int]] = []

    def note(model: Any, start: list[int], ends: set[int], **_: Any) -> list[int]:
        started.append(start)
        assert ends == {0}
        return start

    monkeypatch.setattr(products, "generate_tokens", note)
    for prompt in (text, ""):
        generate(folder, prompt)
    assert started[0][: len(plain)] == plain
    assert 0 not in started[0]
    assert started[1] == [0]  # what stands before a document


def test_it_is_silent(exported: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    for name in exported:
        generate(exported[name], max_new_tokens=40, temperature=0.0)
        generate(exported[name], max_new_tokens=40)
    assert capfd.readouterr() == ("", "")
