"""What of a model is carried from place to place, and what of that is trained."""

from __future__ import annotations

import torch
from torch import nn

from photon.config import ModelConfig
from photon.models import (
    build_model,
    build_skeleton,
    carried_tensors,
    trainable_parameters,
)


class Mixed(nn.Module):
    """A tied weight, a frozen one, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.inner = nn.Linear(2, 2)
        self.inner.bias.requires_grad_(False)
        self.inner.register_buffer("load", torch.zeros(2))
        self.inner.register_buffer("frequencies", torch.ones(2), persistent=False)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight


def test_all_that_is_kept_is_carried_once():
    model = Mixed()
    carried = carried_tensors(model)
    assert list(carried) == ["embedding.weight", "inner.weight", "inner.bias", "inner.load"]
    assert carried["embedding.weight"] is model.head.weight
    assert carried["inner.load"] is model.inner.load
    assert list(trainable_parameters(model)) == ["embedding.weight", "inner.weight"]
    assert {
        name: carried[name] for name in list(trainable_parameters(model))
    } == trainable_parameters(model)


def test_a_skeleton_carries_what_its_model_does():
    config = ModelConfig(preset="tiny")
    whole = build_model(config, vocab_size=64, sequence_length=16, eos_id=0, seed=0)
    skeleton = build_skeleton(config, vocab_size=64, sequence_length=16, eos_id=0)
    shapes = [
        [(name, tensor.shape) for name, tensor in carried_tensors(one).items()]
        for one in (whole, skeleton)
    ]
    assert shapes[0] == shapes[1]
    assert [name for name, _ in shapes[0]] == list(trainable_parameters(whole))
