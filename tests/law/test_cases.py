"""Worked cases: files of answers, and the findings that we expect of them, step by step."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from made_cards import cards_of, change, tree

from photon.cards.bundle import Standing
from photon.law.prediction import predict
from photon.law.rules import load_law

LAW = load_law()
CASES = sorted((Path(__file__).parent / "cases").glob("*.toml"))


def test_there_are_twelve() -> None:
    assert len(CASES) == 12


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_case(case: Path) -> None:
    told = tomllib.loads(case.read_text(encoding="utf-8"))
    assert told["decides"]
    whole = tree(told.get("silos", ("north", "south")), told.get("entities", ("Consortium",)))
    change(whole, told["answers"])
    standings: dict[str, Standing] = {}
    for number, step in enumerate(told["step"], 1):
        _move(whole, step, standings)
        # TOML has no null: `false` for a figure takes the answer away.
        changes = step.get("change", {})
        numbers = [path for path in changes if path.endswith("_flops")]
        change(whole, changes | {path: changes[path] or None for path in numbers})
        found = predict(cards_of(whole, standings), LAW, step["law"])
        statuses = {f"{one.id} {one.subject}": one.status for one in found.findings}
        wanted = step["findings"]
        assert {key: statuses.get(key) for key in wanted} == wanted, f"step {number}"
        assert found.verdict == step["verdict"], [
            one for one in found.findings if one.status in ("not_met", "unknown")
        ]


def _move(whole: dict[str, Any], step: dict[str, Any], standings: dict[str, Standing]) -> None:
    if "join" in step:
        whole["data"] |= tree([step["join"]])["data"]
    if "stale" in step:
        standings[step["stale"]] = Standing(False, "none", "the data has moved")
    for name in step.get("leave", ()):
        whole["data"].pop(name, None)
        whole["entity"] = [one for one in whole["entity"] if one["about"]["name"] != name]
