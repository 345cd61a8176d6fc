"""When a round closes: who is waited for, how long, and what becomes of who is late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

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


class Pace(Protocol):
    """Decides from what has arrived whether to wait on.

    Attributes:
        in_task_order: whether updates are merged in the order of tasks, so that whoever was faster
            changes no bit; as they come otherwise.
        keeps_late: whether who has not answered when the round closes is still listened to.
    """

    @property
    def in_task_order(self) -> bool: ...

    @property
    def keeps_late(self) -> bool: ...

    def left_s(self, book: Book) -> float:
        """How much longer to wait for the next update; 0 or less: the round closes."""
        ...


@dataclass(frozen=True)
class Synchronous:
    """Everybody who was asked is waited for, up to the deadline (Photon, algorithm 1)."""

    deadline_s: float
    in_task_order: bool = field(default=True, init=False)
    keeps_late: bool = field(default=False, init=False)

    def left_s(self, book: Book) -> float:
        return book.began_s + self.deadline_s - book.now_s


@dataclass(frozen=True)
class Quorum:
    """A quorum starts a window of grace that goes by how long quorums took.

    As in Decoupled DiLoCo (arXiv 2604.21428), whose window goes by a round's own slack.

    Attributes:
        grace: length of the window over the running mean of times to quorum.
    """

    deadline_s: float
    grace: float
    keeps_late: bool
    in_task_order: bool = field(default=False, init=False)

    def left_s(self, book: Book) -> float:
        left_s = book.began_s + self.deadline_s - book.now_s
        if book.good >= book.asked:
            return 0.0
        if book.quorum_s is None:
            return left_s
        window_s = self.grace * running_mean(book.usual_s, book.quorum_s)
        return min(left_s, book.began_s + book.quorum_s + window_s - book.now_s)


@dataclass(frozen=True)
class Buffered:
    """A quorum is merged as soon as it is there; nobody waits for the others (FedBuff).

    Nguyen et al. 2022 (arXiv 2106.06639), whose buffer of K updates is the quorum.
    """

    deadline_s: float
    in_task_order: bool = field(default=False, init=False)
    keeps_late: bool = field(default=True, init=False)

    def left_s(self, book: Book) -> float:
        if book.quorum_s is not None:
            return 0.0
        return book.began_s + self.deadline_s - book.now_s


def build_pace(config: FederationConfig) -> Pace:
    """The pace that a run file asks for."""
    if config.pace == "quorum":
        return Quorum(config.deadline_s, config.grace, config.late == "merge")
    if config.pace == "buffered":
        return Buffered(config.deadline_s)
    return Synchronous(config.deadline_s)


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
