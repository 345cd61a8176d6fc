"""Plugins as packaging installs them: a .dist-info folder with entry points on sys.path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from photon.config import parse_run_config
from photon.errors import InvalidValueError, PluginError
from photon.plugins import (
    MERGING_RULES,
    OUTER_OPTIMIZERS,
    PARTITIONERS,
    load_plugin,
    plugin_names,
)

Install = Callable[..., None]
BASE = "class Base: ...\n"


class Base:
    """What the group promises."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution on sys.path: its module's source, and its entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(module: str, source: str, group: str = OUTER_OPTIMIZERS, **names: str) -> None:
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8"
        )
        lines = [f"[{group}]", *(f"{name} = {target}" for name, target in names.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        # monkeypatch takes the module out again, so that no test sees another one's.
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def test_group_names_are_the_documented_ones() -> None:
    assert (OUTER_OPTIMIZERS, MERGING_RULES, PARTITIONERS) == (
        "photon.outer_optimizers",
        "photon.merging_rules",
        "photon.partitioners",
    )


def test_names_are_listed_without_import(install: Install) -> None:
    install("lazy_plugin", "raise RuntimeError('imported')", zeta="lazy_plugin:A", alpha="x:B")
    assert plugin_names(OUTER_OPTIMIZERS) == ["alpha", "zeta"]
    assert plugin_names(MERGING_RULES) == []
    assert "lazy_plugin" not in sys.modules


def test_load(install: Install) -> None:
    install("good_plugin", "from collections import OrderedDict as Good", good="good_plugin:Good")
    assert load_plugin(OUTER_OPTIMIZERS, "good", dict).__name__ == "OrderedDict"


def test_unknown_name_lists_the_installed_ones(install: Install) -> None:
    with pytest.raises(PluginError, match=r"'lion' in .* \(installed: none\)"):
        load_plugin(OUTER_OPTIMIZERS, "lion", Base)
    install("two_plugin", BASE, tiger="two_plugin:Base", bear="two_plugin:Base")
    with pytest.raises(PluginError, match=r"\(installed: bear, tiger\)"):
        load_plugin(OUTER_OPTIMIZERS, "lion", Base)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import a_module_nobody_has", "No module named 'a_module_nobody_has'"),
        ("raise RuntimeError('broken at import')", "broken at import"),
        ("x = 1", "has no attribute 'Lion'"),
    ],
)
def test_import_failure_names_plugin_group_and_cause(
    install: Install, source: str, why: str
) -> None:
    install("broken_plugin", source, lion="broken_plugin:Lion")
    with pytest.raises(PluginError) as caught:
        load_plugin(OUTER_OPTIMIZERS, "lion", Base)
    message = caught.value.message
    for part in ("'lion'", "broken_plugin:Lion", OUTER_OPTIMIZERS, why):
        assert part in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("source", [BASE.replace("Base", "Lion"), "Lion = 3", "def Lion(): ..."])
def test_what_does_not_derive_from_the_base_is_refused(install: Install, source: str) -> None:
    install("wrong_plugin", source, lion="wrong_plugin:Lion")
    with pytest.raises(PluginError) as caught:
        load_plugin(OUTER_OPTIMIZERS, "lion", Base)
    assert f"not a subclass of {Base.__module__}.Base" in caught.value.message


def test_run_files_may_name_plugins_and_are_checked_without_import(install: Install) -> None:
    run = {
        "model": {"preset": "tiny"},
        "data": {"path": "d"},
        "outer": {"name": "lion", "options": {"rho": 0.9}},
    }
    with pytest.raises(InvalidValueError, match="'lion' is not one of fedavg"):
        parse_run_config(run)
    install("run_plugin", "raise RuntimeError('imported')", lion="run_plugin:Lion")
    assert parse_run_config(run).outer.options == {"rho": 0.9}
    assert "run_plugin" not in sys.modules


def test_run_files_may_name_merging_rules(install: Install) -> None:
    install("rule_plugin", "", group=MERGING_RULES, median="rule_plugin:Median")
    run = {
        "model": {"preset": "tiny"},
        "data": {"path": "d"},
        "federation": {"merging_rule": "median"},
    }
    assert parse_run_config(run).federation.merging_rule == "median"
