"""The Photon paper's model shapes, as data, and what they are as Hugging Face configurations.

Shapes: arXiv 2411.02908, table of architectures; those below 75m are ours, for CPUs and tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, MptConfig, PretrainedConfig, Qwen3Config

from photon.config import ModelConfig

#: ALiBi extrapolates past the trained length, but transformers' MPT stops hard at max_seq_len.
_MPT_CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer's size.

    Args:
        d_model: width of the residual stream; d_model / heads is a head's.
        width_multiple: the SwiGLU width is rounded to a multiple of this.
    """

    layers: int
    d_model: int
    heads: int
    width_multiple: int = 64

    @property
    def swiglu_width(self) -> int:
        """Width of llama's MLP: three matrices as large as two at expansion 4, so 8/3 d_model."""
        return round(self.d_model * 8 / 3 / self.width_multiple) * self.width_multiple


SHAPES: dict[str, Shape] = {
    "mini": Shape(2, 64, 2, width_multiple=8),
    "tiny": Shape(4, 128, 4, width_multiple=8),
    "small": Shape(8, 256, 8, width_multiple=8),
    "75m": Shape(3, 896, 16),
    "125m": Shape(12, 768, 12),
    "350m": Shape(24, 1024, 16),
    "1.3b": Shape(24, 2048, 16),
    "3b": Shape(32, 2560, 20),
    "7b": Shape(32, 4096, 32),
}


def preset_config(
    config: ModelConfig, vocab_size: int, sequence_length: int, eos_id: int
) -> PretrainedConfig:
    """A preset as a Hugging Face configuration, embeddings tied, for sequences of that length.

    Args:
        config: its family is "llama" (RoPE, SwiGLU, RMSNorm) or "mpt" (ALiBi, GELU at expansion 4,
            no biases); qk_norm is RMSNorm on each head's queries and keys: what Qwen3 is to Llama.
        eos_id: the token between documents; it starts a text as well as it ends one.
    """
    shape = SHAPES[str(config.preset)]
    # No pad_token_id: transformers would freeze that row of the embedding.
    tokens = {
        "vocab_size": vocab_size,
        "eos_token_id": eos_id,
        "bos_token_id": eos_id,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if config.family == "mpt":
        return MptConfig(
            d_model=shape.d_model,
            n_heads=shape.heads,
            n_layers=shape.layers,
            expansion_ratio=4,
            max_seq_len=max(_MPT_CONTEXT, sequence_length),
            learned_pos_emb=False,
            no_bias=True,
            **tokens,
        )
    sizes = {
        "hidden_size": shape.d_model,
        "intermediate_size": shape.swiglu_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": sequence_length,
    }
    if config.qk_norm:
        return Qwen3Config(head_dim=shape.d_model // shape.heads, **sizes, **tokens)
    return LlamaConfig(**sizes, **tokens)
