"""Noise on the sum of clipped updates, and a clip that follows a count under masks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from secure_cohort import SHAPES, Round, names_of, same, update_of

from photon.config.privacy import CLIP_MOVES, PrivacyConfig
from photon.errors import PolicyError
from photon.federation.secure_rounds import next_clip, noised_mean
from photon.privacy import release_key
from photon.secure.masks import Masks, derived
from photon.secure.member import COUNT, Seal, pair_keys

CLIP = 20.0


def privacy(**changes):
    told = {"mechanism": "client", "clip_norm": CLIP, "noise_multiplier": 1.0}
    told |= {"secure_aggregation": True, "noise_at": "sum"}
    return PrivacyConfig(**told | changes)


def key(*words, secret=b"s" * 32, round_=1):
    return release_key(secret, round_, *words)


def opened(round_, outside=()):
    round_.advertise()
    round_.share()
    for name in round_.names:
        update = round_.sealed(name, within=name not in outside)
        assert round_.sum.add(name, update.items(), round_.count) is None
    round_.unmask()
    return round_.sum


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    weights = dict(zip(names_of(5), (1, 1, 1, 1, 4), strict=True))
    folder = tmp_path_factory.mktemp("summed")
    return opened(Round(folder, names_of(5), weights=weights, clip=CLIP), outside=names_of(2))


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(SHAPES)])


def test_noise_is_as_large_as_the_largest_part_of_one_member(summed):
    """Weights of 1, 1, 1, 1 and 4 in 8: one of them moves the mean by C / 2 at most."""
    plain = flat(dict(summed.mean()))
    for quantile, more in ((None, 1.0), (0.5, 1 / math.sqrt(0.99))):
        run = privacy(clip_quantile=quantile, noise_multiplier=0.7)
        noise = flat(dict(noised_mean(summed, run, key))) - plain
        expected = 0.7 * more * CLIP * 4 / 8
        assert float(noise.std()) == pytest.approx(expected, rel=0.02)
        assert abs(float(noise.mean())) < 5 * expected / math.sqrt(len(noise))


def test_noise_is_the_same_for_the_same_sum_and_no_other(summed):
    run = privacy()
    once, again = (dict(noised_mean(summed, run, key)) for _ in range(2))
    assert same(once, again)
    other = dict(noised_mean(summed, run, partial(key, round_=2)))
    assert not torch.equal(flat(once), flat(other))
    plain = flat(dict(summed.mean()))
    both = torch.stack([flat(once) - plain, flat(other) - plain])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.03


@pytest.mark.parametrize("clip", [CLIP, None])
def test_before_noise_on_the_sum_rounding_makes_no_update_longer(clip, tmp_path):
    round_ = Round(tmp_path, names_of(8), clip=clip)
    round_.advertise()
    round_.share()
    longer = 0
    for name in names_of(8):
        seal = Seal(tmp_path / name, name, round_.cohort.text)
        for one, tensor in update_of(name).items():
            _, said = seal.encode(one, tensor)
            longer += int((said.abs() > tensor.abs() * (1 + 1e-6)).sum())
    assert (longer == 0) == (clip is not None)


def test_members_are_counted_and_one_word_says_nothing(tmp_path):
    names = names_of(8)
    round_ = Round(tmp_path, names, clip=CLIP)
    found = opened(round_, outside=names[:3])
    assert found.within() == 5 - 3
    # What a member sent is the mask, plus or minus 1: with its keys, and only then, it is read.
    seal = Seal(tmp_path / names[0], names[0], round_.cohort.text)
    word = seal.count(within=False)
    party, cohort = seal._found, round_.cohort
    keys = {derived(party.derived("own"), "own mask", cohort.id): 1}
    keys |= pair_keys(party.derived("mask"), names[0], cohort.masks[names[0]], cohort)
    mask = torch.zeros(1, dtype=torch.int16).numpy().view("<u2")
    Masks(keys).add(mask, COUNT)
    assert (word - int(mask[0])) % (1 << cohort.bits) == (1 << cohort.bits) - 1
    assert word not in (1, (1 << cohort.bits) - 1)


def test_another_count_is_another_update(tmp_path):
    round_ = Round(tmp_path, names_of(3), clip=CLIP)
    round_.advertise()
    round_.share()
    round_.sealed("silo-00", within=True)
    with pytest.raises(PolicyError, match="another update"):
        round_.sealed("silo-00", within=False)


@pytest.mark.parametrize("count", [None, -1, 1 << 16])
def test_who_is_not_counted_is_not_summed(count, tmp_path):
    round_ = Round(tmp_path, names_of(3), clip=CLIP)
    round_.advertise()
    round_.share()
    update = round_.sealed("silo-00")
    assert "whether it kept within" in round_.sum.add("silo-00", update.items(), count)
    assert round_.sum.survivors == []


def test_a_count_that_nobody_asked_for_is_refused(tmp_path):
    round_ = Round(tmp_path, names_of(3))
    round_.advertise()
    round_.share()
    update = round_.sealed("silo-00")
    assert round_.count is None
    assert "whether it kept within" in round_.sum.add("silo-00", update.items(), 1)


def test_the_clip_comes_to_the_quantile(summed):
    """Of 5 members with norms of 1 to 5 and hardly any noise, a quantile of 0.6 is from 3 to 4."""
    run = privacy(clip_quantile=0.6, noise_multiplier=1e-6, clip_norm=30.0)
    clip = 30.0
    for number in range(300):
        within = sum(norm <= clip for norm in (1, 2, 3, 4, 5))
        found = replace(summed, cohort=summed.cohort.model_copy(update={"clip": clip}))
        found.within = lambda within=within: 2 * within - 5
        clip = next_clip(found, run, partial(key, round_=number))
    assert 2.99 < clip < 4.01


def test_the_clip_stays_where_a_lie_can_not_take_it(summed):
    run, clip = privacy(clip_quantile=0.5, noise_multiplier=1e-6), CLIP
    for number in range(80):
        found = replace(summed, cohort=summed.cohort.model_copy(update={"clip": clip}))
        found.within = lambda: -5
        clip = next_clip(found, run, partial(key, round_=number))
    assert clip == CLIP * CLIP_MOVES


def test_a_count_beyond_all_members_counts_as_all(tmp_path):
    round_ = Round(tmp_path, names_of(3), clip=CLIP)
    found = opened(round_)
    found._words[COUNT][0] = 200
    assert found.within() == 3


def test_the_count_has_noise(summed):
    """z / sqrt(0.01) on a sum of which each member is 1: ten times z."""
    run = privacy(clip_quantile=0.5, noise_multiplier=0.05)
    moved = [
        math.log(next_clip(summed, run, partial(key, round_=number)) / CLIP)
        for number in range(2000)
    ]
    assert summed.within() == 1
    told = -5 * (torch.tensor(moved) / 0.2)  # 5 (within - 0.5), within = (1 + told / 5) / 2
    assert float(told.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(told.std()) == pytest.approx(0.25, rel=0.1)
