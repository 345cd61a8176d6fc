"""Claims: by a rule that is written down, held against figures worked out elsewhere."""

from __future__ import annotations

import math

import pytest

from photon.bench.verdict import judge


def test_the_interval_is_student_s() -> None:
    """Of logs -0.1, -0.2, -0.3: mean -0.2, s 0.1, t(2) 4.303, half width 0.2484."""
    found = judge([math.exp(-0.1), math.exp(-0.2), math.exp(-0.3)], 1.05)
    assert found.ratio == pytest.approx(math.exp(-0.2))
    assert found.low == pytest.approx(math.exp(-0.44843), rel=1e-4)
    assert found.high == pytest.approx(math.exp(0.04843), rel=1e-4)
    assert found.word == "confirmed"


@pytest.mark.parametrize(
    ("ratios", "most", "word"),
    [
        ([0.9, 0.901, 0.899], 1.0, "confirmed"),
        ([1.1, 1.101, 1.099], 1.0, "refuted"),
        ([0.9, 1.1, 1.0], 1.0, "undecided"),
        ([0.9, 0.9], 1.0, "undecided"),  # two seeds decide nothing
        ([0.5, 0.5, 0.5], 0.5, "confirmed"),  # at most, so the bar itself is within
        ([math.inf] * 3, 1.0, "refuted"),
        ([math.inf, 0.5, 0.5], 1.0, "undecided"),
        ([math.inf], 1.0, "undecided"),
    ],
)
def test_words(ratios: list[float], most: float, word: str) -> None:
    assert judge(ratios, most).word == word


def test_what_is_no_ratio_is_refused() -> None:
    for ratios in ([], [0.0], [-1.0, 1.0], [math.nan]):
        with pytest.raises(ValueError, match="positive"):
            judge(ratios, 1.0)
