"""The output projection and its cross-entropy together, some rows at a time.

Logits are the widest tensors of a step: B x L rows of V numbers, then as many probabilities, then
as many gradients. Taken a few rows at a time, with the gradient at once, they stay in cache on a
CPU and out of the peak on any device. The sums are those of the plain loss in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Architectures whose logits are the output projection's and nothing else: no cap, no scale.
#: The others take the plain loss.
PLAIN_HEADS = {"llama", "mistral", "mpt", "qwen2", "qwen3"}

#: fp32 logits held at once. A CPU's cache (measured: benchmarks/head_loss.py); elsewhere enough
#: rows to fill a device.
LOGITS_BYTES = {"cpu": 8 * 2**20}
_LOGITS_BYTES_ELSEWHERE = 256 * 2**20

#: Fewer rows make poor matrix products, however wide the vocabulary.
_LEAST_ROWS = 512


class HeadLoss:
    """A model's output projection, which gives the loss itself while it has targets.

    The loss is taken inside the model's forward, where DDP and FSDP2 expect every use of a weight.

    Args:
        head: the model's output embeddings; its `forward` is replaced for good.
        rows: of logits at a time; by default `rows_at_once`.
    """

    def __init__(self, head: nn.Linear, rows: int | None = None) -> None:
        self._head = head
        self._rows = rows
        self._project: Callable[[Tensor], Tensor] = head.forward
        self._targets: Tensor | None = None
        self._z_loss = 0.0
        self._cross_entropy: Tensor | None = None
        # Left out of a graph of the whole model: its loop would be unrolled.
        whole: Any = torch.compiler.disable(self._forward)
        head.forward = whole

    @classmethod
    def of(cls, model: Any, rows: int | None = None) -> HeadLoss | None:
        """For a model that it `suits`; else None."""
        return cls(model.get_output_embeddings(), rows) if cls.suits(model) else None

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether the model is in PLAIN_HEADS and its output is a matrix without bias."""
        if getattr(model.config, "model_type", None) not in PLAIN_HEADS:
            return False
        head = model.get_output_embeddings()
        return type(head) is nn.Linear and head.bias is None

    def __call__(
        self, model: Callable[..., Any], targets: Tensor, z_loss: float, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the model and give objective and cross-entropy, fp32 0-d; see `training_loss`.

        Args:
            model: the one this was made of, or what stands for it (DDP).
            targets: int64 [B x L].
        """
        self._targets, self._z_loss = targets, z_loss
        try:
            objective = model(**inputs).logits
        finally:
            self._targets = None
        cross_entropy, self._cross_entropy = self._cross_entropy, None
        assert cross_entropy is not None
        return objective, cross_entropy

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._targets is None:
            return self._project(hidden)
        objective, self._cross_entropy = head_loss(
            hidden.flatten(0, -2),
            self._head.weight,
            self._targets,
            z_loss=self._z_loss,
            rows=self._rows,
        )
        return objective


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float = 0.0, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of softmax(hidden @ weight.T) at `targets`, never with all its logits.

    Under autocast the products are in its dtype; the softmax is fp32 always.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: int64 [N].
        z_loss: weight of mean(log(Z)^2).
        rows: taken at a time; by default `rows_at_once`.

    Returns:
        objective (with the z-loss; it alone has a gradient, once) and cross-entropy; fp32, 0-d.
    """
    if rows is None:
        rows = rows_at_once(weight.shape[0], hidden.device.type)
    if not torch.is_grad_enabled():  # a Function is told of what wants gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    return _HeadLoss.apply(hidden, weight, targets, z_loss, rows)  # pyright: ignore[reportReturnType]


def sequences_at_once(model: Any, sequence_length: int) -> int | None:
    """Sequences whose whole logits are not too many, for a model that makes them; None: any."""
    if HeadLoss.suits(model):
        return None
    bytes_each = 4 * sequence_length * model.config.get_text_config().vocab_size
    return max(1, _LOGITS_BYTES_ELSEWHERE // bytes_each)


def rows_at_once(vocabulary: int, device_type: str) -> int:
    """Rows of logits held at a time."""
    room = LOGITS_BYTES.get(device_type, _LOGITS_BYTES_ELSEWHERE)
    return max(_LEAST_ROWS, room // (4 * vocabulary))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        count = len(targets)
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            cross_entropy = hidden.new_zeros((), dtype=torch.float32)
            z_square = torch.zeros_like(cross_entropy)
            for start in range(0, count, rows):
                part = hidden[start : start + rows].to(dtype)
                wanted = targets[start : start + rows, None]
                logits = (part @ matrix.T).float()
                chosen = logits.gather(1, wanted)
                # By log-probabilities: the probability of a bad guess may be 0 in fp32.
                gradient = torch.log_softmax(logits, dim=1)
                del logits
                log_p = gradient.gather(1, wanted)
                log_z = chosen - log_p
                cross_entropy -= log_p.sum()
                z_square += log_z.square().sum()
                if not (needs_hidden or needs_weight):
                    continue
                gradient.exp_()
                if z_loss:
                    gradient *= 1 + 2 * z_loss * log_z
                gradient.scatter_add_(1, wanted, torch.full_like(log_p, -1.0))
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = gradient @ matrix
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(gradient.T, part)
                elif grad_weight is not None:
                    grad_weight += gradient.T @ part
                del gradient
            cross_entropy /= count
            objective = cross_entropy + z_loss * z_square / count
        ctx.count, ctx.weight_dtype = count, weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.count
        # In place: a second backward through the same graph is refused by torch's version check.
        if grad_hidden is not None:
            grad_hidden *= scale
        if grad_weight is not None:
            grad_weight *= scale
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
