"""The bound on updates: above all that honest steps can do, below what wrecks a model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from photon.config import parse_run_config
from photon.federation.checkpoint import RunState
from photon.federation.norm_bound import COUNTED, FACTOR, SLACK, lr_sum, norm_bound, usual_norm
from photon.training import InnerOptimizer, Schedule

START = RunState(0, 0, "model", "data")
STATE = {"weights/a": torch.full((30, 20), 2.0), "weights/b": torch.zeros(40)}
PARAMETERS = 640


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((30, 20), 2.0))
        self.b = nn.Parameter(torch.zeros(40))

    def get_input_embeddings(self):
        return None

    get_output_embeddings = get_input_embeddings


def config(*overrides):
    tree = {
        "model": {"preset": "tiny"},
        "data": {"path": "unread"},
        "federation": {"rounds": 5},
        "local": {"steps": 20, "lr": 0.01},
    }
    return parse_run_config(tree, overrides)


def bound(*overrides, before=START, state=STATE):
    return norm_bound(config(*overrides), before, state)


@pytest.mark.parametrize(
    "overrides",
    [
        ["local.optimizer=adamw"],
        ["local.optimizer=adamw", "local.optimizer_bits=8"],
        ["local.optimizer=adamw", "local.beta1=0.97", "local.beta2=0.9"],
        ["local.optimizer=adamw", "local.weight_decay=3.0"],
        ["local.optimizer=muon", "local.weight_decay=0.1"],
        ["local.optimizer=muon", "local.adamw_lr_ratio=40.0"],
        ["local.optimizer=adopt"],
        ["local.optimizer=amsgrad", "federation.optimizer_state=average", "local.epsilon=1e-8"],
        ["local.optimizer=sgd"],
    ],
)
def test_no_gradients_move_weights_further(overrides):
    """Whatever they are: of any scale, all alike, of changing sign, or one in a hundred."""
    run = config(*overrides)
    schedule, draw = Schedule.of(run), torch.Generator().manual_seed(0)
    for pattern in ("alike", "wild", "rare"):
        model = Model()
        optimizer = InnerOptimizer(model, run.local)
        for step in range(run.local.steps):
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.grad = {
                    "alike": torch.ones_like(parameter),
                    "wild": noise * 10.0 ** float(noise.view(-1)[0] * 3),
                    "rare": noise * (noise > 2.3) + 1e-4 * noise,
                }[pattern]
            if run.local.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), run.local.clip_norm)
            optimizer.step(schedule.factor(step))
        a, b = model.a.detach(), model.b.detach()
        moved = math.hypot(float((a - 2).norm()), float(b.norm()))
        most = norm_bound(run, START, STATE).norm / SLACK
        assert moved <= most * 1.001, pattern
        # And what is at most moved is no hundred times what is.
        assert pattern != "alike" or moved > most / 20


def test_it_follows_the_schedule_and_says_where_it_comes_from():
    run = config("local.warmup_steps=30")
    one = norm_bound(run, START, STATE)
    factors = sum((step + 1) / 30 for step in range(20))
    ratio = 0.1 / math.sqrt(0.05) * math.sqrt((1 - (0.81 / 0.95) ** 20) / (1 - 0.81 / 0.95))
    assert one.norm == pytest.approx(SLACK * 0.01 * factors * ratio * math.sqrt(PARAMETERS))
    assert one.refuse(one.norm) is None
    refused = one.refuse(2 * one.norm)
    assert refused.startswith(
        f"its norm {2 * one.norm:.4g} exceeds {one.norm:.4g}, 2 times what 20"
    )
    assert 'federation.max_update_norm = "auto"' in refused


def test_what_comes_late_may_be_as_large_as_when_it_was_trained():
    last = replace(START, round=4, global_step=80)
    first, now = bound().norm, bound(before=last).norm
    late = bound('federation.pace="buffered"', before=last).norm
    assert now < first <= late


def test_after_a_round_its_median_bounds_the_next():
    run = config("local.warmup_steps=60")
    after = replace(START, round=1, global_step=20, merged_norm=0.1, merged_lr_sum=lr_sum(run, 0))
    second = norm_bound(run, after, STATE)
    # The second third of a linear warm-up has three times the learning rate of the first, or so.
    assert 2.8 < second.norm / (FACTOR * 0.1) < 3
    assert "the median of what round 1 merged (0.1)" in second.refuse(10.0)
    assert second.counted == pytest.approx(second.norm * COUNTED / FACTOR)
    assert second.share(second.counted) == 1.0
    assert second.share(4 * second.counted) == 0.25
    falling = replace(after, merged_lr_sum=10.0)
    assert norm_bound(run, falling, STATE).norm == pytest.approx(FACTOR * 0.1)
    huge = replace(after, merged_norm=1e9)
    assert norm_bound(run, huge, STATE).norm < 100
    nothing = replace(after, merged_norm=0.0)
    assert norm_bound(run, nothing, STATE).norm < 100
    still = replace(after, merged_lr_sum=0.0)  # fed-back error came in a round of learning rate 0
    assert norm_bound(run, still, STATE).norm == norm_bound(run, nothing, STATE).norm


@pytest.mark.parametrize("others", [[], [0.1]], ids=["drawn alone", "one of two"])
def test_one_tiny_update_has_no_others_refused(others):
    """Where it is one of few, round after round, from the first on."""
    run, honest = config("local.schedule=constant"), 0.1
    before = replace(START, merged_norm=usual_norm([0.1, honest], START))
    for _ in range(3):
        usual = usual_norm([1e-30, *others], before)
        before = replace(before, round=1, merged_norm=usual, merged_lr_sum=lr_sum(run, 0))
        bound = norm_bound(run, before, STATE)
        assert bound.refuse(honest) is None
        assert bound.share(honest) == 1.0
    assert usual_norm([1e-30, honest], START) == honest


def test_one_of_two_raises_no_bound_and_a_minority_moves_no_median():
    before = replace(START, merged_norm=0.1)
    assert usual_norm([0.2, 0.1], before) == 0.1
    assert usual_norm([0.1, 0.2, 0.0, 9.0], before) == 0.1
    assert usual_norm([0.01, 0.02, 0.03], before) == 0.02


def test_what_can_not_be_known_before_the_first_round_is_known_after_it():
    first = bound("local.optimizer=sgd", "local.clip_norm=0")
    assert first.share(1e30) == 1.0
    assert first.refuse(1e30) is None
    after = replace(START, round=1, global_step=20, merged_norm=0.1, merged_lr_sum=0.2)
    second = bound("local.optimizer=sgd", "local.clip_norm=0", before=after)
    assert second.norm == pytest.approx(1.0)


def test_error_feedback_may_bring_what_earlier_rounds_held_back():
    late = replace(START, round=4, global_step=80)
    plain = bound("local.schedule=constant", before=late).norm
    fed = bound("local.schedule=constant", "link.update_codec=sparseloco", before=late).norm
    assert fed / plain == pytest.approx(sum(0.95**age for age in range(5)))
    for_ever = bound(
        "local.schedule=constant",
        "link.update_codec=sparseloco",
        "link.feedback_decay=1",
        before=late,
    )
    assert for_ever.norm / plain == pytest.approx(5)


def test_a_number_or_none_is_taken_as_it_is():
    assert bound("federation.max_update_norm=7").norm == 7
    assert bound("federation.max_update_norm=none").norm == math.inf
    words = bound("federation.max_update_norm=7").refuse(8.0)
    assert words == "its norm 8 exceeds federation.max_update_norm = 7"


def test_averaged_state_is_bounded_by_clipped_gradients():
    state = STATE | {"optimizer/a.exp_avg": torch.full((30, 20), 1.0)}
    held = math.sqrt(600)
    averaged = "federation.optimizer_state=average"
    assert bound(averaged, state=state).state == pytest.approx(SLACK * (held + 1 + 1))
    assert bound(averaged, "local.clip_norm=0", state=state).state == math.inf


def test_a_noised_sum_is_not_held_against_earlier_ones():
    """Its noise goes by how many are in it."""
    noised = ["privacy.mechanism=client", "privacy.clip_norm=1.0", "privacy.noise_multiplier=1.0"]
    before = replace(START, round=3, global_step=60, merged_norm=1e-3, merged_lr_sum=0.2)
    assert bound(*noised, before=before).norm == pytest.approx(FACTOR * 1e-3)
    summed = [*noised, "privacy.secure_aggregation=true", "privacy.noise_at=sum"]
    found = bound(*summed, before=before)
    assert found.norm > math.sqrt(PARAMETERS)
    assert math.isinf(found.counted)
