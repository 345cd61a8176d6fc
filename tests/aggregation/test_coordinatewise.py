"""Median and trimmed mean: what they are, and that a minority can't move them away."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.aggregation import Median, MergingRule, TrimmedMean, WeightedMean, sorting_network
from photon.aggregation.sorting_network import sort_across


def merged(rule: MergingRule, rows: list[torch.Tensor], weight: float = 1.0) -> torch.Tensor:
    for row in rows:
        rule.add([("w", row)], weight, float(row.norm()))
    return rule.result()["w"]


def rows_of(count: int, seed: int, size: int = 50) -> list[torch.Tensor]:
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts_every_pattern_of_zeros_and_ones(count: int) -> None:
    """A comparator network that sorts these sorts everything (Knuth, the 0-1 principle)."""
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count))).t().contiguous()
    assert torch.stack(sort_across(list(patterns.clone()))).equal(patterns.sort(0).values)


@pytest.mark.parametrize("count", [16, 17, 31, 64, 100])
def test_the_network_sorts_many_rows(count: int) -> None:
    rows = torch.stack(rows_of(count, count, size=200))
    assert torch.stack(sort_across(list(rows.clone()))).equal(rows.sort(0).values)
    bound = count * math.log2(count) ** 2 / 4 + count
    assert len(sorting_network._comparators(count)) <= bound


@given(count=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_median_is_the_middle_or_the_mean_of_the_two_middles(count: int, seed: int) -> None:
    rows = rows_of(count, seed)
    expected = torch.stack(rows).double().quantile(0.5, dim=0)
    torch.testing.assert_close(merged(Median(), rows).double(), expected, rtol=1e-6, atol=1e-7)
    if count % 2:
        assert merged(Median(), rows).equal(torch.stack(rows).median(0).values)


@given(
    count=st.integers(1, 12), seed=st.integers(0, 1000), trim=st.sampled_from([0, 0.1, 0.2, 0.45])
)
def test_the_trimmed_mean_is_that_of_the_paper(count: int, seed: int, trim: float) -> None:
    rows = rows_of(count, seed)
    dropped = math.floor(trim * count)
    expected = torch.stack(rows).double().sort(0).values[dropped : count - dropped].mean(0)
    found = merged(TrimmedMean(trim), rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("trim", "updates", "dropped"),
    [(0.2, 4, 0), (0.2, 5, 1), (0.2, 9, 1), (0.29, 100, 29), (0.49999999999, 10, 4), (0.0, 7, 0)],
)
def test_how_many_are_dropped(trim: float, updates: int, dropped: int) -> None:
    assert TrimmedMean(trim).dropped(updates) == dropped


@pytest.mark.parametrize("weight", [0.001, 1.0, 1e9])
def test_weights_do_not_matter(weight: float) -> None:
    rows = rows_of(5, 0)
    assert merged(Median(), rows, weight).equal(merged(Median(), rows))


def test_the_largest_values_do_not_overflow() -> None:
    largest = torch.full((3,), torch.finfo(torch.float32).max)
    assert merged(Median(), [largest, largest]).equal(largest)
    assert merged(TrimmedMean(0.2), [largest] * 7).equal(largest)


@given(seed=st.integers(0, 1000), size=st.sampled_from([1.0, 50.0, 1e9]))
def test_a_poisoned_minority_stays_within_the_honest_range(seed: int, size: float) -> None:
    """4 of 9 against the median, 2 of 10 against the trimmed mean; the same kind of attack."""
    attacks = [torch.full((50,), size), torch.full((50,), -size), -size * rows_of(1, seed + 1)[0]]
    attacks.append(attacks[0])
    for rule, honest, bad in ((Median(), 5, 4), (TrimmedMean(0.2), 8, 2)):
        good = rows_of(honest, seed)
        found = merged(rule, [*attacks[:bad], *good])
        stacked = torch.stack(good)
        assert bool((found >= stacked.min(0).values).all())
        assert bool((found <= stacked.max(0).values).all())


def test_a_majority_or_the_plain_mean_is_moved() -> None:
    """The bound above would not hold for any other reason."""
    good, bad = rows_of(4, 0), [torch.full((50,), 1e6)] * 5
    assert float(merged(Median(), good + bad).min()) == 1e6
    assert float(merged(WeightedMean(), rows_of(8, 0) + bad[:2]).min()) > 1e5
    assert float(merged(TrimmedMean(0.2), good[:3] + bad[:1]).min()) > 1e5, (
        "4 updates: none dropped"
    )
