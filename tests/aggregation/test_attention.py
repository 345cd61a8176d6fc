"""Key layers merged by attention: what is alike counts for more, and nothing else decides."""

import math

import pytest
import torch

from photon.aggregation import WeightedMean
from photon.aggregation.attention import AttentionMean, taken_up
from photon.config.parts import PartsConfig
from photon.errors import QuorumLostError

LAYERS = {
    "weights/model.layers.0.a.weight": (40, 30),
    "weights/model.layers.0.b.weight": (17,),
    "weights/model.layers.1.a.weight": (40, 30),
}


def parts(**values):
    return PartsConfig.model_validate({"key": ["*"], "key_rule": "attention", **values})


def random(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}


def mixed(one, two, share):
    return {name: share * one[name] + (1 - share) * two[name] for name in one}


def merged(rule, updates, weights=None):
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        rule.add(iter(update.items()), weight, 1.0)
    return rule.result()


def test_what_is_alike_counts_for_more():
    direction = random(1)
    updates = [mixed(direction, random(seed), 0.8) for seed in (2, 3, 4)] + [random(5)]
    rule = AttentionMean(parts())
    merged(rule, updates)
    for shares in rule.shares.values():
        assert sum(shares) == pytest.approx(1)
        assert shares[3] < 0.6 * min(shares[:3])
    assert set(rule.shares) == {"weights/model.layers.0", "weights/model.layers.1"}


def test_it_is_the_weighted_sum_of_the_updates():
    updates = [random(seed) for seed in range(3)]
    rule = AttentionMean(parts())
    result = merged(rule, updates, [1.0, 2.0, 3.0])
    for name in LAYERS:
        shares = rule.shares[name.rsplit(".", 2)[0]]
        wanted = sum(share * one[name] for share, one in zip(shares, updates, strict=True))
        torch.testing.assert_close(result[name], wanted)


def test_with_a_very_high_temperature_it_is_the_mean():
    updates, weights = [random(seed) for seed in range(4)], [1.0, 5.0, 2.0, 2.0]
    ours = merged(AttentionMean(parts(key_temperature=1e9)), updates, weights)
    mean = merged(WeightedMean(), updates, weights)
    for name in LAYERS:
        torch.testing.assert_close(ours[name], mean[name])


@pytest.mark.parametrize("rule", ["attention", "fedatt"])
def test_the_order_of_updates_decides_nothing(rule):
    updates, weights = [random(seed, 1 + seed) for seed in range(4)], [1.0, 5.0, 2.0, 3.0]
    order = [2, 0, 3, 1]
    one = merged(AttentionMean(parts(key_rule=rule)), updates, weights)
    two = merged(
        AttentionMean(parts(key_rule=rule)),
        [updates[k] for k in order],
        [weights[k] for k in order],
    )
    for name in LAYERS:
        torch.testing.assert_close(one[name], two[name])


def test_fedatt_goes_by_distance():
    near, far = random(1, 0.01), random(2, 0.03)
    rule = AttentionMean(parts(key_rule="fedatt"))
    merged(rule, [near, far])
    own = [
        math.sqrt(sum(float((one[n] ** 2).sum()) for n in LAYERS if ".layers.0." in n))
        for one in (near, far)
    ]
    powers = [math.exp(norm) for norm in own]
    wanted = [power / sum(powers) for power in powers]
    assert rule.shares["weights/model.layers.0"] == pytest.approx(wanted, rel=1e-5)


def test_an_update_of_nothing_does_no_harm():
    zero = {name: torch.zeros(shape) for name, shape in LAYERS.items()}
    result = merged(AttentionMean(parts()), [zero, zero])
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in result.values())


def test_a_round_given_up_leaves_nothing():
    rule = AttentionMean(parts())
    rule.add(iter(random(1).items()), 1.0, 1.0)
    rule.discard()
    with pytest.raises(QuorumLostError):
        rule.result()
    rule.discard()
    again = merged(rule, [random(2)])
    for name, tensor in random(2).items():
        torch.testing.assert_close(again[name], tensor)


class TestTakenUp:
    anchor, own, above = random(1), random(2), random(3)

    def taken(self, **values):
        return taken_up(parts(**values), self.anchor, self.own, self.above)

    def test_its_own_alone(self):
        assert self.taken(key_down="keep") == self.own

    def test_half_and_half(self):
        for name, tensor in self.taken(key_down="mean").items():
            torch.testing.assert_close(tensor, (self.own[name] + self.above[name]) / 2)

    def test_a_very_low_temperature_keeps_its_own_and_a_very_high_one_halves(self):
        for temperature, share in ((1e-4, 1.0), (1e9, 0.5)):
            taken = self.taken(key_down="attention", key_temperature=temperature)
            wanted = mixed(self.own, self.above, share)
            for name, tensor in taken.items():
                torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)

    def test_the_nearer_the_above_moved_the_more_it_counts(self):
        alike = mixed(self.own, self.above, 0.7)
        for above, most in ((alike, 0.62), (self.above, 0.75)):
            got = taken_up(parts(key_down="attention"), self.anchor, self.own, above)
            name = "weights/model.layers.1.a.weight"
            delta = (got[name] - above[name]).norm() / (self.own[name] - above[name]).norm()
            assert 0.5 <= float(delta) < most
