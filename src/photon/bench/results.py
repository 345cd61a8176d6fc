"""What the runs of a suite came to: best points, comparisons, claims. From records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from photon.bench.case import loss_at, time_of, tokens_to
from photon.bench.search import Point, as_point, best_point, inside, next_points
from photon.bench.suite import At, Claim, Suite, scale_of
from photon.bench.verdict import Verdict, judge

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Records of one suite at one scale, and how many seeds were asked for."""

    suite: Suite
    scale: str
    seeds: int
    records: tuple[Record, ...]

    def losses(self, method: str) -> dict[Point, float]:
        """Last held-out loss of each point that was tried with the first seed."""
        return {
            as_point(one["point"]): _finite(one["loss"])
            for one in self.records
            if one["method"] == method and one["seed"] == 1
        }

    def next_points(self, method: str) -> list[Point]:
        """Points of its grid that are to be tried now; none: its search is over."""
        grid = self.suite.methods[method].grid
        return next_points(grid, self.losses(method), scale_of(self.suite, self.scale).points)

    def best(self, method: str) -> list[Record]:
        """Records of its best point, by seed."""
        point, seeds = best_point(self.losses(method)), range(1, self.seeds + 1)
        found = {
            one["seed"]: one
            for one in self.records
            if one["method"] == method and as_point(one["point"]) == point
        }
        return [found[seed] for seed in seeds if seed in found]

    def is_inside(self, method: str) -> bool:
        """Whether its best point lies inside what was tried."""
        grid = self.suite.methods[method].grid
        return inside(grid, self.losses(method)) if grid else True

    def missing(self) -> Iterator[str]:
        """What was not run."""
        points = scale_of(self.suite, self.scale).points
        for method in self.suite.methods:
            if self.next_points(method):
                yield f"{method}: {len(self.losses(method))} of {points} points"
            elif (there := len(self.best(method))) < self.seeds:
                yield f"{method}: {there} of {self.seeds} seeds"

    def budget(self, records: Iterable[Record], at: At) -> float:
        """The most that all of these runs have spent: tokens, FLOPs, or centralised steps' time."""
        return min(self.spent(one, at) for one in records)

    def spent(self, record: Record, at: At) -> float:
        """All that a run did."""
        if at == "time":
            return time_of(record, scale_of(self.suite, self.scale).exchange_steps)
        return record[at]

    def loss(self, record: Record, at: At, budget: float) -> float:
        """Held-out loss once a run has spent so much."""
        return loss_at(_curve(record), record["tokens"] * budget / self.spent(record, at))

    def judged(self, claim: Claim) -> Verdict | None:
        """What becomes of a claim; None where no seed has both."""
        others = {one["seed"]: one for one in self.best(claim.other)}
        pairs = [
            (one, others[one["seed"]]) for one in self.best(claim.one) if one["seed"] in others
        ]
        ratios = [self._ratio(claim, one, other) for one, other in pairs]
        return judge(ratios, claim.most) if ratios else None

    def _ratio(self, claim: Claim, one: Record, other: Record) -> float:
        if claim.measure == "bytes":
            return one["bytes"] / other["bytes"]
        if claim.measure in ("tokens", "time"):
            if other["loss"] is None:
                return math.inf
            share = max(1.0, tokens_to(_curve(one), other["loss"])) / one["tokens"]
            return share * self.spent(one, claim.measure) / self.spent(other, claim.measure)
        budget = self.budget([one, other], claim.at)
        return self.loss(one, claim.at, budget) / self.loss(other, claim.at, budget)


def _curve(record: Record) -> list[tuple[float, float]]:
    return [(tokens, _finite(loss)) for tokens, loss in record["curve"]]


def _finite(loss: float | None) -> float:
    return math.inf if loss is None else loss
