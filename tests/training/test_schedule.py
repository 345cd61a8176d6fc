import math

import pytest

from photon.config import parse_run_config
from photon.training import Schedule


def test_cosine_warms_up_peaks_and_ends_at_the_minimum():
    schedule = Schedule("cosine", total_steps=110, warmup_steps=10, min_ratio=0.1)
    assert [schedule.factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert schedule.factor(109) == pytest.approx(0.1)
    middle = 10 + 99 / 2
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (60 - 10) / 99))
    assert schedule.factor(60) == pytest.approx(expected)
    assert schedule.factor(int(middle)) > 0.5
    assert schedule.factor(10_000) == pytest.approx(0.1)


def test_wsd_is_stable_then_decays_linearly():
    schedule = Schedule("wsd", total_steps=100, warmup_steps=10, decay_steps=20, min_ratio=0.0)
    assert {schedule.factor(step) for step in range(10, 80)} == {1.0}
    assert schedule.factor(89) == pytest.approx(0.5)
    assert schedule.factor(99) == 0.0


def test_the_clock_spans_all_rounds_and_belongs_to_the_server():
    config = parse_run_config(
        {
            "model": {"preset": "tiny"},
            "data": {"path": "x"},
            "federation": {"rounds": 5},
            "local": {"steps": 8, "schedule": "wsd"},
        }
    )
    schedule = Schedule.of(config)
    assert schedule.total_steps == 40
    assert schedule.decay_steps == 4
    # A node that joins in round 4 reads the same point of the curve as everybody.
    assert schedule.factor(3 * 8) == Schedule.of(config).factor(24)
