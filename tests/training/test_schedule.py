import math

import pytest

from photon.config import parse_run_config
from photon.errors import IncompatibleConfigError
from photon.training import Schedule, photon_recipe
from photon.training.recipe import CentralRecipe


def test_recipe_is_the_papers_example():
    """arXiv 2411.02908, 125M: 5,120 steps of 256 become 320 rounds of 128 steps of 32."""
    central = CentralRecipe(steps=5120, batch_size=256, warmup_steps=100, lr=6e-4, min_lr=6e-5)
    local = photon_recipe(central, batch_size=32, local_steps=128)
    assert (local.steps, local.warmup_steps, local.rounds) == (40_960, 800, 320)
    assert (local.lr, local.min_lr) == (6e-4, 6e-5)


@pytest.mark.parametrize(
    ("batch_size", "local_steps"), [(0, 128), (512, 128), (32, 0), (32, 10**6)]
)
def test_recipe_refuses_what_cannot_be_stretched(batch_size, local_steps):
    central = CentralRecipe(steps=5120, batch_size=256, warmup_steps=100, lr=6e-4, min_lr=6e-5)
    with pytest.raises(IncompatibleConfigError, match="must lie between 1 and"):
        photon_recipe(central, batch_size=batch_size, local_steps=local_steps)


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
