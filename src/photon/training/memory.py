"""How much memory training a model takes on each device, before any of it is taken.

Weights, optimizer state and shards are counted; what forward and backward hold is traced on fake
tensors (step_trace.py), so it follows the model at hand and not a formula of one family.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from photon.config import ModelConfig
from photon.models import (
    SHAPES,
    build_skeleton,
    hidden_matrices,
    rows_at_once,
    trainable_parameters,
    transformer_blocks,
)
from photon.training.eight_bit import BLOCK
from photon.training.flops import count_flops
from photon.training.muon import BATCH_ELEMENTS
from photon.training.step_trace import GRADIENTS, Arithmetic, StepTrace, trace_step

#: Stated, not traced: CUDA context, cuBLAS workspace and kernels; Python with torch and
#: transformers loaded.
RUNTIME_BYTES = {"cuda": 700_000_000, "cpu": 400_000_000, "mps": 400_000_000}

#: Stated: freed pieces that an allocator keeps and can't use, over what is alive. glibc's was
#: measured: 7 to 26%, 37% where little is alive, and none where every large piece is mapped
#: (MALLOC_MMAP_THRESHOLD_=65536). CUDA's caching allocator is assumed.
ALLOCATOR_SHARE = {"cuda": 0.05, "cpu": 0.12, "mps": 0.05}

_RECOMPUTES = "activation_checkpointing"
#: From the least to the most recomputation.
CHECKPOINTING = ("none", "selective", "full")

_TRACES: WeakKeyDictionary[nn.Module, dict[tuple, StepTrace]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What memory depends on, beside the model.

    Attributes:
        optimizer, optimizer_bits, activation_checkpointing: as in a run file.
        strategy: single, ddp, fsdp or hybrid.
        shards: devices that a model is cut among under fsdp and hybrid.
        micro_batch_size: sequences of a forward pass.
        bf16: arithmetic of forward and backward; weights and state are fp32 either way.
        accumulates: whether a step has several micro-batches, so that gradients outlive each.
        private: whether steps are those of DP-SGD: sequences one by one, a gradient beside the sum.
    """

    optimizer: str
    optimizer_bits: int = 32
    strategy: str = "single"
    shards: int = 1
    micro_batch_size: int = 1
    sequence_length: int
    bf16: bool
    activation_checkpointing: str = "none"
    device_type: str
    accumulates: bool = False
    private: bool = False

    @property
    def cuts(self) -> int:
        """Devices that share one copy of weights, gradients and optimizer state."""
        return self.shards if self.strategy in ("fsdp", "hybrid") else 1

    @property
    def arithmetic(self) -> Arithmetic:
        """fsdp gathers weights in bf16 itself; elsewhere autocast casts them."""
        if not self.bf16:
            return "fp32"
        return "bf16" if self.strategy in ("fsdp", "hybrid") else "autocast"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the fullest moment of a step.

    Attributes:
        settings: what was asked.
        parts: what they are for; they add up to the total.
            weights: fp32, what the optimizer steps; buffers too.
            copies: bf16 copies that autocast holds, or what fsdp gathers: all that belongs to no
                block and two blocks (one computing, one on its way), with their gradients on the
                way.
            gradients: of weights, fp32, as many as there are at that moment.
            optimizer: state between steps.
            activations: all else that forward and backward hold, the work of attention included.
            logits: logits, their fp32 copy and their gradients.
            scratch: of the optimizer's step, where that is the fullest moment.
            allocator: a stated share of all of the above (ALLOCATOR_SHARE).
            runtime: a stated constant for the process.
    """

    settings: MemorySettings
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes a device needs."""
        return sum(self.parts.values())


def estimate_with(model: nn.Module, settings: MemorySettings) -> MemoryEstimate:
    """Memory of training `model`, per device. Allocates nothing; the model may be on meta.

    Not in it: torch.compile (it saves activations), communication buffers beside fsdp's own, and
    what a federation keeps in the same process (global weights, accumulator, outer state).

    Args:
        model: a Hugging Face causal LM. Frozen parameters have no gradient and no state.
    """
    weights, gradients, state, runtime = _standing(model, settings)
    copies = _gathered(model, settings)
    live = _trace(model, settings).live_bytes(
        settings.micro_batch_size,
        logits_of=rows_at_once(_vocabulary(model), settings.device_type) / settings.sequence_length,
    )
    # The trace's gradients have the dtype of its weights; reduced ones are fp32, cut among ranks.
    live[:, GRADIENTS] *= (2 if settings.arithmetic == "bf16" else 1) / settings.cuts
    # DDP's buckets and an accumulating step's gradients outlive a micro-batch.
    if settings.strategy == "ddp" or settings.accumulates:
        live[:, GRADIENTS] = gradients
    if settings.private:  # and DDP has made room for its own
        live[:, GRADIENTS] += gradients * (2 if settings.strategy == "ddp" else 1)
    fullest = live[live.sum(axis=1).argmax()]
    scratch = _step_scratch(model, settings)
    if gradients + scratch > fullest.sum() + copies:
        casts = logits = activations = copies = 0
        held: int = gradients
    else:
        # In the order of step_trace's columns.
        casts, held, activations, logits = (round(float(value)) for value in fullest)
        scratch = 0
    parts = {
        "weights": weights,
        "copies": casts + copies,
        "gradients": held,
        "optimizer": state,
        "activations": activations,
        "logits": logits,
        "scratch": scratch,
    }
    parts["allocator"] = round(sum(parts.values()) * ALLOCATOR_SHARE[settings.device_type])
    parts["runtime"] = runtime
    return MemoryEstimate(settings, parts)


def standing_bytes(model: nn.Module, settings: MemorySettings) -> int:
    """Weights, gradients and optimizer state of a whole copy: what choose_strategy asks for."""
    whole = replace(settings, strategy="single", shards=1)
    return sum(_standing(model, whole)[:3])


def largest_micro_batch(
    model: nn.Module, settings: MemorySettings, available_bytes: int, *, most: int = 256
) -> int:
    """The most sequences of a forward pass, up to `most`, that fit; 0 if one is too many."""
    if _at_most(model, replace(settings, micro_batch_size=most)) <= available_bytes:
        return most

    def needed(size: int) -> int:
        return estimate_with(model, replace(settings, micro_batch_size=size)).total_bytes

    return bisect_right(range(1, most + 1), available_bytes, key=needed)


def _at_most(model: Any, settings: MemorySettings) -> int:
    """More than training can take, without a trace: small models on large machines need no other.

    Twice what a block of llama keeps in fp32 for each token (some 20 values of its width, and with
    plain attention a row of scores for each head) and six copies of the logits.
    """
    counted = count_flops(model, settings.sequence_length)
    vocabulary, width = model.get_input_embeddings().weight.shape
    width = max(counted.attention_width, width)
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None) or 0
    of_a_block = 40 * width + 2 * settings.sequence_length * heads
    tokens = settings.micro_batch_size * settings.sequence_length
    activations = 4 * tokens * (counted.layers * of_a_block + 6 * vocabulary)
    return 2 * sum(_standing(model, settings)) + _step_scratch(model, settings) + activations


def largest_fitting(
    model: nn.Module, settings: MemorySettings, available_bytes: int
) -> MemoryEstimate | None:
    """The least recomputation that fits at all, with the largest power of two as micro-batch.

    `settings` says the rest. None where not even one sequence with full recomputation fits.
    """
    if sum(_standing(model, settings)) > available_bytes:
        return None
    for kind in CHECKPOINTING:
        tried = replace(settings, activation_checkpointing=kind)
        most = largest_micro_batch(model, tried, available_bytes)
        if most:
            size = 1 << (most.bit_length() - 1)
            return estimate_with(model, replace(tried, micro_batch_size=size))
    return None


def largest_preset(
    settings: MemorySettings, available_bytes: int, *, vocab_size: int
) -> tuple[str, MemoryEstimate] | None:
    """The largest preset that trains in so many bytes, and how; None if none does."""
    for preset in reversed(SHAPES):
        model = preset_skeleton(preset, settings.sequence_length, vocab_size)
        if (found := largest_fitting(model, settings, available_bytes)) is not None:
            return preset, found
    return None


def preset_skeleton(preset: str, sequence_length: int, vocab_size: int) -> nn.Module:
    """A preset (models.SHAPES) without weights, on the meta device."""
    config = ModelConfig.model_validate({"preset": preset})
    return build_skeleton(config, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=0)


def describe_shortfall(
    model: nn.Module, estimate: MemoryEstimate, available_bytes: int
) -> tuple[str, str]:
    """Message and hint of an error, for an estimate that does not fit.

    The hint names what saves something, each estimated on its own, the fewest devices (a power of
    two, up to 1024) that make it fit when it is cut among them, and the largest preset that fits.
    """
    settings, needs = estimate.settings, estimate.total_bytes
    message = (
        f"training needs {gigabytes(needs)} on each device with {settings.strategy}, "
        f"{gigabytes(available_bytes)} are there: {gigabytes(needs - available_bytes)} too much"
    )
    told = []
    for words, change in _remedies(settings):
        other = estimate_with(model, replace(settings, **change)).total_bytes
        if other >= needs * 0.99:
            continue
        enough = ", which fits" if other <= available_bytes else ""
        told.append(f"{words} needs {gigabytes(other)}{enough}")
    counts = [] if settings.private else [1 << power for power in range(1, 11)]
    for count in (n for n in counts if n > settings.cuts):
        cut = estimate_with(model, replace(settings, strategy="fsdp", shards=count)).total_bytes
        if cut <= available_bytes:
            words = f'compute.strategy = "fsdp" on {count} devices needs {gigabytes(cut)} each'
            told.append(f"{words}, which fits")
            break
    vocabulary = _vocabulary(model)
    smaller = largest_preset(settings, available_bytes, vocab_size=vocabulary)
    if smaller is not None:
        preset, how = smaller
        if _count(model) > 1.05 * _count(preset_skeleton(preset, 128, vocabulary)):
            told.append(
                f'model.preset = "{preset}" fits (micro-batch {how.settings.micro_batch_size}, '
                f"activation checkpointing {how.settings.activation_checkpointing}, "
                f"{gigabytes(how.total_bytes)})"
            )
    return message, "; ".join(told) + "." if told else "Use a smaller model or more devices."


def gigabytes(size: float) -> str:
    """Bytes as decimal gigabytes, in megabytes below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.1f} MB"


def _remedies(settings: MemorySettings) -> list[tuple[str, dict[str, Any]]]:
    """What could be changed, in words and as changes; cheapest for the run's speed first."""
    recompute = CHECKPOINTING[CHECKPOINTING.index(settings.activation_checkpointing) + 1 :]
    slow = settings.device_type == "cuda" and not settings.bf16
    wide = settings.optimizer_bits == 32 and settings.optimizer in ("adamw", "muon")
    adaptive = settings.optimizer in ("adamw", "adopt", "amsgrad")
    some, one = settings.micro_batch_size > 1, {"micro_batch_size": 1, "accumulates": True}
    known: list[tuple[bool, str, dict[str, Any]]] = [
        (some, "compute.micro_batch_size = 1", one),
        *((True, f'compute.{_RECOMPUTES} = "{kind}"', {_RECOMPUTES: kind}) for kind in recompute),
        (slow, 'compute.precision = "bf16"', {"bf16": True}),
        (wide, "local.optimizer_bits = 8", {"optimizer_bits": 8}),
        (adaptive, 'local.optimizer = "muon"', {"optimizer": "muon"}),
    ]
    return [(words, change) for applies, words, change in known if applies]


def _standing(model: nn.Module, settings: MemorySettings) -> tuple[int, int, int, int]:
    """Weights, all gradients, optimizer state and runtime: what no batch size changes."""
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) // settings.cuts
    trained = trainable_parameters(model)
    gradients = sum(p.numel() * p.element_size() for p in trained.values()) // settings.cuts
    state = _state_bytes(model, settings) // settings.cuts
    return weights + buffers, gradients, state, RUNTIME_BYTES[settings.device_type]


def _state_bytes(model: nn.Module, settings: MemorySettings) -> int:
    fixed = {"sgd": 0, "adopt": 8, "amsgrad": 12}
    hidden = set(hidden_matrices(model)) if settings.optimizer == "muon" else set()
    total = 0
    for name, parameter in trainable_parameters(model).items():
        count = parameter.numel()
        if settings.optimizer in fixed:
            total += fixed[settings.optimizer] * count
        elif name in hidden:
            total += 4 * count
        elif settings.optimizer_bits == 8 and parameter.ndim >= 2:
            columns = parameter.shape[-1]
            scales = count // columns * -(-columns // BLOCK)
            total += 2 * (count + 4 * scales)
        else:
            total += 8 * count
    return total


def _step_scratch(model: nn.Module, settings: MemorySettings) -> int:
    """Temporaries of an optimizer step beside gradients and state; fused AdamW and SGD have none.

    Muon orthogonalises matrices of one shape in batches (training/muon.py): directions, updates and
    the iteration's own take 28 bytes a value in fp32 (26 were measured), some 16 in bf16. The
    others work in batches of bounded size.
    """
    trained = trainable_parameters(model)
    scratch = 0
    sizes = [parameter.numel() // settings.cuts for parameter in trained.values()]
    if settings.optimizer in ("adopt", "amsgrad"):
        scratch = 4 * min(sum(sizes), max(BATCH_ELEMENTS, *sizes))
    if settings.optimizer_bits == 8:
        scratch = 30 * min(max(sizes), 2**24)
    if settings.optimizer == "muon":
        width = 28 if settings.device_type == "cpu" else 16
        shapes = Counter(trained[name].shape for name in hidden_matrices(model))
        batches = (
            min(count, max(1, BATCH_ELEMENTS // shape.numel())) * shape.numel()
            for shape, count in shapes.items()
        )
        scratch = max(scratch, max((width * size for size in batches), default=0))
    return scratch


def _gathered(model: nn.Module, settings: MemorySettings) -> int:
    """What fully_shard holds uncut: see MemoryEstimate.parts."""
    if settings.strategy not in ("fsdp", "hybrid"):
        return 0
    width = 2 if settings.bf16 else 4
    blocks = [sum(p.numel() for p in block.parameters()) for block in transformer_blocks(model)]
    block = max(blocks, default=0)
    rest = _count(model) - sum(blocks)
    weights, gradients = rest + 2 * block, rest + block
    # Gradients are copied to fp32 in one buffer to be reduced, group by group.
    return (weights + gradients) * width + 4 * max(block, rest)


def _trace(model: nn.Module, settings: MemorySettings) -> StepTrace:
    """Traces take a second, so each is kept as long as its model."""
    asked = settings.sequence_length, settings.arithmetic, settings.activation_checkpointing
    key = (*asked, *trainable_parameters(model))
    known = _TRACES.setdefault(model, {})
    if key not in known:
        known[key] = trace_step(model, *asked)
    return known[key]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
