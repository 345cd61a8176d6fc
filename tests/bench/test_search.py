"""The search of best points: equal tries, and none wasted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from photon.bench.search import Point, best_point, inside, next_points


def searched(
    grid: Mapping[str, list[float]], loss: Callable[[dict[str, float]], float], most: int
) -> dict[Point, float]:
    losses: dict[Point, float] = {}
    while points := next_points(grid, losses, most):
        assert len(set(points)) == len(points)
        assert not set(points) & losses.keys()  # nothing is tried twice
        losses |= {point: loss(dict(point)) for point in points}
    return losses


def valley(at: float, width: float = 1.0) -> Callable[[float], float]:
    return lambda value: width * math.log(value / at) ** 2


def test_one_key_is_searched_beyond_its_end_until_the_best_is_inside() -> None:
    grid = {"lr": [1.0, 2.0, 4.0]}
    losses = searched(grid, lambda at: valley(30.0)(at["lr"]), 6)
    assert sorted(dict(point)["lr"] for point in losses) == [1, 2, 4, 8, 16, 32]
    assert not inside(grid, losses)  # 32 is the last: six tries were not enough
    more = searched(grid, lambda at: valley(30.0)(at["lr"]), 7)
    assert dict(best_point(more) or ())["lr"] == 32
    assert inside(grid, more)


def test_downwards_too_and_then_between() -> None:
    grid = {"lr": [1.0, 2.0, 4.0]}
    losses = searched(grid, lambda at: valley(0.6)(at["lr"]), 6)
    assert sorted(dict(point)["lr"] for point in losses) == [0.25, 0.5, 0.707, 1, 2, 4]
    assert inside(grid, losses)


def test_keys_one_after_the_other_at_the_best_of_those_before() -> None:
    grid = {"outer": [0.1, 0.3, 0.9], "lr": [1.0, 2.0, 4.0]}
    order: list[dict[str, float]] = []

    def loss(at: dict[str, float]) -> float:
        order.append(at)
        return valley(0.9)(at["outer"]) + valley(1.0)(at["lr"])

    searched(grid, loss, 5)
    assert all(at["lr"] == 2.0 for at in order[:3])
    assert all(at["outer"] == 0.9 for at in order[3:5])


def test_what_has_no_grid_is_run_once_and_divergence_is_no_best() -> None:
    assert next_points({}, {}, 5) == [()]
    assert next_points({}, {(): 1.0}, 5) == []
    grid = {"lr": [1.0, 2.0, 4.0]}
    losses = searched(grid, lambda at: math.inf, 5)
    assert best_point(losses) is None
    assert not inside(grid, losses)
    some = searched(grid, lambda at: math.inf if at["lr"] > 1 else valley(1)(at["lr"]), 6)
    assert dict(best_point(some) or ()) == {"lr": 1.0}


values = st.lists(st.floats(0.01, 100), min_size=3, max_size=5, unique=True).map(sorted)


@given(
    st.dictionaries(st.sampled_from(["a", "b"]), values, min_size=1),
    st.floats(0.001, 1000),
    st.integers(1, 9),
)
def test_never_more_tries_than_allowed_and_the_best_is_one_of_them(
    grid: dict[str, list[float]], at: float, most: int
) -> None:
    losses = searched(grid, lambda point: sum(map(valley(at), point.values())), most)
    assert 1 <= len(losses) <= most
    best = best_point(losses)
    assert best is not None
    assert losses[best] == min(losses.values())
