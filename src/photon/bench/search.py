"""The search of a method's best point: the same number of tries for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Point = tuple[tuple[str, float], ...]


def as_point(values: Mapping[str, float]) -> Point:
    """To be a key; the values' order counts for nothing."""
    return tuple(sorted(values.items()))


def next_points(
    grid: Mapping[str, Sequence[float]], losses: Mapping[Point, float], most: int
) -> list[Point]:
    """What is to be tried now, all at a time; nothing: the search is over.

    One key after the other, the others at their best so far and before at their middle. Then, while
    tries are left, beyond the end of the key whose best value is the last one there; then between
    the best and its better neighbour.

    Args:
        grid: values of each key, rising.
        losses: of the points that were tried; infinite where training diverged.
    """
    if not grid:
        return [] if losses else [()]
    left = most - len(losses)
    best = best_point(losses)
    at = (
        dict(best)
        if best is not None
        else {key: values[len(values) // 2] for key, values in grid.items()}
    )
    for key, values in grid.items():
        wanted = [as_point(at | {key: value}) for value in values]
        if missing := [point for point in wanted if point not in losses]:
            # The middle first, should the tries not suffice.
            nearest = sorted(missing, key=lambda point: abs(math.log(dict(point)[key] / at[key])))
            return nearest[: max(0, left)]
    if left <= 0 or best is None:
        return []
    for key in grid:
        tried = _tried(key, at, losses)
        if len(tried) > 1 and at[key] in (tried[0], tried[-1]):
            step = tried[1] / tried[0] if at[key] == tried[0] else tried[-1] / tried[-2]
            value = at[key] / step if at[key] == tried[0] else at[key] * step
            return [as_point(at | {key: _round(value)})]
    key = next(iter(grid))
    tried = _tried(key, at, losses)
    place = tried.index(at[key])
    better = min(
        tried[place - 1 : place + 2 : 2], key=lambda value: losses[as_point(at | {key: value})]
    )
    between = as_point(at | {key: _round(math.sqrt(better * at[key]))})
    return [between] if between not in losses else []


def best_point(losses: Mapping[Point, float]) -> Point | None:
    """The one with the least loss; None where none was tried, or all diverged."""
    finite = {point: loss for point, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda point: (finite[point], point)) if finite else None


def inside(grid: Mapping[str, Sequence[float]], losses: Mapping[Point, float]) -> bool:
    """Whether each key's best value has tried ones on both sides."""
    best = best_point(losses)
    if best is None:
        return False
    at = dict(best)
    for key in grid:
        tried = _tried(key, at, losses)
        if at[key] in (tried[0], tried[-1]):
            return False
    return True


def _tried(key: str, at: Mapping[str, float], losses: Mapping[Point, float]) -> list[float]:
    """Values of a key that were tried with the others as they are, rising."""
    others = {name: value for name, value in at.items() if name != key}
    return sorted(
        dict(point)[key]
        for point in losses
        if {name: value for name, value in point if name != key} == others
    )


def _round(value: float) -> float:
    return float(f"{value:.3g}")
