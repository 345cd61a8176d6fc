"""Shamir's secret sharing (1979): any t shares give the secret, t - 1 say nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: The smallest prime above 2^256: secrets of 32 bytes are below it, and shares take 33.
PRIME = 2**256 + 297
SHARE_BYTES = 33


def split(secret: int, coefficients: Sequence[int], places: Sequence[int]) -> list[int]:
    """The values of secret + sum_j coefficients[j] x^(j + 1) at these places.

    Args:
        secret: in [0, PRIME).
        coefficients: t - 1 of them, uniform in [0, PRIME) and nobody else's to know.
        places: distinct, in [1, PRIME).
    """
    found = []
    for place in places:
        value = 0
        for one in reversed([secret, *coefficients]):
            value = (value * place + one) % PRIME
        found.append(value)
    return found


def joined(shares: Mapping[int, int]) -> int:
    """The secret, of exactly t shares by place: Lagrange at 0. Of wrong ones, some number."""
    secret = 0
    for place, share in shares.items():
        over = under = 1
        for other in shares:
            if other != place:
                over = over * other % PRIME
                under = under * (other - place) % PRIME
        secret += share * over * pow(under, -1, PRIME)
    return secret % PRIME
