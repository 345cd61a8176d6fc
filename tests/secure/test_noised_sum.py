"""Noise on the sum of clipped updates, and a clip that follows a count under masks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from secure_cohort import SHAPES, Round, names_of, update_of

from photon.config.privacy import CLIP_MOVES, PrivacyConfig
from photon.errors import PolicyError
from photon.federation.secure_rounds import next_clip, noise_of
from photon.privacy import release_key
from photon.secure.fixed_point import FixedPoint
from photon.secure.masks import Masks, derived
from photon.secure.member import COUNT, Seal, pair_keys

CLIP = 0.02


def privacy(**changes):
    told = {"mechanism": "client", "clip_norm": CLIP, "noise_multiplier": 1.0}
    told |= {"secure_aggregation": True, "noise_at": "sum"}
    return PrivacyConfig(**told | changes)


def key(*words, secret=b"s" * 32, round_=1):
    return release_key(secret, round_, *words)


def opened(round_, outside=(), noise=None):
    """The sum; noise is of a run's [privacy]."""
    round_.advertise()
    round_.share()
    for name in round_.names:
        update = round_.sealed(name, update_of(name, 0.03), within=name not in outside)
        assert round_.sum.add(name, update.items(), round_.count) is None
    if noise is not None:
        round_.noise = partial(noise_of, round_.sum, noise, key)
    round_.unmask()
    return round_.sum


WEIGHTS = dict(zip(names_of(5), (1, 1, 1, 1, 4), strict=True))


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summed")
    return opened(Round(folder, names_of(5), weights=WEIGHTS, clip=CLIP), outside=names_of(2))


def flat(tensors):
    return torch.cat([tensors[name].flatten().double() for name in sorted(SHAPES)])


@pytest.mark.parametrize(("quantile", "more"), [(None, 1.0), (0.5, 1 / math.sqrt(0.99))])
def test_noise_is_as_large_as_the_largest_part_of_one_member(quantile, more, summed, tmp_path):
    """Weights of 1, 1, 1, 1 and 4 in 8: one of them moves the mean by C / 2 at most."""
    run = privacy(clip_quantile=quantile, noise_multiplier=0.7)
    round_ = Round(tmp_path, names_of(5), weights=WEIGHTS, clip=CLIP)
    noised = opened(round_, outside=names_of(2), noise=run)
    noise = flat(dict(noised.mean())) - flat(dict(summed.mean()))
    expected = 0.7 * more * CLIP * 4 / 8
    assert float(noise.std()) == pytest.approx(expected, rel=0.02)
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(len(noise))


def test_noise_is_the_same_for_the_same_sum_and_no_other(summed):
    draw = partial(noise_of, summed, privacy())
    once, again, other = (
        draw(one, "weights/vector", 20000) for one in (key, key, partial(key, round_=2))
    )
    assert np.array_equal(once, again)
    both = np.stack([once.view(np.int16), other.view(np.int16)])
    assert abs(np.corrcoef(both)[0, 1]) < 0.03


def test_a_member_at_the_edge_of_the_ring_takes_no_noise_away(tmp_path):
    """It adds what brings the sum to the last number before the ring goes round, where a few words
    of another's turn it from all that there is to minus that."""
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def share_that_went_round(folder, moved, noise):
        round_ = Round(folder, names_of(5), clip=CLIP)
        round_.advertise()
        round_.share()
        unit = FixedPoint.of(round_.cohort).unit(0.25)
        for name in round_.names:
            update = dict(zero)
            if name == "silo-01" and moved:
                update["weights/matrix"] = torch.full(SHAPES["weights/matrix"], 3.5 * unit)
            sealed = round_.sealed(name, update)
            if name == "silo-04":  # the liar
                sealed = {one: (tensor + 32766) % 65536 for one, tensor in sealed.items()}
            assert round_.sum.add(name, sealed.items(), round_.count) is None
        round_.noise = partial(noise_of, round_.sum, privacy(noise_multiplier=noise), key)
        mean = round_.unmask()["weights/matrix"]
        return float((mean < 0).double().mean())

    shares = [share_that_went_round(tmp_path / f"{on}", on, 1.0) for on in (False, True)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.03)
    # So it was without: the first would be 0, the second 1.
    plain = [share_that_went_round(tmp_path / f"plain{on}", on, 0.0) for on in (False, True)]
    assert plain == [0.0, 1.0]


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
    run, clip = privacy(clip_quantile=0.6, clip_norm=30.0), 30.0
    for _ in range(300):
        within = sum(norm <= clip for norm in (1, 2, 3, 4, 5))
        found = replace(summed, cohort=summed.cohort.model_copy(update={"clip": clip}))
        found.within = lambda within=within: 2 * within - 5
        clip = next_clip(found, run)
    assert 2.99 < clip < 4.01


def test_the_clip_stays_where_a_lie_can_not_take_it(summed):
    run, clip = privacy(clip_quantile=0.5), CLIP
    for _ in range(80):
        found = replace(summed, cohort=summed.cohort.model_copy(update={"clip": clip}))
        found.within = lambda: -5
        clip = next_clip(found, run)
    assert clip == CLIP * CLIP_MOVES


def test_a_count_beyond_all_members_counts_as_all(tmp_path):
    round_ = Round(tmp_path, names_of(3), clip=CLIP)
    found = opened(round_)
    found._words[COUNT][0] = 200
    assert found.within() == 3


def test_the_count_has_noise(summed, tmp_path):
    """z / sqrt(0.01) on a sum of which each member is 1: ten times z."""
    run = privacy(clip_quantile=0.5, noise_multiplier=7.0)
    drawn = [
        int(noise_of(summed, run, partial(key, round_=number), COUNT, 1).view(np.int16)[0])
        for number in range(2000)
    ]
    assert np.std(drawn) == pytest.approx(70, rel=0.1)
    assert abs(np.mean(drawn)) < 8
    assert summed.within() == 1
    round_ = Round(tmp_path, names_of(5), weights=WEIGHTS, clip=CLIP)
    noised = opened(round_, outside=names_of(2), noise=run)
    told = int(noised._words[COUNT].view(np.int16)[0])
    assert told == 1 + int(noise_of(noised, run, key, COUNT, 1).view(np.int16)[0])
