"""Whether a claim stands: a ratio over seeds, its confidence interval, and the bar."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Two-sided 95% quantiles of Student's t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
#: Fewer seeds decide nothing.
LEAST_SEEDS = 3

RULE = (
    "A claim is a ratio and a bar that it must not pass. Over the seeds, paired, the mean of the "
    "ratio's logarithm gets a two-sided 95% confidence interval by Student's t. Confirmed: all of "
    "the interval is within the bar. Refuted: all of it is beyond. Undecided: the bar is inside; "
    "or there are fewer than three seeds, and it says how many."
)

Word = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        ratio: geometric mean over seeds; infinite where `one` never came to it.
        low, high: of the interval; None with fewer than LEAST_SEEDS.
    """

    word: Word
    ratio: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None and self.seeds >= LEAST_SEEDS:
            return f"{self.word}: some of {self.seeds} seeds never came to it"
        if self.low is None:
            return f"{self.word}: {self.seeds} of {LEAST_SEEDS} seeds"
        return f"{self.word} ({self.low:.3g} to {self.high:.3g})"


def judge(ratios: Sequence[float], most: float) -> Verdict:
    """Hold ratios, one a seed, against the largest that the claim allows.

    Raises:
        ValueError: there are none, or one is not above 0.
    """
    if not ratios or any(not ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios are positive: {list(ratios)}")
    number = len(ratios)
    if any(math.isinf(ratio) for ratio in ratios):
        lost = all(math.isinf(ratio) for ratio in ratios)
        word: Word = "refuted" if lost and number >= LEAST_SEEDS else "undecided"
        ends = (math.inf, math.inf) if word == "refuted" else (None, None)
        return Verdict(word, math.inf, *ends, number)
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if number < LEAST_SEEDS:
        return Verdict("undecided", math.exp(mean), None, None, number)
    quantile = _T[min(number - 1, len(_T)) - 1]
    half = quantile * statistics.stdev(logs) / math.sqrt(number)
    low, high, bar = mean - half, mean + half, math.log(most)
    word = "confirmed" if high <= bar else "refuted" if low > bar else "undecided"
    return Verdict(word, math.exp(mean), math.exp(low), math.exp(high), number)
