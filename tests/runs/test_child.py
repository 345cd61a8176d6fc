"""A tree of served federations comes to the weights of the simulated tree, killed or not."""

from __future__ import annotations

import pytest
import silos_in_process
from federations_in_process import Region

from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.runs import simulate
from photon.runs.child import totals_inside
from photon.store.contract import FolderStore
from photon.telemetry import read_history
from photon.telemetry.events import RoundFinished

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


def told(root) -> dict[str, int]:
    """Bytes both ways inside all regions, as each of them tells."""
    regions = [*root.silos.values(), root.silos["us"].silos["north"]]
    last = [read_history(one.run).of(RoundFinished)[-1] for one in regions]
    for region, one in zip(regions, last, strict=True):
        sums = totals_inside(region.run)
        assert (sums["bytes_up"], sums["bytes_down"]) == (one.total_bytes_up, one.total_bytes_down)
    return {"bytes_inside": sum(one.total_bytes_up + one.total_bytes_down for one in last)}


def test_the_weights_and_bytes_of_the_simulated_tree(make_tree, tmp_path):
    config, root = make_tree()
    expected = simulate(config, run_dir=tmp_path / "simulated").summary
    summary = root.go_on().summary
    assert summary["weights_sha256"] == expected["weights_sha256"]
    levels = ("bytes_up", "bytes_down", "bytes_inside")
    found = summary | told(root)
    assert {one: found[one] for one in levels} == {one: expected[one] for one in levels}
    root.audit()
    for region in root.silos.values():
        assert region.audit().rounds == 2 * region.served.rounds
    # A federation's score is its members', who have as many tokens here.
    blue, green = (expected["per_silo"][name] for name in ("blue", "green"))
    assert summary["per_silo"]["eu"] == pytest.approx((blue * green) ** 0.5)
    assert summary["per_silo"]["us"] == pytest.approx(expected["per_silo"]["red"])


@pytest.mark.parametrize("more", [(), KEY], ids=["backbone", "key layers"])
def test_a_killed_region_goes_on_to_the_same_weights(make_tree, tmp_path, more):
    """In the last of three inner rounds, where members have forgotten what they kept before it."""
    config, root = make_tree(*more)
    expected = simulate(config, run_dir=tmp_path / "simulated").summary
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
