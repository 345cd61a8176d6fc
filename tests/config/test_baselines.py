"""What baselines make of a tree's run file."""

import pytest

from photon.config import parse_run_config
from photon.config.baselines import METHODS, as_method, folder_of
from photon.errors import IncompatibleConfigError

TREE = {
    "model": {"preset": "tiny"},
    "data": {"path": "nowhere"},
    "parts": {"key": ["last:0.3"], "key_rule": "attention", "key_down": "attention"},
    "federation": {"children": {"eu": {"silos": ["paris", "oslo"], "rounds": 2}}, "quorum": 2},
    "local": {"steps": 8},
    "eval": {"per_silo": False},
}


@pytest.fixture
def tree():
    return parse_run_config(TREE)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_changes_parts_and_federation_and_nothing_else(name, tree):
    changed, runs = as_method(tree, name), METHODS[name]["runs"]
    assert bool(changed.federation.children) == (runs == "tree")
    assert changed.federation.quorum == (2 if runs == "tree" else None)
    assert changed.eval.per_silo
    for table in set(type(tree).model_fields) - {"parts", "federation", "eval"}:
        assert getattr(changed, table) == getattr(tree, table)
    assert changed.federation.rounds == tree.federation.rounds


def test_each_is_what_it_is_called(tree):
    parts = {name: as_method(tree, name).parts for name in METHODS}
    for name in ("flat FL", "HierFAVG", "local only", "centralised"):
        assert parts[name].key == parts[name].personal == []
    assert parts["FedPer"].personal == ["last:0.3"]
    assert parts["FedPer in the tree"] == parts["FedPer"]
    mean = parts["mean in attention's place"]
    assert (mean.key, mean.key_rule, mean.key_down) == (["last:0.3"], "mean", "mean")
    assert (parts["FedAtt"].key_rule, parts["FedAtt"].key_down) == ("fedatt", "replace")
    assert as_method(tree, "attention") == as_method(tree)


def test_frozen_and_personal_parts_stay_what_they_are(tree):
    own = {"key": ["lm_head*"], "frozen": ["*norm*"], "personal": ["*embed*"]}
    tree = parse_run_config({**TREE, "parts": own, "eval": {}})
    for name in METHODS:
        assert as_method(tree, name).parts.frozen == ["*norm*"]
    assert as_method(tree, "attention").parts.personal == ["*embed*"]
    assert as_method(tree, "FedPer").parts.personal == ["*embed*", "lm_head*"]
    assert as_method(tree, "flat FL").parts.personal == []


PRIVATE = {"silos": ["paris"], "privacy": {"mechanism": "none"}}


@pytest.mark.parametrize(
    "tables",
    [
        {"parts": {}},
        {"federation": {**TREE["federation"], "sample": 2}},
        {"federation": {**TREE["federation"], "levels": "in_turn"}},
        {"federation": {"children": {"eu": PRIVATE}}},
        {"federation": {"branches": {"sample": 2}}},
    ],
)
def test_without_key_layers_or_with_unlike_silos_nothing_can_be_compared(tables):
    tree = parse_run_config({**TREE, **tables})
    with pytest.raises(IncompatibleConfigError, match=r"parts\.key .* no sample"):
        as_method(tree, "flat FL")


def test_folders_can_be_called_so():
    folders = [folder_of(name) for name in METHODS]
    assert len(set(folders)) == len(folders)
    assert all(name.replace("-", "").isalnum() for name in folders)
