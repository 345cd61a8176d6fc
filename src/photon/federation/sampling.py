"""Who takes part in a round: a seeded draw that a resume replays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from photon.errors import IncompatibleConfigError


def sample_participants(
    silo_tokens: Mapping[str, int],
    *,
    count: int | None,
    sampling: str,
    seed: int,
    round_number: int,
) -> list[str]:
    """Draw participants without replacement, in the order of silo names.

    Args:
        silo_tokens: training tokens of each silo present.
        count: how many; None takes all.
        sampling: "uniform", or "weighted" with odds given by tokens.
        seed: of the run; the draw is a function of (seed, round_number) alone.
        round_number: counts from 1.

    Raises:
        IncompatibleConfigError: more asked than present.
    """
    names = sorted(silo_tokens)
    if count is None or count == len(names):
        return names
    if count > len(names):
        raise IncompatibleConfigError(
            f"federation.sample = {count} but the data has {len(names)} silos: {_some(names)}",
            hint=f"Set federation.sample to at most {len(names)}.",
        )
    odds = None
    if sampling == "weighted":
        tokens = np.array([silo_tokens[name] for name in names], dtype=np.float64)
        odds = tokens / tokens.sum()
    generator = np.random.default_rng([seed, round_number])
    drawn = generator.choice(len(names), size=count, replace=False, p=odds)
    return [names[index] for index in sorted(drawn)]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, ..."
