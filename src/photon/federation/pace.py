"""When a round closes: who is waited for, how long, and what becomes of who is late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from photon.config import FederationConfig

#: Of what a new observation counts in a running mean.
_NEW = 0.3


@dataclass
class Book:
    """A round that is open.

    Attributes:
        asked: participants, and so the most good updates it was drawn for.
        quorum: fewest good updates that close it.
        began_s, now_s: by the engine's clock.
        good: updates merged so far.
        usual_s: how long quorums took in earlier rounds; 0: nothing is known.
        quorum_s: after how long the quorum was there; None before.
    """

    asked: int
    quorum: int
    began_s: float
    usual_s: float = 0.0
    now_s: float = 0.0
    good: int = 0
    quorum_s: float | None = None

    def note_good(self, now_s: float) -> None:
        """One more update was merged."""
        self.good += 1
        self.now_s = now_s
        if self.quorum_s is None and self.good >= self.quorum:
            self.quorum_s = now_s - self.began_s


def left_s(config: FederationConfig, book: Book) -> float:
    """How much longer to wait for the next update; 0 or less: the round closes.

    synchronous: everybody who was asked is waited for, up to the deadline (Photon, algorithm 1).
    quorum: a quorum starts a window of grace that goes by how long quorums took, as in Decoupled
    DiLoCo (arXiv 2604.21428), whose window goes by a round's own slack. buffered: a quorum is
    merged as soon as it is there, and nobody waits for the others (FedBuff, Nguyen et al. 2022,
    arXiv 2106.06639, whose buffer of K updates is the quorum).
    """
    left_s = book.began_s + config.deadline_s - book.now_s
    if config.pace == "synchronous":
        return left_s
    if book.good >= book.asked:
        return 0.0
    if book.quorum_s is None:
        return left_s
    if config.pace == "buffered":
        return 0.0
    window_s = config.grace * running_mean(book.usual_s, book.quorum_s)
    return min(left_s, book.began_s + book.quorum_s + window_s - book.now_s)


def running_mean(before: float, now: float) -> float:
    """Of observations, the newest of which counts most; the first as it is."""
    return (1 - _NEW) * before + _NEW * now if before else now


def staleness_weight(staleness: int) -> float:
    """Of an update that began so many merges ago: 1 / sqrt(1 + s) (FedBuff, section 5)."""
    return 1 / math.sqrt(1 + staleness)


def unequal_steps(steps: int, speeds: Mapping[str, float]) -> dict[str, int]:
    """floor(v_k / v_max tau) local steps for silo k, at least 1 (DyLU, arXiv 2401.09135).

    Args:
        steps: tau.
        speeds: local steps a second, by silo, as measured.
    """
    fastest = max(speeds.values(), default=1.0)
    return {silo: max(1, math.floor(steps * v / fastest + 1e-9)) for silo, v in speeds.items()}
