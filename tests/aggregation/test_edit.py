"""EDiT's penalty: who is refused and when, softmax weights, the last clip, what is kept."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.aggregation import EditMean
from photon.aggregation.edit import ALPHA, WARM_UP, NormStatistics, module_of
from photon.errors import ModelMismatchError

BASE = torch.randn(30, generator=torch.Generator().manual_seed(0))
BASE /= BASE.norm()


def run_round(rule: EditMean, norms: list[float]) -> list[float]:
    """One round of updates of these norms; the norms that were refused."""
    refused = []
    for norm in norms:
        if rule.refuse(norm) is not None:
            refused.append(norm)
            continue
        rule.add([("w", BASE * norm)], 1.0, norm)
    if len(refused) < len(norms):
        rule.result()
    return refused


def trained(rounds: int = 5, bound: float | None = None) -> EditMean:
    """A rule that has seen so many rounds of four honest norms around 1."""
    rule = EditMean(anomaly_z=3.0, bound=bound)
    for number in range(rounds):
        assert run_round(rule, [0.9, 1.0, 1.05 + 0.01 * number, 1.1]) == []
    return rule


def test_a_norm_of_fifty_times_is_refused_after_the_warm_up_and_not_before() -> None:
    rule = EditMean(3.0, None)
    for merged in range(0, WARM_UP, 4):
        assert rule.refuse(50.0) is None, f"after {merged} norms"
        run_round(rule, [0.9, 1.0, 1.0, 1.1])
    reason = rule.refuse(50.0)
    assert reason is not None
    for part in ("norm 50", "deviations", "1 +- 0.1", "federation.anomaly_z = 3"):
        assert part in reason


def test_what_is_refused_does_not_move_the_figures() -> None:
    one, two = trained(), trained()
    assert run_round(one, [1.0, 50.0, 1.1, 70.0]) == [50.0, 70.0]
    assert run_round(two, [1.0, 1.1]) == []
    assert one.state_tensors() == two.state_tensors()


def test_a_smaller_norm_is_never_unusual() -> None:
    assert trained().refuse(0.0) is None


def test_like_norms_leave_room_for_a_schedule() -> None:
    """Without the least deviation, 1.01 would be infinitely many deviations away."""
    rule = EditMean(3.0, None)
    for _ in range(5):
        run_round(rule, [1.0] * 4)
    assert rule.refuse(1.29) is None
    assert rule.refuse(1.31) is not None


def test_norms_of_zero_do_not_refuse_all_that_follows() -> None:
    rule = EditMean(3.0, None)
    for _ in range(5):
        run_round(rule, [0.0] * 4)
    assert rule.refuse(1.0) is None


def test_a_wider_z_allows_more() -> None:
    narrow, wide = EditMean(2.0, None), EditMean(8.0, None)
    for rule in (narrow, wide):
        for _ in range(5):
            run_round(rule, [0.8, 1.0, 1.0, 1.2])
    assert narrow.refuse(1.6) is not None
    assert wide.refuse(1.6) is None


@given(seed=st.integers(0, 1000), count=st.integers(1, 9))
def test_who_is_refused_does_not_depend_on_the_order_of_arrival(seed: int, count: int) -> None:
    draw = random.Random(seed)
    norms = [draw.lognormvariate(0, 1) for _ in range(count)]
    shuffled = draw.sample(norms, count)
    one, two = trained(), trained()
    assert sorted(run_round(one, norms)) == sorted(run_round(two, shuffled))
    assert one.state_tensors() == two.state_tensors(), "bit for bit"


def test_the_first_figures_are_plain_mean_and_deviation() -> None:
    draw = random.Random(1)
    norms = [draw.uniform(1, 2) for _ in range(40)]
    seen = NormStatistics()
    for start in range(0, 40, 8):
        seen = seen.with_round(norms[start : start + 8])
    assert seen.count == 40
    assert seen.mean == pytest.approx(statistics.fmean(norms), rel=1e-12)
    assert seen.variance == pytest.approx(statistics.pvariance(norms), rel=1e-9)


def test_later_figures_are_exponential_moving_averages() -> None:
    """One norm a round: the paper's mu <- (1 - a) mu + a G; variance of the same mixture."""
    seen = NormStatistics(count=1000, mean=4.0, variance=1.0).with_round([6.0])
    assert seen.mean == pytest.approx((1 - ALPHA) * 4 + ALPHA * 6)
    second = (1 - ALPHA) * (1 + 16) + ALPHA * 36
    assert seen.variance == pytest.approx(second - seen.mean**2)
    k_at_once = NormStatistics(count=1000, mean=4.0, variance=1.0).with_round([6.0] * 5)
    assert k_at_once.mean == pytest.approx(6 - 2 * (1 - ALPHA) ** 5)


def test_figures_follow_a_trend() -> None:
    rule = EditMean(3.0, None)
    for number in range(300):
        assert run_round(rule, [0.01 * (number + 1)] * 4) == []


def softmax_mean(rows: list[torch.Tensor], weights: list[float], usual: float) -> torch.Tensor:
    norms = torch.tensor([float(row.double().norm()) for row in rows], dtype=torch.float64)
    logs = torch.tensor(weights, dtype=torch.float64).log()
    shares = torch.softmax(logs - norms / usual, 0)
    return (torch.stack(rows).double() * shares[:, None]).sum(0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("order", [1, -1])
def test_weights_are_a_softmax_in_which_units_do_not_show(scale: float, order: int) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(30, generator=generator) * k for k in (1, 1.01, 1.3, 2)][::order]
    weights = [5.0, 1.0, 2.0, 7.0]
    rule = EditMean(3.0, None)
    run_round(rule, [4.0 * scale, 5.0 * scale])
    for row, weight in zip(rows, weights, strict=True):
        rule.add([("w", row * scale)], weight, scale * float(row.double().norm()))
    found = rule.result()["w"].double() / scale
    assert float((found - softmax_mean(rows, weights, usual=4.5)).abs().max()) <= 2e-6


def test_each_module_has_weights_of_its_own() -> None:
    """What is large in one layer says nothing of another; all tensors of a layer weigh alike."""
    rule = EditMean(3.0, None)
    names = ("model.layers.0.up.weight", "model.layers.0.down.weight", "model.norm.weight")
    for _ in range(2):
        rule.add([(name, torch.tensor([3.0, 4.0])) for name in names], 1.0, 9.0)
    rule.result()
    even, large = torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0])
    for sent in ((even, even, large), (large, even, even)):
        # In another order, and from memory that is used again.
        lent = torch.empty(2)
        rule.add(((name, lent.copy_(one)) for name, one in zip(names, sent, strict=True)), 1.0, 9.0)
    found = rule.result()
    layer, usual = math.hypot(50, 5), math.hypot(5, 5)
    for name, mine, theirs, mean in (
        (names[0], even, large, usual),
        (names[1], even, even, usual),
        (names[2], large, even, 5.0),
    ):
        norms = (usual, layer) if name != names[2] else (50.0, 5.0)
        shares = torch.softmax(torch.tensor([-one / mean for one in norms]), 0)
        assert torch.allclose(found[name], mine * shares[0] + theirs * shares[1])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("weights/model.layers.3.mlp.up_proj.weight", "weights/model.layers.3"),
        ("weights/transformer.blocks.11.norm_1.weight", "weights/transformer.blocks.11"),
        ("weights/model.norm.weight", "weights/model.norm"),
        ("weights/lm_head.weight", "weights/lm_head"),
        ("w", "w"),
    ],
)
def test_the_module_of_a_tensor(name: str, module: str) -> None:
    assert module_of(name) == module


def test_norms_far_beyond_the_usual_leave_a_mean() -> None:
    """Also where exp(-norm) is 0 in fp64 for every one of them."""
    rule = EditMean(3.0, None)
    run_round(rule, [1.0])
    for size in (2000.0, 1000.0):
        rule.add([("w", torch.full((1,), size))], 1.0, size)
    assert float(rule.result()["w"]) == 1000


def test_a_large_norm_counts_less_once_it_is_known_what_is_large() -> None:
    rule = EditMean(3.0, None)
    for ratio in (1.0, math.exp(-3 / 2.5)):  # the first round's mean is 2.5
        rule.add([("w", torch.tensor([1.0, 0.0]))], 1.0, 1.0)
        rule.add([("w", torch.tensor([0.0, 4.0]))], 1.0, 4.0)
        one, two = rule.result()["w"].tolist()
        assert two / 4 / one == pytest.approx(ratio)


@pytest.mark.parametrize(("bound", "expected"), [(None, 2.0), (5.0, 2.0), (0.5, 0.5)])
def test_the_merged_update_is_clipped_as_a_whole(bound: float | None, expected: float) -> None:
    rule = EditMean(3.0, bound)
    for _ in range(3):
        rule.add([("a", torch.tensor([1.2])), ("b", torch.tensor([[1.6]]))], 1.0, 2.0)
    result = rule.result()
    norm = math.hypot(float(result["a"]), float(result["b"]))
    assert norm == pytest.approx(expected)
    assert float(result["b"]) / float(result["a"]) == pytest.approx(1.6 / 1.2)


def test_state_round_trips_bit_for_bit() -> None:
    first = trained()
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    second = EditMean(3.0, None)
    second.load_state_tensors(saved)
    for tensor in saved.values():
        tensor.fill_(torch.nan)  # the rule keeps its own copy
    for rule in (first, second):
        assert run_round(rule, [1.0, 1.2, 40.0]) == [40.0]
    assert first.state_tensors() == second.state_tensors()
    assert second.state_tensors()["norm_count"].item() == 22


def test_a_fresh_rule_keeps_nothing_and_may_be_made_fresh_again() -> None:
    assert EditMean(3.0, None).state_tensors() == {}
    rule = trained()
    rule.load_state_tensors({})
    assert rule.state_tensors() == {}
    assert rule.refuse(50.0) is None


def test_a_discarded_round_leaves_no_trace() -> None:
    rule = trained()
    before = rule.state_tensors()
    rule.add([("w", BASE)], 1.0, 1.0)
    rule.discard()
    assert rule.state_tensors() == before
    run_round(rule, [1.0])
    assert rule.state_tensors()["norm_count"].item() == before["norm_count"].item() + 1


@pytest.mark.parametrize(
    "change",
    [
        {"norm_mean": torch.zeros(())},
        {"norm_mean": torch.zeros(2, dtype=torch.float64)},
        {"other": torch.zeros((), dtype=torch.float64)},
    ],
)
def test_anything_else_is_refused_and_the_state_kept(change: dict[str, torch.Tensor]) -> None:
    rule = trained()
    before = rule.state_tensors()
    with pytest.raises(ModelMismatchError, match="edit"):
        rule.load_state_tensors({**before, **change})
    assert rule.state_tensors() == before
