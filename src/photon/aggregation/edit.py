"""EDiT's pseudo-gradient penalty: unusual updates are refused, large ones count less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from photon.aggregation.check import require_same_names, require_weight, square_sum
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
    """Cheng et al. 2024 (arXiv 2412.07210), algorithm 2, on the norm G_k of the whole update.

    1. Refused is an update with z = (G_k - mu) / sigma > anomaly_z, where mu and sigma are running
       figures over the norms merged in earlier rounds. Nothing is refused before WARM_UP = 16
       norms were merged, and sigma counts as at least a tenth of mu. A norm below the mean never
       is unusual. What is refused does not enter the figures; where all norms have risen for good,
       rounds lose their quorum until `federation.anomaly_z` is raised.
    2. The rest is averaged with weights w_k exp(-G_k / mu) / sum_j w_j exp(-G_j / mu): a softmax of
       -G_k / mu, times Photon's own weight w_k. In the first round, without a mu, weights are w_k.
    3. The result D is scaled by min(1, phi / |D|) where there is a phi.

    Differences from the paper: its softmax is of -G_k itself, so weights depend on units, and at
    scale the smallest update is all that counts (norms 50 and 55 weigh 0.993 and 0.007 there, 0.50
    and 0.55 0.512 and 0.488). Norms are of the whole update, not module by module. Figures are
    taken up once a round (`result`), so that nobody's part depends on who came first. Who is
    refused does not depend on the order of arrival at all; the result does by about K fp32
    roundings of the largest magnitude.

    Memory: one accumulator and K numbers.

    Args:
        anomaly_z: `federation.anomaly_z`, > 0; the paper's delta.
        bound: phi, `federation.clip_update_norm`; None does not clip.
    """

    def __init__(self, anomaly_z: float, bound: float | None) -> None:
        self._anomaly_z = anomaly_z
        self._bound = bound
        self._statistics = NormStatistics()
        self._mean = RunningMean()
        self._norms: list[float] = []
        self._log_weight = -math.inf

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

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]], weight: float, norm: float) -> None:
        require_weight(weight)
        # The sum of weights is kept as its logarithm: no exp(-G) of a large norm underflows to
        # nothing, and no reference norm has to be guessed before the smallest has come.
        usual = self._statistics.mean
        own = math.log(weight) - (norm / usual if usual > 0 else 0.0)
        total = _log_of_sum(self._log_weight, own)
        self._mean.add(tensors, math.exp(own - total))
        self._log_weight = total
        self._norms.append(norm)

    def result(self) -> dict[str, torch.Tensor]:
        merged = self._mean.take()
        if self._bound is not None:
            norm = math.sqrt(math.fsum(square_sum(name, t) for name, t in merged.items()))
            if norm > self._bound:
                for tensor in merged.values():
                    tensor.mul_(self._bound / norm)
        self._statistics = self._statistics.with_round(self._norms)
        self._forget_round()
        return merged

    def discard(self) -> None:
        self._mean.discard()
        self._forget_round()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Count, mean and variance of the norms merged so far, () fp64 each."""
        seen = self._statistics
        if seen.count == 0:
            return {}
        values = (seen.count, seen.mean, seen.variance)
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in zip(_STATE, values, strict=True)
        }

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        require_same_names("state of merging rule edit", tensors, _STATE if tensors else ())
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64 or tensor.shape != ():
                raise ModelMismatchError(
                    f"state {name!r} of merging rule edit is {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}, expected one torch.float64"
                )
        values = [float(tensors[name]) for name in _STATE] if tensors else [0, 0.0, 0.0]
        self._statistics = NormStatistics(int(values[0]), values[1], values[2])

    def _forget_round(self) -> None:
        self._norms = []
        self._log_weight = -math.inf


def _log_of_sum(one: float, two: float) -> float:
    """log(exp(one) + exp(two)), of which one at most may be -inf."""
    high, low = max(one, two), min(one, two)
    return high + math.log1p(math.exp(low - high))
