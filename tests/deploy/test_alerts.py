"""deploy/prometheus: rules that promtool takes, that fire when they should, on figures we have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"
SOURCES = ("telemetry/metrics.py", "deploy/figures.py")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: prometheus)")
@pytest.mark.parametrize(
    "words",
    ["check rules alerts.yml", "check config prometheus.yml", "test rules alerts.test.yml"],
)
def test_promtool_finds_nothing_amiss(words) -> None:
    done = subprocess.run(["promtool", *words.split()], cwd=RULES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_explained_and_about_figures_that_are_told() -> None:
    code = "".join((ROOT / "src" / "photon" / path).read_text() for path in SOURCES)
    tested = (RULES / "alerts.test.yml").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    groups = yaml.safe_load((RULES / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 10
    for rule in rules:
        for name in re.findall(r"\bphoton_(\w+)", rule["expr"]):
            told = name.removesuffix("_total")
            assert f'"{told}"' in code, f"{rule['alert']}: nobody tells {name}"
        assert rule["alert"] in tested
        assert rule["alert"] in page
        assert set(rule["annotations"]) == {"summary", "action"}


def test_every_figure_is_on_the_page() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    code = "".join((ROOT / "src" / "photon" / path).read_text() for path in SOURCES)
    names = re.findall(r'page\.(gauge|counter)\(\s*"(\w+)"', code)
    assert len(names) > 40
    for kind, name in names:
        shown = name.removeprefix("node_") + ("_total" if kind == "counter" else "")
        assert shown in page, name
