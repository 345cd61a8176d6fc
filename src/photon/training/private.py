"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): clipped gradients of single sequences, and noise.

Sequences go through the model one at a time. A gradient is then its sequence's own whatever the
architecture does inside a batch, the loss is taken by the output projection as ever, and memory
holds one gradient beside the sum. torch.func.vmap takes about as long on a CPU, and the memory of
a gradient for each (benchmarks/dp_sgd.py).
"""

# torch._foreach_* is how torch.optim itself steps many tensors at once.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from photon.errors import IncompatibleConfigError
from photon.privacy import gaussian, release_key
from photon.training.ranks import Ranks
from photon.training.strategy import Strategy


@dataclass(frozen=True)
class PrivateSteps:
    """How local steps are noised.

    Attributes:
        clip_norm: C, the largest L2 norm of a sequence's gradient, all that is trained together.
        noise_multiplier: z; the sum of a batch's gradients gets N(0, (z C)^2) on each coordinate.
        secret: the node's own, that noise is drawn with; the same on all its ranks.
        context: words and numbers that say what is trained for whom. Nothing else has its noise.
    """

    clip_norm: float
    noise_multiplier: float
    secret: bytes = field(repr=False)
    context: Sequence[str | int]


class ClippedSum:
    """The sum of clipped gradients, in the parameters' .grad.

    Args:
        parameters: all that is trained, whole on this rank.
        clip_norm: C.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], clip_norm: float) -> None:
        self._parameters = list(parameters.values())
        self._clip_norm = clip_norm
        self._count, self._loss = 0, torch.zeros((), device=self._parameters[0].device)
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._sums, strict=True):
            parameter.grad = gradient

    def add(self, objective: Tensor, loss: Tensor) -> None:
        """Add the gradient of one sequence's objective, scaled down to norm C where it is longer.

        One that is not finite counts as 0: no sequence of a site's decides alone what is sent.
        """
        # Not backward(): DDP's hooks would average gradients among ranks before the clip.
        gradients = torch.autograd.grad(objective, self._parameters, materialize_grads=True)
        norm = float(nn.utils.get_total_norm(gradients, foreach=True))
        if math.isfinite(norm):
            share = self._clip_norm / max(self._clip_norm, norm)
            torch._foreach_add_(self._sums, gradients, alpha=share)
            # Gradients may be finite where a loss is not; it must not end the run either.
            self._loss += loss.detach().nan_to_num(0, 0, 0).clamp(max=1e6)
            self._count += 1

    @property
    def loss(self) -> Tensor:
        """Mean over the sequences that count, fp32 0-d and finite; 0 without any."""
        return self._loss / max(1, self._count)


@torch.no_grad()
def noise_gradients(
    parameters: Mapping[str, nn.Parameter],
    steps: PrivateSteps,
    ranks: Ranks,
    *,
    global_step: int,
    batch_size: int,
) -> None:
    """Make each rank's clipped sums, in .grad, the noised mean over the whole batch.

    The noise is drawn by the question and by what it is added to: the same question has the same
    noise where its sums are the same, and another one never does, whatever its sums are.

    Args:
        global_step: the server's clock.
        batch_size: sequences of a step over all ranks, those that count as 0 included.
    """
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    sums = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    for gradient in sums.values():
        ranks.sum_(gradient)
    deviation = steps.noise_multiplier * steps.clip_norm
    if deviation:
        release = ["dp_sgd", *steps.context, global_step, deviation]
        # Rank 0's, lest ranks whose sums differ in a last digit draw apart.
        release = ranks.announce([*release, _sha256(sums)] if ranks.leader else None)
        for name, gradient in sums.items():
            key = release_key(steps.secret, *release, name)
            gradient.add_(gaussian(key, gradient.shape, deviation).to(gradient.device))
    for gradient in sums.values():
        gradient.div_(batch_size)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def require_whole(strategy: Strategy) -> None:
    """Raise IncompatibleConfigError where a rank never has a sequence's whole gradient."""
    if strategy.shards:
        raise IncompatibleConfigError(
            f'privacy.mechanism = "dp_sgd" needs whole gradients, and compute.strategy = '
            f'"{strategy.name}" cuts them among ranks',
            hint='Use compute.strategy = "ddp", or one process.',
        )
