"""What Gaussian mechanisms cost together: exact, as no sampling is claimed to amplify them.

Mechanisms of multipliers z_i are one of mu-GDP together, mu^2 = sum 1 / z_i^2 (Dong, Roth, Su 2019,
arXiv 1905.02383), and of that delta is known (Balle, Wang 2018, arXiv 1805.06530, theorem 8):

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from photon.config import PrivacyConfig, RunConfig
from photon.config.children import Children, Level

_ROOT = math.sqrt(2 * math.pi)


def delta_of(epsilon: float, mu: float) -> float:
    """The least delta at which a mu-GDP mechanism is (epsilon, delta)-DP."""
    above, below = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    # e^epsilon Phi(-below) is phi(above) times Mills' ratio of `below`: nothing overflows.
    if below < 25:
        ratio = _ROOT / 2 * math.exp(below**2 / 2) * math.erfc(below / math.sqrt(2))
    else:
        ratio = (1 - below**-2 + 3 * below**-4 - 15 * below**-6) / below
    tail = math.exp(-(above**2) / 2) / _ROOT * ratio
    return max(0.0, math.erfc(-above / math.sqrt(2)) / 2 - tail)


def epsilon(mu_squared: float, delta: float) -> float:
    """The least epsilon at this delta, rounded up; infinite without noise."""
    if mu_squared in (0.0, math.inf):
        return mu_squared
    mu = math.sqrt(mu_squared)
    if delta_of(0.0, mu) <= delta:
        return 0.0
    most = mu_squared / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # Bun, Steinke 2016, by zCDP
    return _halved(0.0, most, lambda middle: delta_of(middle, mu) <= delta)[1]


@lru_cache
def multiplier(target: float, delta: float, times: float) -> float:
    """The least z with which mechanisms that cost `times` / z^2 have epsilon = target at delta."""
    most = 1.0
    while delta_of(target, most) <= delta:
        most *= 2
    mu, _ = _halved(0.0, most, lambda middle: delta_of(target, middle) > delta)
    return math.sqrt(times) / mu


def _halved(low: float, high: float, beyond: Callable[[float], bool]) -> tuple[float, float]:
    """Neighbours of the point from which `beyond` holds, to one part in 10^13."""
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return low, high


def settled(config: RunConfig) -> RunConfig:
    """The run file with the z of each client mechanism that has target_epsilon in its place.

    A silo, or group, answers once in each round of its level.
    """

    def sized(privacy: PrivacyConfig, answers: int) -> PrivacyConfig:
        if privacy.mechanism != "client" or privacy.target_epsilon is None:
            return privacy
        z = multiplier(privacy.target_epsilon, privacy.at_delta, answers)
        return privacy.model_copy(update={"noise_multiplier": z})

    def below(level: Level, privacy: PrivacyConfig, rounds: int) -> Children:
        children: Children = {}
        for name, child in level.children.items():
            nearest, inner = child.privacy or privacy, rounds * child.rounds
            own = {
                "privacy": sized(nearest, inner),
                "update_privacy": sized(child.update_privacy, rounds),
                "children": below(child, nearest, inner),
            }
            children[name] = child.model_copy(update=own)
        return children

    privacy, rounds = config.privacy, config.federation.rounds
    children = below(config.federation, privacy, rounds)
    return config.having(privacy=sized(privacy, rounds), federation={"children": children})
