"""A tree of federations on hosts of their own: a root, two regions, two silos in each."""

from __future__ import annotations

import contextlib
import os

import pytest
from site_runs import run_file, simulated

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]

REGIONS = {"eu": ["lab-a", "lab-b"], "us": ["lab-c", "lab-d"]}
EU = """
silos = ["lab-a", "lab-b"]
rounds = 3
outer = { name = "nesterov", lr = 0.7 }
update_codec = "int8"
"""
US = """
silos = ["lab-c", "lab-d"]
rounds = 2
"""
PARTS = """
[parts]
key = ["last:0.3"]
key_rule = "attention"
key_down = "attention"
"""


@pytest.fixture
def make_tree(hosts_possible, silo_data, tmp_path, network_of, federation_of):
    """By name: the root's federation and those of its regions; and the run file of the tree."""

    def make(rounds: int, more: str = ""):
        text = run_file(silo_data, rounds=rounds, steps=12).replace("every = 4", "every = 1")
        text = text.replace("[local]", 'max_update_norm = "none"\n\n[local]')
        for name in REGIONS:
            text += f'\n[federation.children.{name}]\nfile = "{tmp_path / name / "run.toml"}"\n'
            (tmp_path / name).mkdir()
        network = network_of("root", *REGIONS, *(one for some in REGIONS.values() for one in some))
        (tmp_path / "root").mkdir()
        tree = {}
        for name, own in {"eu": EU, "us": US}.items():
            tree[name] = federation_of(
                tmp_path / name, network, own, silo_data, REGIONS[name], at=name
            )
        text += more
        root = federation_of(tmp_path / "root", network, text, silo_data, list(REGIONS), at="root")
        for name, region in tree.items():
            region.parent = root
            node = root.folder / f"{name}.toml"
            node.write_text('[compute]\ndevice = "cpu"\nthreads = 1\n')
        return root, tree, simulated(text, tmp_path / "alone")

    return make


@pytest.mark.parametrize("more", ["", PARTS], ids=["backbone", "key layers"])
def test_a_region_killed_on_the_way_and_the_weights_of_the_simulated_tree(make_tree, more) -> None:
    root, regions, expected = make_tree(4, more)
    root.serve()
    root.await_door()
    for region in regions.values():
        region.begin()
    eu = regions["eu"]
    started = lambda: [one["round"] for one in eu.events("round_started")]  # noqa: E731
    eu.wait("the second inner round of the second task", lambda: 5 in started(), within_s=400)
    eu.kill_aggregator()
    eu.serve()
    summary = root.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert [len(one["body"]["merged"]) for one in root.audit()] == [2] * 4
    levels = {"root": (summary["bytes_up"], summary["bytes_down"])}
    for name, region in regions.items():
        inside = region.await_end(within_s=60)
        levels[name] = (inside["bytes_up"], inside["bytes_down"])
        numbers = [one["body"]["round"] for one in region.audit()]
        assert sorted(set(numbers)) == list(range(1, 4 * (3 if name == "eu" else 2) + 1))
        assert region.serving.wait(60) == 0  # the run above is over, and so is this one
    up, down = levels["root"]
    assert up == expected["bytes_up"]
    # Ten versions went down, and to the region that was killed one once more.
    assert down - expected["bytes_down"] in (0, expected["bytes_down"] // 10)
    assert levels["eu"][0] + levels["eu"][1] + sum(levels["us"]) == expected["bytes_inside"]
    with contextlib.suppress(ProcessLookupError):
        for silo in ("lab-a", "lab-d"):
            os.kill(root.network[silo]._started[0].pid, 0)  # members go on waiting for a next run


def test_a_parent_that_is_away_for_a_while_is_waited_for_and_named(make_tree) -> None:
    root, regions, expected = make_tree(3)
    root.serve()
    root.await_door()
    for region in regions.values():
        region.begin()
    eu = regions["eu"]
    eu.wait("its first task", lambda: bool(eu.events("round_started")), within_s=400)
    root.kill_aggregator()
    away = "as a member: no answer from the aggregator since"
    eu.wait("that its parent is away", lambda: away in eu.log(), within_s=120)
    said = next(line for line in eu.log().splitlines() if away in line)
    assert "waits for it, for as long as it takes; what is under way goes on" in said
    root.serve()
    again = "as a member: the aggregator answers again (it was away since"
    eu.wait("that its parent is back", lambda: again in eu.log(), within_s=180)
    assert root.await_end(within_s=400)["weights_sha256"] == expected["weights_sha256"]
    for region in regions.values():
        region.await_end(within_s=60)
        region.audit()
        assert region.serving.wait(60) == 0
