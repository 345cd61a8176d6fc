"""Epsilon of Gaussian mechanisms, against another accountant's and the definition."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from mpmath import exp, mp, mpf, ncdf
from other_accountant import composed

from photon.config import parse_run_config
from photon.config.children import privacy_of
from photon.errors import IncompatibleConfigError
from photon.privacy.epsilon import epsilon, multiplier, settled

MUS = st.floats(1e-4, 1e3)
DELTAS = st.floats(1e-12, 0.4)


@given(MUS, DELTAS)
def test_delta_at_that_epsilon_is_the_one_asked_for(mu, delta):
    """By 80 digits, where e^epsilon and the tails have room."""
    found = epsilon(mu**2, delta)
    with mp.workdps(80):
        m, e = mpf(mu), mpf(found)
        exact = ncdf(m / 2 - e / m) - exp(e) * ncdf(-m / 2 - e / m)
        assert exact <= delta * (1 + 1e-7)
        assert found == 0 or exact >= delta * (1 - 1e-7)


@given(st.floats(1e-3, 1e5), DELTAS, st.floats(1, 1e6))
def test_a_multiplier_costs_its_target_and_no_less_would_do(target, delta, times):
    z = multiplier(target, delta, times)
    assert epsilon(times / z**2, delta) == pytest.approx(target, rel=1e-9)
    assert epsilon(times / (z * 0.999) ** 2, delta) > target


def test_extremes():
    assert epsilon(0, 1e-5) == 0
    assert epsilon(math.inf, 1e-5) == math.inf
    assert epsilon(1e-30, 1e-5) == 0  # delta alone covers it
    assert epsilon(1e12, 1e-5) == pytest.approx(5e11, rel=1e-4)  # mu^2 / 2, where noise is nothing


@pytest.mark.parametrize("zs", [[0.7], [2.0] * 5, [1.0, 3.0, 9.0], [12.5] * 400])
def test_it_is_the_pld_accountant_s_and_below_renyi_s(zs):
    found = epsilon(sum(1 / z**2 for z in zs), 1e-5)
    assert found == pytest.approx(composed(PLDAccountant, zs), rel=2e-3)
    assert found <= composed(RdpAccountant, zs)


def test_a_target_is_sized_for_all_that_a_silo_or_group_answers():
    target = {"mechanism": "client", "clip_norm": 1.0, "target_epsilon": 2.0, "delta": 1e-5}
    west = {
        "silos": ["a"],
        "rounds": 4,
        "update_privacy": target,
        "children": {"d": {"silos": ["c"], "rounds": 2}},
    }
    tree = {
        "model": {"preset": "tiny"},
        "data": {"path": "unread"},
        "privacy": target,
        "federation": {"rounds": 5, "children": {"west": west}},
    }
    config = settled(parse_run_config(tree))
    for silo, answers in (("b", 5), ("a", 20), ("c", 40)):
        z = privacy_of(config, silo).noise_multiplier
        assert epsilon(answers / z**2, 1e-5) == pytest.approx(2.0)
    own = config.federation.children["west"].update_privacy
    assert own.noise_multiplier == config.privacy.noise_multiplier
    assert settled(config) == config
    west["children"] = {"d": {"nodes": 3, "rounds": 2}}
    with pytest.raises(IncompatibleConfigError, match=r"children\.d has nodes"):
        parse_run_config(tree)
