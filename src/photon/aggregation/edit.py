"""EDiT's pseudo-gradient penalty: unusual updates are refused, large ones count less."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from photon.aggregation.check import Named, require_same_names, require_weight, square_sum
from photon.aggregation.rule import MergingRule
from photon.aggregation.running_mean import RunningMean
from photon.errors import ModelMismatchError

#: Weight of one norm in the running mean and variance, as in the paper.
ALPHA = 0.02
#: Norms that must have been merged before any is refused: of so few, three deviations say little.
WARM_UP = 16
#: Smallest deviation that is believed, as a part of the mean: like silos send norms that hardly
#: differ, and a learning rate's schedule moves them all by more than that.
LEAST_DEVIATION = 0.1

_STATE = ("norm_count", "norm_mean", "norm_variance")
_MODULE = "norm_mean/"
_LAYER = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class NormStatistics:
    """Running mean and variance of the norms of merged updates.

    Attributes:
        count: norms taken up so far.
        mean: mu, in the norm's own units.
        variance: sigma^2, of the population, in the norm's units squared.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        """sigma, at least a tenth of the mean."""
        return max(math.sqrt(self.variance), LEAST_DEVIATION * self.mean)

    def with_round(self, norms: Sequence[float]) -> NormStatistics:
        """The statistics after one more round; the order of its norms does not change a bit.

        With a_k = 1 - (1 - ALPHA)^k for the k norms of the round together, but at least their
        share of all norms so far (so the first 50 or so are a plain mean):
        mu' = mu + a_k (m - mu), sigma'^2 = (1 - a_k) (sigma^2 + a_k (m - mu)^2) + a_k v,
        where m and v are mean and variance of the round's norms.
        """
        count = len(norms)
        mean = math.fsum(norms) / count
        variance = math.fsum((norm - mean) ** 2 for norm in norms) / count
        share = max(1 - (1 - ALPHA) ** count, count / (self.count + count))
        gap = mean - self.mean
        return NormStatistics(
            count=self.count + count,
            mean=self.mean + share * gap,
            variance=(1 - share) * (self.variance + share * gap**2) + share * variance,
        )


class EditMean(MergingRule):
    """Cheng et al. 2024 (arXiv 2412.07210), algorithm 2: norms decide who is merged, and how much.

    1. Refused is an update with z = (G_k - mu) / sigma > anomaly_z, where G_k is the norm of the
       whole of it, and mu and sigma are running figures over the norms merged in earlier rounds.
       Nothing is refused before WARM_UP = 16 norms were merged, and sigma counts as at least a
       tenth of mu. A norm below the mean never is unusual. What is refused does not enter the
       figures; where all norms have risen for good, rounds lose their quorum until
       `federation.anomaly_z` is raised.
    2. Of each module m (a layer, an embedding: `module_of`) the rest is averaged with weights
       w_k exp(-G_km / mu_m) / sum_j w_j exp(-G_jm / mu_m): a softmax of -G_km / mu_m, where G_km is
       the norm of the module's part and mu_m its running mean, times Photon's own weight w_k. In
       the first round, without a mu_m, weights are w_k.
    3. The result D is scaled by min(1, phi / |D|) where there is a phi.

    Differences from the paper: its softmax is of -G_km itself, so weights depend on units, and at
    scale the smallest update is all that counts (norms 50 and 55 weigh 0.993 and 0.007 there, 0.50
    and 0.55 0.512 and 0.488). It also refuses and clips module by module; here an update is merged
    or not, and the bound is on all of it. Figures are taken up once a round (`result`), so that
    nobody's part depends on who came first. Who is refused does not depend on the order of arrival
    at all; the result does by about K fp32 roundings of the largest magnitude.

    Memory: one accumulator, one module of an update where its tensors come together, as they do
    from the wire, and a few numbers for each module and update.

    Args:
        anomaly_z: `federation.anomaly_z`, > 0; the paper's delta.
        bound: phi, `federation.clip_update_norm`; None does not clip.
    """

    def __init__(self, anomaly_z: float, bound: float | None) -> None:
        self._anomaly_z = anomaly_z
        self._bound = bound
        self._statistics = NormStatistics()
        self._usual: dict[str, float] = {}  # mu_m
        self._mean = RunningMean()
        self._forget_round()

    def refuse(self, norm: float) -> str | None:
        seen = self._statistics
        # A mean of 0 knows no units in which a norm could be large.
        if seen.count < WARM_UP or seen.mean == 0.0:
            return None
        z = (norm - seen.mean) / seen.deviation
        if z <= self._anomaly_z:
            return None
        return (
            f"its norm {norm:.4g} is {z:.1f} deviations above what earlier rounds merged "
            f"({seen.mean:.4g} +- {seen.deviation:.2g}); federation.anomaly_z = "
            f"{self._anomaly_z:g} are allowed"
        )

    def add(self, tensors: Named, weight: float, norm: float) -> None:
        require_weight(weight)
        own, shares, squares = math.log(weight), {}, dict[str, float]()

        def weigh(module: str) -> None:
            # The sum of weights is kept as its logarithm: no exp(-G) of a large norm underflows to
            # nothing, and no reference norm has to be guessed before the smallest has come.
            large, usual = math.sqrt(squares[module]), self._usual.get(module, 0.0)
            mine = own - (large / usual if usual > 0 else 0.0)
            total = float(np.logaddexp(self._log_weights.get(module, -math.inf), mine))
            shares[module] = math.exp(mine - total)
            self._log_weights[module] = total
            self._norms.setdefault(module, []).append(large)

        def measured() -> Iterator[tuple[str, torch.Tensor]]:
            held: dict[str, list[tuple[str, torch.Tensor]]] = {}
            for name, tensor in tensors:
                module = module_of(name)
                squares[module] = squares.get(module, 0.0) + square_sum(name, tensor)
                if not self._sizes:  # the first is copied, whatever it weighs
                    yield name, tensor
                    continue
                # A module's weight is known with its last tensor; what a tensor lies in is lent.
                held.setdefault(module, []).append((name, tensor.detach().clone()))
                if len(held[module]) == self._sizes.get(module):
                    weigh(module)
                    yield from held.pop(module)
            for module, rest in held.items():  # of another model: to be refused by name
                weigh(module)
                yield from rest

        self._mean.add(measured(), lambda name: shares[module_of(name)])
        if not self._sizes:
            self._sizes = Counter(map(module_of, self._mean.names))
            for module in squares:
                weigh(module)
        self._whole_norms.append(norm)

    def result(self) -> dict[str, torch.Tensor]:
        merged = self._mean.take()
        if self._bound is not None:
            norm = math.sqrt(math.fsum(square_sum(name, t) for name, t in merged.items()))
            if norm > self._bound:
                for tensor in merged.values():
                    tensor.mul_(self._bound / norm)
        count = self._statistics.count
        self._usual = {
            module: NormStatistics(count, self._usual.get(module, 0.0)).with_round(norms).mean
            for module, norms in self._norms.items()
        }
        self._statistics = self._statistics.with_round(self._whole_norms)
        self._forget_round()
        return merged

    def discard(self) -> None:
        self._mean.discard()
        self._forget_round()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Count, mean and variance of the norms merged so far, each module's mean; () fp64 each."""
        seen = self._statistics
        if seen.count == 0:
            return {}
        values = dict(zip(_STATE, (seen.count, seen.mean, seen.variance), strict=True))
        values |= {_MODULE + module: usual for module, usual in self._usual.items()}
        return {name: torch.tensor(one, dtype=torch.float64) for name, one in values.items()}

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        whole = [name for name in tensors if not name.startswith(_MODULE)]
        require_same_names("state of merging rule edit", whole, _STATE if tensors else ())
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64 or tensor.shape != ():
                raise ModelMismatchError(
                    f"state {name!r} of merging rule edit is {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}, expected one torch.float64"
                )
        values = [float(tensors[name]) for name in _STATE] if tensors else [0, 0.0, 0.0]
        self._statistics = NormStatistics(int(values[0]), values[1], values[2])
        self._usual = {
            name.removeprefix(_MODULE): float(tensor)
            for name, tensor in tensors.items()
            if name.startswith(_MODULE)
        }

    def _forget_round(self) -> None:
        self._whole_norms: list[float] = []
        self._norms: dict[str, list[float]] = {}
        self._log_weights: dict[str, float] = {}
        self._sizes: Mapping[str, int] = {}


def module_of(name: str) -> str:
    """The part of a model that a tensor belongs to: its layer, or all but the name's last part.

    "weights/model.layers.3.mlp.up_proj.weight" is of "weights/model.layers.3", and
    "weights/model.norm.weight" of "weights/model.norm".
    """
    layer = _LAYER.match(name)
    return layer[0] if layer else name.rpartition(".")[0] or name
