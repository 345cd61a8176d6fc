"""The plugins CONTRIBUTING.md shows run as shown."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.aggregation import MergingRule, OuterOptimizer
from photon.config import OuterConfig
from photon.data import DocumentInfo, Partitioner
from photon.plugins import MERGING_RULES, OUTER_OPTIMIZERS, PARTITIONERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def shown(base: type) -> Any:
    """The class that the page derives from `base`."""
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        for value in names.values():
            if isinstance(value, type) and value.__mro__[1] is base:
                return value
    raise AssertionError(f"no {base.__name__} in CONTRIBUTING.md")


def test_outer_optimizer() -> None:
    outer = shown(OuterOptimizer)(OuterConfig(lr=0.5, options={"rho": 0.5}))
    parameters = {"w": torch.tensor([1.0, 1.0])}
    outer.step(parameters, {"w": torch.tensor([2.0, -2.0])})
    assert parameters["w"].tolist() == [0.5, 1.5]
    assert outer.state_tensors()["m/w"].tolist() == [1.0, -1.0]


def test_merging_rule() -> None:
    rule = shown(MergingRule)()
    rule.add([("w", torch.ones(2))], 3.0, 1.0)
    rule.add([("w", torch.zeros(2))], 2.0, 0.0)
    assert rule.result()["w"].tolist() == [1.0, 1.0]


def test_partitioner() -> None:
    documents = [DocumentInfo(0, {}, 10), DocumentInfo(1, {}, 30)]
    assert shown(Partitioner)(bytes="20").assign(documents, 0) == ["short", "long"]


@pytest.mark.parametrize("group", [OUTER_OPTIMIZERS, MERGING_RULES, PARTITIONERS])
def test_entry_points_name_our_groups(group: str) -> None:
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
    shown_groups = {
        name for block in blocks for name in block.get("project", {}).get("entry-points", {})
    }
    assert group in shown_groups
    assert len(shown_groups) == 3


def test_every_dependency_has_a_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {
        re.split(r"[\[<>=!~ ]", text)[0]
        for text in [
            *project["project"]["dependencies"],
            *(
                text
                for extra in project["project"]["optional-dependencies"].values()
                for text in extra
            ),
        ]
    }
    table = PAGE.split("## Dependencies")[1]
    assert wanted == set(re.findall(r"^\| ([a-z0-9-]+) \| (?!what for)", table, re.MULTILINE))
