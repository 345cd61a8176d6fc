"""Who has masks in common with whom, and who holds whose shares.

Beyond nine members each has masks in common with k = 2 ceil(log2 n) neighbours, at least 8: those
next to it on a circle, in an order drawn from the cohort's hash (Bell et al. 2020, algorithm 2).
This graph of Harary's holds together, whichever k - 1 drop out or collude: nobody can part the
sum. Shares cost little, and are dealt to the 64 next ones: of h holders t = floor(2h / 3) + 1 open
a secret, so a third may drop out, and t - 1 that collude open none. With c of them that give both
kinds of share, whoever tells some that a member is in the sum and others that it dropped out needs
2 t <= h + c: more than a third of its holders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

#: Members that hold shares of one's secrets, at most.
_HOLDERS = 64

Graph = Mapping[str, frozenset[str]]


def mask_graph(names: Sequence[str], seed: str) -> Graph:
    """By member, those with whom it has masks in common; each is theirs, too.

    Args:
        seed: that nobody chose: it decides the order on the circle.
    """
    return _circle(names, seed, max(8, 2 * (len(names) - 1).bit_length()))


def share_graph(names: Sequence[str], seed: str) -> Graph:
    """By member, those who hold shares of its secrets, and whose shares it holds."""
    return _circle(names, seed, _HOLDERS)


def threshold_of(members: int) -> int:
    """Shares that open a secret."""
    return 2 * min(members - 1, _HOLDERS) // 3 + 1


def _circle(names: Sequence[str], seed: str, degree: int) -> Graph:
    if degree >= len(names) - 1:
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
