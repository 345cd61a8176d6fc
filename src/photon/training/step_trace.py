"""How many bytes are alive at each moment of a training step, without training.

Forward, loss and backward run on fake tensors: shapes and dtypes are true, nothing is computed and
nothing allocated. A dispatch mode notes each storage as it appears and goes, so the profile holds
for every architecture, attention kernel (FlashAttention on a CPU saves what CUDA's does) and form
of activation checkpointing, the loss included.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from photon.models import HeadLoss, attend_without_masks, training_loss, transformer_blocks
from photon.training.placement import recomputation

#: Columns of a trace.
CASTS, GRADIENTS, ACTIVATIONS, LOGITS = range(4)

# Two batch sizes give each moment's constant and its slope. Not 1: a batch of one skips copies
# that larger ones make.
_BATCHES = (2, 3)

# Blocks that are really run. The second one's moments stand for all that are not: neither it nor
# its neighbours' late frees are special, as the first and last block's are.
_RUN_BLOCKS = 4

_MARKS = ("begins", "ends", "backward")


@dataclass(frozen=True, eq=False)
class StepTrace:
    """Live bytes beside weights and optimizer state, at each moment of forward and backward.

    Attributes:
        fixed: [moments, 4], bytes whatever the micro-batch.
        per_sequence: [moments, 4], bytes for each sequence of the micro-batch.
        by_rows: whether the loss is taken some rows of logits at a time (models/head_loss.py).

    The four columns: casts (bf16 copies of weights that autocast makes), gradients of weights,
    activations with all that backward holds for a while, and logits with their fp32 copy and
    gradient.
    """

    fixed: np.ndarray
    per_sequence: np.ndarray
    by_rows: bool

    def live_bytes(self, micro_batch_size: int, *, logits_of: float = math.inf) -> np.ndarray:
        """[moments, 4] for so many sequences a forward pass.

        Where the loss is taken by rows, there are logits of at most `logits_of` at once.
        """
        live = self.fixed + micro_batch_size * self.per_sequence
        if self.by_rows:
            sequences = min(micro_batch_size, logits_of)
            live[:, LOGITS] = self.fixed[:, LOGITS] + sequences * self.per_sequence[:, LOGITS]
        return live


Arithmetic = Literal["fp32", "autocast", "bf16"]


def trace_step(
    model: nn.Module, sequence_length: int, arithmetic: Arithmetic, activation_checkpointing: str
) -> StepTrace:
    """Profile one micro-batch of `model`, which may be on the meta device and stays as it is.

    Args:
        model: a Hugging Face causal LM. Its blocks are the longest ModuleList of like modules.
        arithmetic: fp32; autocast to bf16 from fp32 weights; bf16, weights and all, as FSDP's
            blocks compute (gradients are then of 2 bytes each).
    """
    shorten = len(_uniform_blocks(model)) > _RUN_BLOCKS
    deltas = [
        _deltas(model, batch, sequence_length, arithmetic, activation_checkpointing, shorten)
        for batch in _BATCHES
    ]
    live = [np.cumsum(each, axis=0, dtype=np.float64) for each in deltas]
    by_rows = HeadLoss.suits(model)
    if len(live[0]) != len(live[1]):
        # The batch sizes took different paths: the smaller one's bytes, all of them scaled.
        return StepTrace(np.zeros_like(live[0]), live[0] / _BATCHES[0], by_rows)
    slope = (live[1] - live[0]) / (_BATCHES[1] - _BATCHES[0])
    return StepTrace(live[0] - _BATCHES[0] * slope, slope, by_rows)


def _uniform_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, if one of them can stand for another; else []."""
    blocks = transformer_blocks(model)
    forms = {
        (type(block), tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters()))
        for block in blocks
    }
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
    return blocks if len(forms) == 1 and len(kinds) <= 1 else []


def _deltas(
    model: nn.Module,
    batch: int,
    sequence_length: int,
    arithmetic: Arithmetic,
    checkpointing: str,
    shorten: bool,
) -> np.ndarray:
    """Changes of live bytes, [moments, 4], of the whole model."""
    with FakeTensorMode():
        fake = _fake_copy(model, torch.bfloat16 if arithmetic == "bf16" else None)
        blocks = transformer_blocks(fake)
        hidden = len(blocks) - _RUN_BLOCKS if shorten else 0
        if hidden:
            _keep_blocks(fake, _RUN_BLOCKS)
            blocks = blocks[:_RUN_BLOCKS]
        tokens = torch.zeros(batch, sequence_length + 1, dtype=torch.int64)
        tracer = _Tracer(fake, tokens)
        for block in blocks:
            _wrap(block, tracer, checkpointing)
        with tracer:
            with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
                # All rows at once: StepTrace.live_bytes knows how many there are in training.
                by_rows = HeadLoss.of(fake, rows=batch * sequence_length)
                loss, cross_entropy = training_loss(fake, tokens, head=by_rows)
            loss.backward()
        del loss, cross_entropy
    return tracer.deltas(hidden)


def _fake_copy(model: nn.Module, dtype: torch.dtype | None) -> Any:
    """The same modules around fake CPU tensors; no weight is read or copied."""
    fakes: dict[int, Any] = {}
    for parameter in model.parameters():
        fakes[id(parameter)] = nn.Parameter(
            torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device="cpu"),
            requires_grad=parameter.requires_grad,
        )
    for part in model.modules():
        # Not only buffers: some modules hold a tensor as a plain attribute.
        held = itertools.chain(part._buffers.values(), vars(part).values())
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in fakes:
                fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    fake: Any = copy.deepcopy(model, fakes)
    if getattr(fake.config, "_attn_implementation", "") not in ("sdpa", "eager", None):
        # flash-attn and flex kernels save what sdpa's FlashAttention saves.
        fake.set_attn_implementation("sdpa")
    if _only_causal(fake):
        attend_without_masks(fake)
    return fake.train()


def _only_causal(model: Any) -> bool:
    """Whether attention is sdpa with no mask but the causal one."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return getattr(config, "_attn_implementation", "") == "sdpa" and not kinds and not slides


def _keep_blocks(model: nn.Module, count: int) -> None:
    blocks = transformer_blocks(model)
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) and part[0] is blocks[0]:
            del part[count:]


def _wrap(block: Any, tracer: _Tracer, checkpointing: str) -> None:
    forward: Callable[..., Any] = block.forward
    if (options := recomputation(checkpointing)) is not None:
        forward = partial(checkpoint, forward, preserve_rng_state=False, **options)

    def marked(*args: Any, **kwargs: Any) -> Any:
        tracer.mark("begins")
        output = forward(*args, **kwargs)
        tracer.mark("ends")
        hidden = output[0] if isinstance(output, tuple) else output
        # Its gradient is complete when this block's backward begins.
        hidden.register_hook(lambda gradient: tracer.mark("backward"))
        return output

    block.forward = marked


class _Tracer(TorchDispatchMode):
    """Notes every storage that operators make, from its first operator to its end."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self._vocabulary = head.weight.shape[0] if head is not None else 0
        self._logits = tokens[:, 1:].numel() * self._vocabulary
        self._events: list[tuple[int, int, int]] = []
        self._marks: list[tuple[str, int]] = []
        self._live: dict[int, tuple[int, int, int, weakref.ref]] = {}
        self._weights = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        given = {tensor.untyped_storage()._cdata for tensor in (*model.buffers(), tokens)}
        self._given = self._weights | given
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._note(func, args, out)
        elif isinstance(out, (tuple, list)):
            for tensor in out:
                if isinstance(tensor, Tensor):
                    self._note(func, args, tensor)
        return out

    def mark(self, name: str) -> None:
        """Remember where a block begins, forward or backward."""
        self._marks.append((name, len(self._events)))

    def deltas(self, hidden: int) -> np.ndarray:
        """[moments, 4], with the second block's moments repeated `hidden` more times."""
        table = np.zeros((len(self._events), 4), dtype=np.int64)
        for row, (column, change, _) in enumerate(self._events):
            table[row, column] = change
        if not hidden:
            return table
        at = {name: [row for mark, row in self._marks if mark == name] for name in _MARKS}
        f_from, f_to = at["begins"][1:3]
        b_from, b_to = at["backward"][2:4]
        # What goes when autocast ends, after the last block and before the first gradient, goes
        # for the blocks that were not run too.
        for row in range(at["ends"][-1], at["backward"][0]):
            if f_from <= self._events[row][2] < f_to:
                table[row] *= 1 + hidden
        return np.concatenate(
            [
                table[:f_to],
                np.tile(table[f_from:f_to], (hidden, 1)),
                table[f_to:b_to],
                np.tile(table[b_from:b_to], (hidden, 1)),
                table[b_to:],
            ]
        )

    def _note(self, func: Any, args: tuple, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._given:
            return
        column, size, born = self._column(func, args, tensor), storage.nbytes(), len(self._events)
        gone = weakref.ref(storage, partial(self._gone, key))
        self._live[key] = (column, size, born, gone)
        self._events.append((column, size, born))

    def _column(self, func: Any, args: tuple, tensor: Tensor) -> int:
        if (
            func is torch.ops.aten._to_copy.default
            and args[0].untyped_storage()._cdata in self._weights
        ):
            return CASTS
        is_logits = tensor.numel() >= self._logits and tensor.shape[-1:] == (self._vocabulary,)
        return LOGITS if is_logits else ACTIVATIONS

    def _gone(self, key: int, _: object) -> None:
        column, size, born, _reference = self._live.pop(key)
        self._events.append((column, -size, born))

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        found = self._live.get(key)
        if found is None or found[0] == GRADIENTS:
            return
        column, size, born, reference = found
        self._live[key] = (GRADIENTS, size, born, reference)
        self._events.append((column, -size, born))
        self._events.append((GRADIENTS, size, born))
