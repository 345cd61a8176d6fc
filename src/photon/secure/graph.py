"""Who shares secrets, and masks, with whom.

Up to nine members all do. Beyond, each has k = 2 ceil(log2 n) neighbours, at least 8: those next to
it on a circle in an order drawn from the cohort's hash (Bell et al. 2020, algorithm 2). Such a
Harary graph holds together, whichever k - 1 members drop out or collude, so nobody can part the
sum.

Of k shares t = floor(2k / 3) + 1 open a secret. t - 1 neighbours that collude open none. And with c
of them that give both kinds of share, whoever tells some that a member is in the sum and others
that it dropped out needs 2 t <= k + c: more than a third of its neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence


def degree_of(members: int) -> int:
    """Neighbours of each."""
    return min(members - 1, max(8, 2 * (members - 1).bit_length()))


def threshold_of(members: int) -> int:
    """Shares that open a secret."""
    return 2 * degree_of(members) // 3 + 1


def graph_of(names: Sequence[str], seed: str) -> dict[str, frozenset[str]]:
    """Neighbours by name; whoever is another's neighbour has it as its own.

    Args:
        seed: that nobody chose: it decides the order on the circle.
    """
    degree = degree_of(len(names))
    if degree == len(names) - 1:
        return {one: frozenset(names) - {one} for one in names}
    circle = sorted(names, key=lambda one: hashlib.sha256(f"{seed} {one}".encode()).digest())
    reach = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {
        one: frozenset(circle[(place + step) % len(circle)] for step in reach)
        for place, one in enumerate(circle)
    }


def holds_together(graph: Mapping[str, Collection[str]], among: Collection[str]) -> bool:
    """Whether each of these reaches each other over these alone."""
    left, todo = set(among), list(among)[:1]
    left.difference_update(todo)
    for one in todo:
        near = left.intersection(graph[one])
        left -= near
        todo += near
    return not left
