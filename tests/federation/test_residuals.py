"""Residuals: one member's layer, sent to the federation that it fits, and over no barrier."""

import itertools
import math
import random
import re
import zlib
from collections import Counter
from functools import partial

import pytest
import torch
from faulty_nodes import fail, faulty

from photon.aggregation.attention import AttentionMean, cosine, projections
from photon.config import PrivacyConfig, RunConfig
from photon.config.children import PolicyConfig, inside
from photon.errors import IncompatibleConfigError, UnknownKeyError
from photon.federation import CheckpointStore, FitTask
from photon.federation.private import Purse, of_group
from photon.federation.residuals import Residuals
from photon.runs import load_weights, resume, simulate
from photon.telemetry import read_history
from photon.telemetry.events import KeyMerged, ResidualRouted

SHORT = ("eval.every=0", "eval.max_tokens=300", "eval.per_silo=false", "federation.rounds=3")
#: Whatever gets less than its weight leaves, and is taken where it is alike at all.
ATTENTION = (
    'parts.key=["last:0.4"]',
    "parts.key_rule=attention",
    "parts.key_down=attention",
    "parts.residual_share=1",
    "parts.residual_cosine=0",
)
EAST = 'federation.children.east={silos=["a", "b"], rounds=2, policy={jurisdiction="EU"}}'
WEST = 'federation.children.west={silos=["c", "d"], policy={jurisdiction="US"}}'
BOTH = ("federation.policy.residuals=both", "federation.policy.jurisdiction=UN")
KEYS = ("weights_sha256", "tokens", "bytes_up", "bytes_down", "bytes_inside")


@pytest.fixture(scope="module")
def four_silos(prepare_text, tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("four"), dict.fromkeys("abcd", 6))


@pytest.fixture(scope="module")
def run(four_silos, make_config, small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *overrides):
        config = make_config(four_silos, *SHORT, *ATTENTION, *overrides, model=small_model)
        return simulate(config, run_dir=folder / name)

    return run


@pytest.fixture(scope="module")
def on(run):
    return run("on", EAST, WEST, *BOTH)


@pytest.fixture(scope="module")
def off(run):
    return run("off", EAST, WEST)


def routed(result):
    return read_history(result).of(ResidualRouted)


# --- in a run --------------------------------------------------------------------------------


def test_without_any_nothing_changes(run, off):
    """Policies alone do nothing, nor does attention that lets no layer go."""
    none = run("none", EAST, WEST, *BOTH, "parts.residual_share=1e-9")
    assert [none.summary[key] for key in KEYS] == [off.summary[key] for key in KEYS]
    assert routed(none) == routed(off) == []


def test_each_step_is_told_with_both_jurisdictions(on):
    told = routed(on)
    steps = {(one.silo, one.outcome, one.at_jurisdiction, one.to_jurisdiction) for one in told}
    assert {("east", "up", "EU", "UN"), ("", "taken", "UN", "US")} <= steps
    assert {one.round for one in told} == {1, 2, 3}
    for one in told:
        assert one.origin_jurisdiction == {"e": "EU", "w": "US"}[one.origin[0]]
        assert one.outcome != "taken" or (one.to in ("east", "west") and (one.cosine or 0) > 0)
        assert not one.to or not one.origin.startswith(one.to)
    # A silo's goes up before it comes down.
    up = {(one.round, one.origin, one.module) for one in told if one.outcome == "up"}
    down = {(one.round, one.origin, one.module) for one in told if not one.silo and one.hops}
    assert up == down != set()


def test_who_takes_one_merges_it(on, off):
    given = {}
    for one in routed(on):
        if one.outcome == "taken":
            given.setdefault((one.round + 1, one.to), set()).add((one.origin, one.module))
    found = {}
    for event in read_history(on).of(KeyMerged):
        for module, shares in event.shares.items():
            assert sum(shares) == pytest.approx(1)
            for origin, share in zip(event.participants[2:], shares[2:], strict=True):
                if share:
                    found.setdefault((event.round, event.silo), set()).add((origin, module))
    assert found == {key: one for key, one in given.items() if key[0] <= 3} != {}
    assert on.summary["weights_sha256"] != off.summary["weights_sha256"]


def test_bytes_are_counted_where_they_travel(on, off):
    """To the byte, up with the update that has them and down to whom they were given."""
    up = sum(one.bytes for one in routed(on) if one.outcome == "up")
    down = sum(one.bytes for one in routed(on) if one.outcome == "taken" and one.round < 3)
    assert on.summary["bytes_up"] - off.summary["bytes_up"] == up > 0
    assert on.summary["bytes_down"] - off.summary["bytes_down"] == down > 0


def test_who_is_named_first_changes_nothing(run, on):
    other = run("other", *BOTH, WEST, EAST)
    for name, tensor in load_weights(on)[0].state_dict().items():
        found = load_weights(other)[0].state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=0, atol=2e-5)
    ways = [{(e.round, e.origin, e.module, e.to) for e in routed(one)} for one in (on, other)]
    assert ways[0] == ways[1]


DEEP = (
    EAST.replace('"b"]', '"b"], children={coast={silos=["d"], policy={jurisdiction="NO"}}}'),
    'federation.children.west={silos=["c"], policy={jurisdiction="US"}}',
    *BOTH,
)


@pytest.fixture(scope="module")
def undisturbed(run):
    return run("undisturbed", *DEEP)


@pytest.mark.parametrize(("silo", "number", "after"), [("c", 3, 2), ("b", 4, 1)])
def test_a_kill_while_residuals_wait_changes_nothing(
    silo, number, after, undisturbed, run, monkeypatch
):
    with monkeypatch.context() as patch:
        faulty(patch, silo, number, fail)
        with pytest.raises(RuntimeError, match="killed"):
            run(f"killed-{silo}", *DEEP)
    folder = undisturbed.folder.parent / f"killed-{silo}"
    for place in ("checkpoints", "nodes/east"):
        assert CheckpointStore(folder / place, 9).load(after)[1]["residuals"], place
    resumed = resume(folder)
    assert [resumed.summary[key] for key in KEYS] == [undisturbed.summary[key] for key in KEYS]
    ways = [
        {(e.round, e.silo, e.origin, e.module, e.to, e.cosine) for e in routed(one)}
        for one in (undisturbed, resumed)
    ]
    assert ways[0] == ways[1]


def test_a_barrier_holds_in_a_run(run):
    """Nothing of coast's goes to the west, which bars it; what is east's own does."""
    told = routed(run("barred", *DEEP, 'federation.children.west.policy.never_with=["NO"]'))
    for one in told:
        if one.to == "west" and one.outcome == "taken":
            assert not one.origin.startswith("east/coast")
        if one.origin == "west":
            assert one.to != "east/coast"
    assert any(one.origin.startswith("east/coast") and one.outcome == "barred" for one in told)
    assert any(one.to == "west" and one.outcome == "taken" for one in told)


# --- routing ---------------------------------------------------------------------------------

LAWS = ("EU", "US", "CN")
MODULE = "weights/layers.1"
OPEN = {"residuals": "none", "jurisdiction": None, "never_with": []}


def vector(text):
    seed = zlib.crc32(text.encode())
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


def a_policy(draw):
    said = {
        "jurisdiction": draw.choice([*LAWS, None]),
        "residuals": draw.choice(["both", "both", "both", "in", "out", "none", None]),
        "never_with": draw.choice([None, None, [], [draw.choice(LAWS)]]),
    }
    return {key: value for key, value in said.items() if value is not None}


def a_tree(draw, name, depth):
    names = [f"{name}{k}" for k in range(draw.choice([1, 2, 3]) if depth else 0)]
    below = {one: a_tree(draw, one, depth - 1) for one in names}
    return {"silos": [f"{name}-"], "children": below, "policy": a_policy(draw)}


def as_config(top, **parts):
    parts = {"key": ["*"], "key_rule": "attention", "residual_cosine": 0.0} | parts
    federation = {"children": top["children"], "policy": top["policy"]}
    known = {"model": {"preset": "tiny"}, "data": {"path": "x"}}
    return RunConfig.model_validate({**known, "parts": parts, "federation": federation})


def laws(top, path="", above=OPEN):
    """Each federation's policy, by its path."""
    own = {**above, **top["policy"]}
    yield path, own
    for name, child in top["children"].items():
        yield from laws(child, f"{path}/{name}".lstrip("/"), own)


def merged(config, folder, path="", above=None, came=(), silos=("silo",), privacy=None):
    """A federation where no member's layer fits; its decisions too."""
    members = [*silos, *config.federation.children]
    attention = AttentionMean(config.parts)
    updates = [{f"{MODULE}.weight": vector(one)} for one in members]
    attention.rows = [projections(one, config.parts) for one in updates]
    attention.misfits = {(MODULE, place): one for place, one in enumerate(updates)}
    residuals = Residuals(config, folder, {})
    residuals.path, residuals.above = path, above
    if privacy is not None:
        residuals.spending = partial(of_group, privacy, Purse(folder, "run"), path=path)
    tasks = [FitTask("run", 1, one, 0, 1, None) for one in members]
    return residuals, list(residuals.route(attention, tasks, came))


def everything(config, folder, path="", above=None):
    """All decisions in such a tree, each with the path of who decided; and what goes on."""
    told, came = [], []
    for name, child in config.federation.children.items():
        own = config.federation.policy
        events, up = everything(inside(config, child), folder, f"{path}{name}/", own)
        told, came = told + events, came + up
    residuals, events = merged(config, folder, path, above, came, (f"{path}-".replace("/", "."),))
    return told + [(path.rstrip("/"), one) for one in events], list(residuals.up.values())


def test_nothing_crosses_a_barrier(tmp_path):
    """Nor goes where none is let in, or out; in any tree, whoever is named first."""
    outcomes = Counter()
    for seed in range(200):
        top = a_tree(random.Random(seed), "f", depth=3)
        law, (told, left) = dict(laws(top)), everything(as_config(top), tmp_path)
        assert not left
        was_in = {}
        for at, event in told:
            outcomes[event.outcome] += 1
            assert event.hops <= 3
            first = [event.origin] if event.origin in law else [at]
            places = was_in.setdefault(event.origin, first)
            assert law[places[0]]["residuals"] in ("out", "both")
            if event.to is not None:
                mine, theirs = law[event.to]["jurisdiction"], law[event.to]["never_with"]
                barred = [
                    one
                    for one in {*places, at}
                    if mine in law[one]["never_with"] or law[one]["jurisdiction"] in theirs
                ]
                assert bool(barred) == (event.outcome == "barred")
                assert law[event.to]["residuals"] in ("in", "both")
            if event.outcome == "up":
                assert event.to == at.rpartition("/")[0]
                assert law[at]["residuals"] in ("out", "both")
            places += [at, event.to] if event.outcome in ("up", "taken") else [at]
        for places in was_in.values():
            for one, two in itertools.permutations(set(places), 2):
                assert law[one]["jurisdiction"] not in law[two]["never_with"], (seed, places)
        turned = a_tree(random.Random(seed), "f", depth=3)
        for one in (turned, *turned["children"].values()):
            one["children"] = dict(reversed(one["children"].items()))
        again, _ = everything(as_config(turned), tmp_path)
        assert sorted(map(str, again)) == sorted(map(str, told))
    assert min(outcomes[one] for one in ("taken", "up", "barred", "unplaced")) > 100, outcomes


def test_it_is_clipped_and_noised_before_it_leaves(tmp_path):
    """By the table of the federation that it leaves, a silo's and a group's alike."""
    children = {"inner": {"silos": ["x"], "policy": {"jurisdiction": "EU"}}}
    top = {"children": children, "policy": {"residuals": "both"}}
    config, above = as_config(top, residual_cosine=1.0), PolicyConfig(residuals="in")

    def sent(**privacy):
        privacy = PrivacyConfig(mechanism="client", **privacy)
        up = merged(config, tmp_path, "q/", above, privacy=privacy)[0].up.values()
        assert {one.origin: one.passed for one in up} == {
            "q/silo": [None, None],
            "q/inner": ["EU", None],
        }
        return {one.origin[2:]: one.tensors[f"{MODULE}.weight"] for one in up}

    clipped, noised, again = (sent(clip_norm=0.5, noise_multiplier=z) for z in (0.0, 2.0, 2.0))
    for name, found in clipped.items():
        torch.testing.assert_close(found, vector(name) * 0.5 / vector(name).norm())
        assert float((noised[name] - found).std()) == pytest.approx(1.0, rel=0.3)
        assert torch.equal(noised[name], again[name])


# --- merging ---------------------------------------------------------------------------------


def test_it_is_one_more_constituent():
    """alpha = n exp(s / t), over members and guests, which have the mean weight and no say in s."""
    config = as_config({"children": {}, "policy": {}}, key_temperature=0.7)
    shapes = {"weights/layers.0.a": (6, 5), "weights/layers.0.b": (7,), "weights/layers.1.a": (9,)}

    def update(seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        return {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}

    members, weights, far = [update(1), update(2)], [1.0, 3.0], update(3, 100.0)
    guest = {name: one for name, one in far.items() if "layers.0" in name}
    rule = AttentionMean(config.parts)
    rule.guests = {"west/c": guest}
    for one, weight in zip(members, weights, strict=True):
        rule.add(iter(one.items()), weight, 1.0)
    result = rule.result()
    rows = [projections(one, config.parts)["weights/layers.0"] for one in (*members, guest)]
    query = (rows[0] + 3 * rows[1]) / 4
    powers = [
        n * math.exp(cosine(query, row) / 0.7) for n, row in zip([1, 3, 2], rows, strict=True)
    ]
    alpha = [one / sum(powers) for one in powers]
    assert rule.shares["weights/layers.0"] == pytest.approx(alpha)
    assert rule.shares["weights/layers.1"][2] == 0
    length = max(float(row.norm()) for row in rows[:2]) / float(rows[2].norm())
    assert length < 0.1  # no longer than the longest of the members'
    for name in guest:
        wanted = sum(a * one[name] for a, one in zip(alpha, members, strict=False))
        torch.testing.assert_close(result[name], wanted + alpha[2] * length * guest[name])


def test_what_gets_less_than_its_weight_is_a_misfit():
    config = as_config({"children": {}, "policy": {}})
    one, two = vector("one"), vector("two")
    updates = [one, one + 0.1 * two, one - 0.1 * two, -one]
    for least, wanted in ((0.9, {(MODULE, 3)}), (0.0, set())):
        rule = AttentionMean(config.parts)
        rule.least = least
        for place, update in enumerate(updates):
            rule.add(iter([(f"{MODULE}.weight", update)]), 1.0 + place, 1.0)
        rule.result()
        assert set(rule.misfits) == wanted
        for found in rule.misfits.values():
            assert torch.equal(found[f"{MODULE}.weight"], -one)


# --- refused when the file is read -----------------------------------------------------------

MISTAKES = [
    (
        [EAST.replace('"EU"', '"EU", never_with=["UN"]'), *BOTH],
        'children.east.policy: residuals = "both" has no way up: never_with is between EU and UN',
    ),
    (
        [EAST, *BOTH, 'federation.policy.never_with=["EU"]', "federation.policy.jurisdiction=CN"],
        'children.east.policy: residuals = "both" has no way up: never_with is between EU and CN',
    ),
    (
        [EAST.replace('"EU"', '"EU", residuals="out"')],
        'children.east.policy: residuals = "out" has no way up: the federation around it lets none',
    ),
    (
        [DEEP[0].replace('"NO"', '"NO", never_with=["EU"]'), *BOTH],
        'children.east.children.coast.policy: residuals = "both" has no way up',
    ),
    (
        [EAST, *BOTH, "parts.key_rule=mean"],
        'federation.policy: residuals = "both" needs parts.key and parts.key_rule = "attention"',
    ),
    (
        [EAST, "federation.merging_rule=median"],
        'federation.merging_rule = "median" is robust',
    ),
    (
        [EAST.replace("rounds=2", 'rounds=2, merging_rule="trimmed_mean"')],
        'children.east.merging_rule = "trimmed_mean" is robust',
    ),
    (
        ['federation.branches.policy.residuals="out"'],
        'federation.children.*.policy: residuals = "out" has no way up',
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_what_can_not_be_is_refused_by_path_and_key(overrides, message, four_silos, make_config):
    with pytest.raises(IncompatibleConfigError, match=re.escape(message)):
        make_config(four_silos, *ATTENTION, *overrides)


def test_residuals_need_key_layers(four_silos, make_config):
    with pytest.raises(IncompatibleConfigError, match=r"needs parts\.key"):
        make_config(four_silos, EAST, *BOTH)
    with pytest.raises(IncompatibleConfigError, match=r"residual_share only means something with"):
        make_config(four_silos, "parts.residual_share=0.2")
    with pytest.raises(UnknownKeyError):
        make_config(four_silos, 'federation.children.x={silos=["a"], policy={resid="in"}}')
