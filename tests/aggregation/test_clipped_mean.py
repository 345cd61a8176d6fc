"""The clipped mean: nobody's part is larger than the bound."""

from __future__ import annotations

import pytest
import torch

from photon.aggregation import ClippedMean, WeightedMean, check_update

Update = dict[str, torch.Tensor]


def update(seed: int, norm: float) -> Update:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(20, generator=generator) for name in ("a", "b")}
    now = check_update(tensors.items(), tensors)
    return {name: tensor * (norm / now) for name, tensor in tensors.items()}


def clipped(updates: list[Update], weights: list[float], bound: float) -> torch.Tensor:
    rule = ClippedMean(bound)
    for tensors, weight in zip(updates, weights, strict=True):
        rule.add(tensors.items(), weight, check_update(tensors.items(), tensors))
    return torch.cat(list(rule.result().values()))


def test_each_update_is_scaled_as_a_whole_and_then_averaged() -> None:
    updates, weights = [update(0, 1.0), update(1, 8.0), update(2, 2.0)], [1.0, 5.0, 2.0]
    flat = [torch.cat(list(tensors.values())).double() for tensors in updates]
    expected = (1 * flat[0] + 5 * flat[1] * 2 / 8 + 2 * flat[2]) / 8
    torch.testing.assert_close(clipped(updates, weights, 2.0).double(), expected)


def test_small_updates_are_merged_bit_for_bit_as_by_the_mean() -> None:
    updates, weights = [update(k, 1.0) for k in range(4)], [1.0, 3.0, 0.5, 2.0]
    mean = WeightedMean()
    for tensors, weight in zip(updates, weights, strict=True):
        mean.add(tensors.items(), weight)
    assert clipped(updates, weights, 1.001).equal(torch.cat(list(mean.result().values())))


@pytest.mark.parametrize("norm", [10.0, 1e6, 1e30])
def test_one_participants_influence_is_bounded_whatever_it_sends(norm: float) -> None:
    honest = [update(k, 0.9) for k in range(4)]
    calm = clipped([*honest, {n: 0 * t for n, t in honest[0].items()}], [1.0] * 5, 1.0)
    moved = clipped([*honest, update(9, norm)], [1.0] * 5, 1.0)
    assert float((moved - calm).norm()) == pytest.approx(1.0 / 5, rel=1e-5)
    assert float(moved.norm()) <= 1.0 + 1e-5


def test_the_plain_mean_is_moved_by_as_much_as_is_sent() -> None:
    """The bound above would not hold for any other reason."""
    mean = WeightedMean()
    for tensors in [*(update(k, 0.9) for k in range(4)), update(9, 1e6)]:
        mean.add(tensors.items(), 1.0)
    assert float(torch.cat(list(mean.result().values())).norm()) > 1e5
