"""A tokenizer and small Hugging Face folders, made here; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config

from photon.config import ModelConfig

VOCABULARY = 320
LENGTH = 32
TEXT = [
    "The silo keeps its text; the model travels.",
    "Rounds are rare, and every update is a pseudo-gradient.",
]
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    ),
    "mistral": MistralConfig(
        vocab_size=VOCABULARY, intermediate_size=64, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, **SMALL,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCABULARY, intermediate_size=64, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, **SMALL,
    ),
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    # huggingface_hub reads HF_HUB_OFFLINE once, when it is imported: too early for a fixture.
    import huggingface_hub.constants as constants

    constants.HF_HUB_OFFLINE = True


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of at most 320 tokens, id 0 = <|endoftext|>; tokenizer.json alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def put_around() -> Callable[[Tokenizer, str], None]:
    """Makes a tokenizer begin and close each text with a token, as many do."""

    def put(tokenizer: Tokenizer, token: str) -> None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A {token}", special_tokens=[(token, tokenizer.token_to_id(token))]
        )

    return put


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model with random weights per entry of CONFIGS."""
    made = {}
    for name, config in CONFIGS.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


FAMILIES = [
    "llama", "mpt", "gpt2-random", "gpt2-pretrained", "mistral-random", "mistral-pretrained",
    "qwen2-random", "qwen2-pretrained",
]  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def config_of(folders: dict[str, Path]) -> Callable[[str], ModelConfig]:
    """[model] of a name in FAMILIES."""

    def config(family: str) -> ModelConfig:
        if family in ("llama", "mpt"):
            return ModelConfig.model_validate({"preset": "tiny", "family": family})
        name, _, init = family.partition("-")
        return ModelConfig.model_validate({"path": str(folders[name]), "init": init})

    return config
