"""The keys of [compute] and [energy]: how a node uses its machines, and what these draw: no maths.

They move rounding (sums in another order, bf16 products), never what is computed. A site decides
them; a run file may suggest them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from photon.config.section import Positive, Section


class ComputeConfig(Section):
    """[compute]: devices, arithmetic and parallelism of a node; speed and memory, not maths."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto",
        description="Where local training runs; auto takes CUDA, then MPS, then CPU.",
    )
    processes: Annotated[int, Field(ge=0, le=4096)] = Field(
        default=0,
        description="Ranks of a node: one process per device, gradients summed among them. 0 takes "
        "one for each CUDA device that the workers leave it, and 1 elsewhere. Under torchrun the "
        "number is WORLD_SIZE. The aggregator of silos elsewhere only scores, and takes one.",
    )
    strategy: Literal["auto", "single", "ddp", "fsdp", "hybrid"] = Field(
        default="auto",
        description="ddp: a copy of the model on each rank. fsdp: weights, gradients and optimizer "
        "state cut among the ranks. hybrid: cut inside a machine, copied between machines. auto: "
        "one rank is single; ddp where a copy fits a device; fsdp where not; hybrid across "
        "machines. What it chose, and why, is told when the run starts.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Arithmetic of forward and backward. Weights and optimizer state are always "
        "fp32. auto takes bf16 where the hardware gains from it.",
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="CPU threads of each training process; 0 shares the cores among the "
        "processes. Resolved when the run starts, as the number changes rounding.",
    )
    micro_batch_size: Positive | None = Field(
        default=None,
        description="Sequences per forward pass on a device; gradients accumulate to "
        "local.batch_size. By default the largest that fits is found once and remembered.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What backward recomputes to save memory. selective: all but matrix products "
        "and attention. full: whole blocks.",
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex_attention", "eager"] = Field(
        default="auto",
        description="Attention kernels. auto: PyTorch's scaled_dot_product_attention "
        "(FlashAttention on CUDA) where the model has it. flash_attention_2 needs the "
        "flash-attn package.",
    )
    state_cache_gib: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Memory in which a node keeps the newest inner states of the silos it serves, "
        "beside their files on disk. Only matters where federation.optimizer_state is keep.",
    )
    compile: Literal["auto", "on", "whole", "off"] = Field(
        default="auto",
        description="torch.compile, once for the life of the trainer. on: each block, which all "
        "share one graph. whole: the model as one graph, some percent faster and slower to start; "
        "not where the model is cut among ranks. auto: on for CUDA, else off: on a CPU it gains a "
        "fifth, in a long run, where there is a C++ compiler.",
    )
    compile_backend: str = Field(
        default="inductor",
        description="Backend of torch.compile. inductor needs a C++ compiler on a CPU; aot_eager "
        "needs none and only checks.",
    )


Amount = Annotated[float, Field(ge=0, le=1e5)]


class PowerConfig(Section):
    """[energy]: what a site's machines draw. docs/energy.md says where defaults are from."""

    core_busy_w: Amount = Field(
        default=3.5, description="Watts of a logical core at work, with its share of the server."
    )
    core_idle_w: Amount = Field(default=0.74, description="Watts of one that waits.")
    device_busy_w: Amount = Field(
        default=407.0, description="Watts of a GPU that trains or scores, where it can't be asked."
    )
    device_idle_w: Amount = Field(default=46.0, description="Watts of one that waits.")


class EnergyConfig(PowerConfig):
    """[energy]: what machines draw where no counter can be read; docs/energy.md."""

    network_kwh_per_gb: Amount = Field(
        default=0.001, description="kWh that networks take for 1e9 bytes; always modelled."
    )
    carbon_g_per_kwh: Amount | None = Field(
        default=None, description="Grams of CO2 equivalent a kWh; without it none is claimed."
    )
