"""How many floating-point operations a training token costs: the stated count behind MFU.

Model FLOPs as PaLM counts them (arXiv 2204.02311, appendix B): what the mathematics needs, not what
the hardware does, so recomputed activations and the optimizer's few operations do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FlopCount:
    """Model FLOPs of one token, forward and backward. A multiply-add is two.

    Attributes:
        trained_weights: weights N a token meets in a product and that get a gradient.
        frozen_weights: weights a token meets that get none.
        layers: transformer blocks with attention.
        attention_width: heads x width of a head; d_model in most models, but not in all.
        sequence_length: tokens that attend to each other.
    """

    trained_weights: int
    frozen_weights: int
    layers: int
    attention_width: int
    sequence_length: int

    @property
    def per_token(self) -> int:
        """FLOPs of one training token.

        6 N trained: 2 forward, 2 for the input's gradient, 2 for the weight's; 4 N frozen.
        12 x layers x attention width x sequence length: Q K^T and P V, forward and backward.
        """
        weights = 6 * self.trained_weights + 4 * self.frozen_weights
        return weights + 12 * self.layers * self.attention_width * self.sequence_length

    def explain(self) -> str:
        """The count and its conventions, in words."""
        frozen = f" + 4 x {self.frozen_weights:,} frozen" if self.frozen_weights else ""
        return (
            f"{self.per_token:,} FLOPs per token = 6 x {self.trained_weights:,} weights{frozen} "
            f"+ 12 x {self.layers} layers x {self.attention_width} x {self.sequence_length} "
            "(attention). Without the input embedding, a look-up; with the output head, a product, "
            "tied or not. Attention counts the full matrix, as PaLM and nanoGPT do: a causal "
            "kernel does half of it. Recomputed activations don't count."
        )


def count_flops(model: Any, sequence_length: int) -> FlopCount:
    """The count of a Hugging Face causal LM, on any device, meta too.

    What counts is in `FlopCount.explain`. (PaLM's N and nanoGPT's leave out position embeddings;
    their one embedding matrix is tied, and counted as the head.) Of stacked experts those count
    that a token is sent to. A frozen weight counts 4: it still hands the gradient on; where nothing
    below it is trained that is 2 too many.
    """
    config = model.config.get_text_config()
    met = {True: 0.0, False: 0.0}  # by whether they are trained
    for parameter, share in _met_weights(model, config):
        met[parameter.requires_grad] += parameter.numel() * share
    # State-space models have no attention to count.
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    head_width = getattr(config, "head_dim", None) or int(config.hidden_size) // max(1, heads)
    return FlopCount(
        trained_weights=round(met[True]),
        frozen_weights=round(met[False]),
        layers=int(config.num_hidden_layers),
        attention_width=heads * int(head_width),
        sequence_length=sequence_length,
    )


def _met_weights(model: Any, config: Any) -> list[tuple[nn.Parameter, float]]:
    """Weights a token is multiplied with, each once, and the share of tokens that meets it."""
    head = model.get_output_embeddings()
    looked_up = {
        id(parameter)
        for part in model.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    } - {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen else 1.0
    return [
        (parameter, share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if id(parameter) not in looked_up
    ]
