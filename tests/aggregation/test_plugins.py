"""Outer optimizers and merging rules of other packages, through real entry points."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from photon.aggregation import build_merging_rule, build_outer_optimizer
from photon.config import OuterConfig
from photon.config.run import FederationConfig
from photon.errors import ModelMismatchError, PluginError

_CODE = '''
import torch
from photon.aggregation import MergingRule, OuterOptimizer


class OuterSign(OuterOptimizer):
    """theta <- theta - lr scale sign(m), m <- m + D."""

    slots = ("sum",)

    def update(self, theta, d, state):
        theta.sub_(state["sum"].add_(d).sign(), alpha=self.config.lr * self.config.options["scale"])


class Last(MergingRule):
    def __init__(self):
        self._last = None

    def add(self, tensors, weight, norm):
        self._last = {name: tensor.float() for name, tensor in tensors}

    def result(self):
        return self._last

    def discard(self):
        self._last = None


class Stranger:
    pass
'''

_ENTRY_POINTS = """
[photon.outer_optimizers]
sign = photon_test_plugin:OuterSign
stranger = photon_test_plugin:Stranger
broken = photon_test_plugin_missing:Nothing

[photon.merging_rules]
last = photon_test_plugin:Last
"""


@pytest.fixture
def plugin_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "photon_test_plugin.py").write_text(_CODE)
    info = tmp_path / "photon_test_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: photon-test-plugin\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("photon_test_plugin", None)


@pytest.mark.usefixtures("plugin_package")
def test_an_outer_optimizer_from_another_package() -> None:
    outer = build_outer_optimizer(OuterConfig(name="sign", lr=0.5, options={"scale": 2.0}))
    theta = {"w": torch.zeros(3)}
    outer.step(theta, {"w": torch.tensor([3.0, -0.1, 0.0])})
    assert theta["w"].tolist() == [-1.0, 1.0, 0.0]
    again = build_outer_optimizer(OuterConfig(name="sign", lr=0.5, options={"scale": 2.0}))
    again.load_state_tensors(outer.state_tensors())
    assert list(again.state_tensors()) == ["sum/w"]


@pytest.mark.usefixtures("plugin_package")
def test_a_merging_rule_from_another_package() -> None:
    rule = build_merging_rule(FederationConfig(merging_rule="last"))
    assert rule.refuse(1e9) is None
    rule.add([("w", torch.ones(1))], 1.0, 1.0)
    rule.add([("w", torch.zeros(1))], 1.0, 0.0)
    assert rule.result()["w"].item() == 0.0
    assert rule.state_tensors() == {}
    rule.load_state_tensors({})
    with pytest.raises(ModelMismatchError, match="rule Last"):
        rule.load_state_tensors({"sum": torch.zeros(1)})


@pytest.mark.usefixtures("plugin_package")
@pytest.mark.parametrize(("name", "why"), [("stranger", "not a subclass"), ("broken", "imported")])
def test_a_plugin_that_is_not_what_it_says(name: str, why: str) -> None:
    with pytest.raises(PluginError, match=why):
        build_outer_optimizer(OuterConfig(name=name))


@pytest.mark.usefixtures("plugin_package")
def test_a_plugin_can_not_shadow_a_built_in() -> None:
    assert type(build_outer_optimizer(OuterConfig(name="fedavg"))).__name__ == "FedAvg"
