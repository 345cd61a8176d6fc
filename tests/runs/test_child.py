"""A tree of served federations comes to the weights of the simulated tree, killed or not."""

from __future__ import annotations

import time

import pytest
import silos_in_process
import torch
from federations_in_process import Region

from photon.errors import ModelError
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import Presence
from photon.products import export
from photon.runs import load_weights, simulate
from photon.runs.child import totals_inside
from photon.store.contract import FolderStore
from photon.telemetry import read_history
from photon.telemetry.events import RoundFinished, RoundMerged, UpdateDropped

TREE = (
    "local.steps=6",
    "federation.rounds=2",
    "federation.optimizer_state=keep",
    "federation.max_update_norm=none",
    "eval.max_tokens=500",
    "link.update_codec=int8",
    "serve.min_silos=2",
    'federation.children={eu = {silos = ["blue", "green"], rounds = 3, '
    'outer = {name = "nesterov", lr = 0.7}, update_codec = "int4"}, us = {rounds = 3, '
    'children = {north = {silos = ["red"], rounds = 2}}}}',
)
KEY = ('parts.key=["last:0.3"]', "parts.key_rule=attention", "parts.key_down=attention")


class Killed(BaseException):
    pass


@pytest.fixture
def make_tree(three_silos, make_config, served_run, tmp_path):
    """The run file of a tree, and the tree: a root, whose silos are federations."""
    made = []

    def make(*overrides: str):
        config = make_config(three_silos, *TREE, *overrides)
        folder = tmp_path / f"tree-{len(made)}"
        folder.mkdir()
        root = served_run(config, folder, names=())
        made.append(root)
        key = NodeKey.load(folder / "home" / AGGREGATOR_KEY_FILE)
        for number, (name, child) in enumerate(config.federation.children.items(), 1):
            root.silos[name] = Region(folder, name, child, three_silos, key, f"{number}" * 32)
            root.silos[name].store = FolderStore(folder / "store")
        silos_in_process.join_all(root.roster, root.silos)
        return config, root

    yield make
    for root in made:
        root.roster.close()
        for region in root.silos.values():
            region.close()


@pytest.fixture(scope="module")
def simulated(three_silos, make_config, tmp_path_factory):
    """Of the plain tree: the folder and the summary of the simulated run."""
    folder = tmp_path_factory.mktemp("simulated") / "run"
    return folder, simulate(make_config(three_silos, *TREE), run_dir=folder).summary


def told(root) -> dict[str, int]:
    """Bytes both ways inside all regions, as each of them tells."""
    regions = [*root.silos.values(), root.silos["us"].silos["north"]]
    last = [read_history(one.run).of(RoundFinished)[-1] for one in regions]
    for region, one in zip(regions, last, strict=True):
        sums = totals_inside(region.run)
        assert (sums["bytes_up"], sums["bytes_down"]) == (one.total_bytes_up, one.total_bytes_down)
    return {"bytes_inside": sum(one.total_bytes_up + one.total_bytes_down for one in last)}


def weights(run, of=None) -> dict[str, torch.Tensor]:
    return load_weights(run, of)[0].state_dict()


@pytest.mark.slow
def test_the_weights_and_bytes_of_the_simulated_tree(make_tree, simulated):
    _, root = make_tree()
    _, expected = simulated
    summary = root.go_on().summary
    assert summary["weights_sha256"] == expected["weights_sha256"]
    levels = ("bytes_up", "bytes_down", "bytes_inside")
    found = summary | told(root)
    assert {one: found[one] for one in levels} == {one: expected[one] for one in levels}
    root.audit()
    for region in root.silos.values():
        assert region.audit().rounds == 2 * region.served.rounds
    eu = root.silos["eu"].run
    found, whole = weights(eu, "eu"), weights(root.folder)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    with pytest.raises(ModelError, match="all have the same model"):
        load_weights(eu, "eu/blue")
    # A federation's score is its members', who have as many tokens here.
    blue, green = (expected["per_silo"][name] for name in ("blue", "green"))
    assert summary["per_silo"]["eu"] == pytest.approx((blue * green) ** 0.5)
    assert summary["per_silo"]["us"] == pytest.approx(expected["per_silo"]["red"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), KEY], ids=["backbone", "key layers"])
def test_a_killed_region_goes_on_to_the_same_weights(make_tree, simulated, tmp_path, more):
    """In the last of three inner rounds, where members have forgotten what they kept before it."""
    config, root = make_tree(*more)
    folder, expected = simulated
    if more:
        folder = tmp_path / "simulated"
        expected = simulate(config, run_dir=folder).summary
    region, killed, asked = root.silos["eu"], [], []

    def kill(silo, ask, times):
        if ask.fit is not None and ask.round == 6 and silo.name == "green" and not killed:
            killed.append(ask.task_id)
            asked[:] = region.wire.asked
            raise Killed
        return silo.answer(ask)

    def start_again(silo, ask, times):
        try:
            return silo.answer(ask)
        except Killed:
            region.start()
            return "it was killed"

    region.wire.fault, root.wire.fault = kill, start_again
    summary = root.go_on().summary
    assert killed
    # Members are asked for what had no answer yet, and for nothing else.
    assert {ask.round for ask in region.wire.asked[len(asked) :] if ask.fit is not None} == {6}
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["bytes_up"] == expected["bytes_up"]
    assert told(root)["bytes_inside"] == expected["bytes_inside"]
    region.audit()
    assert totals_inside(region.run)["rounds"] == 6
    if more:
        assert_own_models(root, folder, tmp_path)


def assert_own_models(root, simulated, tmp_path):
    """A region's server exports its model, and says of whose it has none."""
    eu, us = root.silos["eu"].run, root.silos["us"].run
    for run, of in ((eu, "eu"), (us, "us"), (root.silos["us"].silos["north"].run, "us/north")):
        expected = weights(simulated, of)
        for asked in (None, of, of.rpartition("/")[2]):
            found = weights(run, asked)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(*(one["lm_head.weight"] for one in (weights(eu), weights(us))))
    model = export(eu, tmp_path / "model", of="eu")
    assert (model / "tokenizer.json").read_bytes() == (eu / "tokenizer/tokenizer.json").read_bytes()
    for run, of in ((eu, "eu/blue"), (eu, "green"), (us, "us/north")):
        with pytest.raises(ModelError, match=f"what '{of.rpartition('/')[2]}' keeps .* never left"):
            load_weights(run, of)
    with pytest.raises(ModelError, match="has no 'red'"):
        load_weights(eu, "eu/red")


def test_of_a_region_with_personal_layers_nobody_has_a_whole_model(make_tree):
    _, root = make_tree("federation.rounds=1", 'parts.personal=["lm_head*"]')
    root.go_on()
    for of in (None, "eu"):
        with pytest.raises(ModelError, match="each silo of the run"):
            load_weights(root.silos["eu"].run, of)


def test_a_region_whose_own_quorum_is_lost_says_whom_it_waits_for_and_until_when(make_tree):
    _, root = make_tree()
    region, waits = root.silos["eu"], []
    region.serve["gather_s"] = 1.5
    region.start()

    def without_green(silo, ask, times):
        if silo.name != "eu" or ask.fit is None or ask.round != 1:
            region.wire.quiet.clear()
            return silo.answer(ask)
        region.wire.quiet.add("green")
        region.roster.all_seen({"green": (Presence("idle", boot="green"), time.time() - 3600)})
        return silo.answer(ask)

    root.wire.fault = without_green
    root.watch = lambda: waits.append(region.roster.setting("waiting", None))
    root.go_on()
    told = [one for one in waits if one]
    assert told
    assert {(one["for_silos"], one["round"], *one["here"]) for one in told} == {(2, 1, "blue")}
    assert all(0 < one["until"] - time.time() + 60 < 62 for one in told)
    history = read_history(root.folder)
    (dropped,) = history.of(UpdateDropped)
    assert (dropped.silo, dropped.round) == ("eu", 1)
    assert "1 silos are here (blue), round 1 needs 2; waited 1.5 s" in dropped.reason
    assert [one.participants for one in history.of(RoundMerged)] == [["us"], ["eu", "us"]]
    region.audit()
    assert region.roster.setting("waiting", None) is None
