"""Law files: what is refused when one is read."""

from __future__ import annotations

import datetime
from importlib.resources import files
from pathlib import Path

import pytest

from photon.errors import LawError
from photon.law.rules import load_law

TEXT = files("photon.law").joinpath("eu_ai_act.toml").read_text(encoding="utf-8")
RULE = """
[[rule]]
id = "art_9.par_1"
subject = "project"
says = "A rule for a test."
"""


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (RULE.replace("project", "entity"), "two versions overlap"),
        (RULE + RULE, "two versions overlap"),
        (RULE + "from = 2027-01-01\nuntil = 2026-01-01\n", "is no time"),
        (RULE.replace("art_9.", "art_99."), "article 99 is not in"),
        (RULE.replace("art_9.par_1", "Article 9"), "an id is like"),
        (RULE + 'applies = "never"\n', "dates.never"),
        (
            RULE + 'when = "project.scope.militry_only"\n',
            "no card has 'project.scope.militry_only'",
        ),
        (RULE + 'when = "project.about.title"\n', "is a text, not a yes"),
        (RULE + 'when = "data.persons.personal"\n', "no data card is at hand"),
        (RULE + 'when = "@nothing"\n', "is not there"),
        (RULE + "when = { some = 'law', where = '@high_risk' }\n", "is no condition"),
        (
            RULE + "when = { path = 'project.about.purposes', any_of = ['annex_iv_1'] }\n",
            "can't hold",
        ),
        (
            RULE + "when = { path = 'project.about.purposes', above = 3 }\n",
            "is a list, not a number",
        ),
        (
            RULE + "when = { path = 'project.scope.placed_on', before = 2026 }\n",
            "of the wrong type",
        ),
        (RULE + "when = { path = 'project.scope.placed_on', exec = 'x' }\n", "must have one of"),
        (RULE + "when = '__import__(\"os\")'\n", "no card has"),
        (RULE + "unless = 1\n", "unless"),
        ("[[dates.general]]\nfrom = 2026-01-01\napplies = 2026-01-01\n", "overlap on 2026-01-01"),
        ("not toml", "not valid TOML"),
    ],
)
def test_what_is_refused(more: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "law.toml"
    file.write_text(TEXT + more, encoding="utf-8")
    with pytest.raises(LawError, match=problem):
        load_law(file)


def test_versions_that_meet_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "law.toml"
    meeting = RULE + "until = 2026-01-01\n" + RULE + "from = 2026-01-01\n"
    file.write_text(TEXT + meeting, encoding="utf-8")
    rules = [
        one for one in load_law(file).rule if one.subject == "project" and one.id == "art_9.par_1"
    ]
    assert [one.holds(datetime.date(2026, 1, 1)) for one in rules] == [False, True]


def test_conditions_that_ask_for_themselves_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "law.toml"
    file.write_text(
        TEXT.replace("research = [", 'research = ["@before_market", ').replace(
            "before_market = [", 'before_market = ["@research", '
        ),
        encoding="utf-8",
    )
    with pytest.raises(LawError, match="asks for itself"):
        load_law(file)


def test_every_source_has_an_address_a_date_and_says_who_read_it() -> None:
    law = load_law()
    assert law.law.wording == "paraphrase"
    assert all(one.address.startswith("http") and one.read for one in law.sources)
