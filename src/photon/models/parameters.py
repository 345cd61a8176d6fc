"""What is in a model: names, shapes, and which weights are which."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

#: Keys of a configuration that say who wrote it, or how it is run.
_NOT_MATHS = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


def trainable_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that want gradients, by name; a tied weight once, under its first name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def carried_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a model's values are, by name: parameters, frozen ones too, and persistent buffers.

    References, in the order of the modules. A tensor that stands in several places (a tied weight)
    is there once, under its first name. Buffers that the architecture fills in by itself
    (non-persistent ones) are left out.
    """
    names: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name] for name in names.values()}


def model_fingerprint(module: torch.nn.Module) -> str:
    """sha256 (hex) of what a model is but for its weights: equal means updates can be merged.

    That is the sorted parameter names and shapes, and a Hugging Face model's configuration: two
    bases of rotary positions, for instance, have the same shapes and are two models.
    """
    shapes = sorted((name, list(p.shape)) for name, p in module.named_parameters())
    config: Any = getattr(module, "config", None)
    written = config.to_json_string(use_diff=False) if config is not None else "{}"
    facts = [shapes, _architecture(json.loads(written))]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _architecture(config: Any) -> Any:
    """A configuration without what says nothing of the model's maths."""
    if not isinstance(config, dict):
        return config
    return {
        key: _architecture(value)
        for key, value in config.items()
        if key not in _NOT_MATHS and not key.startswith("_")
    }


def hidden_matrices(module: Any) -> list[str]:
    """Names of the trainable 2-D weights that are neither embeddings nor the output head.

    These are what Muon orthogonalises; GPT-2's transposed Conv1D weights count, position
    embeddings don't, nor do experts stacked into 3-D weights.
    """
    excluded = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, torch.nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    for part in (module.get_input_embeddings(), module.get_output_embeddings()):
        if part is not None:
            excluded.update(id(parameter) for parameter in part.parameters())
    return [
        name
        for name, parameter in trainable_parameters(module).items()
        if parameter.ndim == 2 and id(parameter) not in excluded
    ]


def transformer_blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A model's repeated layers, in order: what is sharded, recomputed and compiled one by one."""
    stacks = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in stack.parameters()) for stack in stacks]
    return list(stacks[sizes.index(max(sizes))]) if stacks else []
