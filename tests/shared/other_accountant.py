"""Epsilon as dp-accounting tells it, by mechanisms of another accountant."""

from __future__ import annotations

import dp_accounting


def composed(kind, zs, delta=1e-5):
    """By dp-accounting: a record is there, or contributes nothing."""
    zero_out = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = kind(neighboring_relation=zero_out)
    for z in sorted(set(zs)):
        accountant.compose(dp_accounting.GaussianDpEvent(z), zs.count(z))
    return accountant.get_epsilon(delta)
