"""Who takes part in a round: a seeded draw that a resume replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from photon.errors import IncompatibleConfigError, some


@dataclass(frozen=True)
class Candidates:
    """Who may be drawn for a round.

    Attributes:
        tokens: to train on, by silo.
        attempt: at the round, counted from 1. A round that lost its quorum is attempted again,
            with another draw.
        texts: silos whose text all of them train on; each on its own by default.
    """

    tokens: Mapping[str, int]
    attempt: int = 1
    texts: Sequence[str] = ()


class Fleet(Protocol):
    """The silos of a run, as they come and go."""

    def drawn_from(self, round_number: int) -> Candidates | None:
        """Who may be drawn for a round; may wait for silos. None where the run ends meanwhile.

        Asked again about the same round, by a process that resumes it, it says the same, until it
        is told that the round is lost.
        """
        ...

    def lost(self, round_number: int) -> bool:
        """Told that too few of a round's participants gave good updates.

        Returns:
            Whether another attempt will be made with others.
        """
        ...

    def present(self) -> list[str]:
        """Names of those that are here now, in the order in which versions are scored."""
        ...


@dataclass(frozen=True)
class FixedFleet:
    """Silos that are always here.

    Attributes:
        tokens: to train on, by silo.
        scored: the silos on whose held-out text versions are scored; the same by default.
        texts: as Candidates.
    """

    tokens: Mapping[str, int]
    scored: Sequence[str] | None = None
    texts: Sequence[str] = ()

    def drawn_from(self, round_number: int) -> Candidates:
        return Candidates(self.tokens, texts=self.texts)

    def lost(self, round_number: int) -> bool:
        """The round can be attempted with the same silos only."""
        return False

    def present(self) -> list[str]:
        return list(sorted(self.tokens) if self.scored is None else self.scored)


def sample_participants(
    silo_tokens: Mapping[str, int],
    *,
    count: int | None,
    sampling: str,
    seed: int,
    round_number: int,
    attempt: int = 1,
) -> list[str]:
    """Draw participants, in the order of silo names.

    "uniform" draws without replacement, all alike. "weighted" is systematic sampling with shares
    p_i = tokens_i / sum tokens (Madow 1949): with the silos in a drawn order, each owns an interval
    of length K p_i, one after another, and the K points u, u + 1, ... with u uniform in [0, 1) fall
    into them. A silo so is drawn floor(K p_i) or ceil(K p_i) times, K p_i in expectation. It trains
    once, and its update counts once for each time that it was drawn (`Federation`): its share of
    the merge is p_i in expectation, whatever K.

    Args:
        silo_tokens: training tokens of each silo present.
        count: K, how many draws; None takes every silo once.
        sampling: "uniform" or "weighted".
        seed: of the run; the draw is a function of (seed, round_number, attempt) alone.
        round_number: counts from 1.
        attempt: counts from 1: another one draws others, of the same silos too.

    Returns:
        Names in their order; of "weighted", a silo's as often as it was drawn.

    Raises:
        IncompatibleConfigError: more asked than present.
    """
    names = sorted(silo_tokens)
    if count is None or (count == len(names) and sampling == "uniform"):
        return names
    if count > len(names):
        raise IncompatibleConfigError(
            f"federation.sample = {count} but the data has {len(names)} silos: {some(names, 8)}",
            hint=f"Set federation.sample to at most {len(names)}.",
        )
    again = [attempt] if attempt > 1 else []
    generator = np.random.default_rng([seed, round_number, *again])
    if sampling == "weighted":
        order = generator.permutation(len(names))
        tokens = np.array([silo_tokens[names[index]] for index in order], dtype=np.float64)
        ends = np.cumsum(tokens) * (count / tokens.sum())
        points = generator.random() + np.arange(count)
        places = np.searchsorted(ends, points, side="right")
        # A last point may lie beyond the last end by a rounding.
        drawn = order[np.minimum(places, len(names) - 1)]
    else:
        drawn = generator.choice(len(names), size=count, replace=False)
    return [names[index] for index in sorted(drawn)]
