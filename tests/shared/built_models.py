"""Models built from [model] in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from photon.config import ModelConfig
from photon.models import build_model, build_skeleton

VOCABULARY, LENGTH = 320, 32  # of tests/models/conftest.py
ConfigOf = Callable[[str], ModelConfig]


def build(config: ModelConfig, seed: int = 0, **changes: Any) -> Any:
    settings = {"vocab_size": VOCABULARY, "sequence_length": LENGTH, "eos_id": 0, "seed": seed}
    return build_model(config, **{**settings, **changes})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def pretrained(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), init="pretrained")


def skeleton_of(config: ModelConfig) -> Any:
    return build_skeleton(config, vocab_size=VOCABULARY, sequence_length=LENGTH, eos_id=0)
