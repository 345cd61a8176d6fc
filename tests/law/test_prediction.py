"""Predictions: the defects of a known implementation, extremes, and that worse is never better."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from extremes import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from made_cards import answered, best, cards_of, change, tree, worst

from photon.cards.bundle import Cards, Standing
from photon.cards.questions import CARDS, Kind, questions
from photon.errors import CardError
from photon.law.claims import read_claims
from photon.law.prediction import (
    VERDICTS,
    Claim,
    Prediction,
    changes,
    predict,
    with_children,
)
from photon.law.rules import load_law

LAW = load_law()
TODAY = datetime.date(2026, 11, 30)
LATER = datetime.date(2031, 1, 1)
#: A system of Annex III in which everything is done.
HIGH_RISK = {
    "project.about.is_system": True,
    "project.about.purposes": ["annex_iii_5d"],
    "project.high_risk.narrow_task": False,
    "project.high_risk.improves_result": False,
    "project.high_risk.detects_patterns": False,
    "project.high_risk.preparatory": False,
    "project.scope.changed_since": True,
}


def asked(
    on: datetime.date = TODAY, standings: Any = None, /, *, whole: Any = None, **changed: Any
) -> Prediction:
    whole = whole or tree()
    change(whole, changed)
    return predict(cards_of(whole, standings), LAW, on)


def statuses(found: Prediction) -> dict[str, str]:
    """By id; the worst of its subjects."""
    order = ("not_met", "unknown", "not_yet_applicable", "met", "not_applicable")
    worst_first = sorted(found.findings, key=lambda one: order.index(one.status), reverse=True)
    return {one.id: one.status for one in worst_first}


def rank(found: Prediction) -> int:
    return VERDICTS.index(found.verdict)


def test_everything_done_is_met_and_not_by_an_exit_out_of_scope() -> None:
    """Defects 1 and 2: polarity, and an example that passes only because nothing applies."""
    good = asked(LATER, whole=tree(), **HIGH_RISK)
    assert good.verdict == "met"
    assert statuses(good)["art_2.par_1"] == statuses(good)["art_9.par_1"] == "met"
    bad = tree(how=worst)
    change(bad, {**HIGH_RISK, "data.persons.personal": True})
    found = predict(cards_of(bad), LAW, LATER)
    assert found.verdict == "prohibited"
    unmet = {one.id for one in found.findings if one.status == "not_met"}
    asked_of_all = {
        rule.id for rule in LAW.rule if rule.id.startswith(("art_9", "art_15", "art_5."))
    }
    assert asked_of_all <= unmet


@pytest.mark.parametrize(("value", "verdict"), [(True, "prohibited"), (False, "out_of_scope")])
def test_all_true_and_all_false(value: bool, verdict: str) -> None:
    """Both fully answered; with everything false nobody is reached, and that is said."""
    whole = tree(how=lambda one: value if one.kind == "yes" else best(one))
    change(whole, {"project.scope.placed_in_union": value, "entity.about.in_union": value})
    if value:  # what is excluded from scope is not asked
        excluded = ("military_only", "foreign_law_enforcement", "research_only", "before_market")
        change(whole, {f"project.scope.{key}": False for key in excluded})
    assert predict(cards_of(whole), LAW, LATER).verdict == verdict


def test_all_false_in_scope_is_not_met() -> None:
    whole = tree(how=lambda one: False if one.kind == "yes" else worst(one))
    change(whole, {**HIGH_RISK, "project.practices.manipulation": False})
    found = predict(cards_of(whole), LAW, LATER)
    assert found.verdict == "not_met"
    assert statuses(found)["art_10.par_2"] == "not_met"


def test_each_duty_can_fail_and_names_its_own_subject() -> None:
    """Defects 3, 4 and 9: rules that never fire, or write into the wrong results."""
    model = {"model.facts.training_flops": 2e25, "entity.about.in_union": False}
    everything = {**HIGH_RISK, **model, "project.about.purposes": ["annex_iii_1a", "annex_iii_5b"]}
    everything |= {"project.transparency.interacts": True, "project.transparency.generates": True}
    everything |= {"entity.about.roles": ["provider", "deployer"], "data.persons.personal": True}
    whole = tree(how=lambda one: best(one) if one.worse == "more" else worst(one))
    change(whole, everything)
    change(
        whole,
        {
            f"project.practices.{one.key}": False
            for one in questions("project")
            if one.section == "practices"
        },
    )
    excluded = (
        "military_only",
        "foreign_law_enforcement",
        "research_only",
        "before_market",
        "private_use",
    )
    change(whole, {f"project.scope.{key}": False for key in excluded})
    found = predict(cards_of(whole), LAW, LATER)
    kinds = {rule.id: rule.subject for rule in LAW.rule if rule.holds(LATER)}
    unmet = {one.id for one in found.findings if one.status == "not_met"}
    duties = {
        rule.id
        for rule in LAW.rule
        if rule.holds(LATER) and rule.needs and rule.otherwise == "not_met" and not rule.banned
    }
    assert duties - unmet == {"cards.signature"}
    for one in found.findings:
        pairs = {rule.subject for rule in LAW.rule if rule.id == one.id}
        assert one.subject.split("/")[0] in pairs, (one, kinds)


def test_scope_reads_the_answer_and_each_branch_of_2_1() -> None:
    """Defects 5 and 7: everything in scope; places counted as roles."""
    out = {"project.scope.placed_in_union": False}
    assert asked(**out).verdict == "out_of_scope"
    abroad = {**out, "entity.about.in_union": False}
    assert asked(**abroad, **{"entity.about.output_in_union": False}).verdict == "out_of_scope"
    assert (
        statuses(asked(**abroad, **{"entity.about.output_in_union": True}))["art_2.par_1"] == "met"
    )
    # 2(1)(c) is about those outside.
    assert asked(**out, **{"entity.about.output_in_union": True}).verdict == "out_of_scope"
    deployer = {**out, "entity.about.roles": ["provider", "deployer"]}
    public, private = ({"project.scope.private_use": one} for one in (False, True))
    assert statuses(asked(**deployer, **public))["art_2.par_1"] == "met"
    assert asked(**deployer, **private).verdict == "out_of_scope"
    assert asked(**{"project.scope.military_only": True}).verdict == "out_of_scope"


PRACTICES = [one.key for one in questions("project") if one.section == "practices" and one.worse]


@pytest.mark.parametrize("key", PRACTICES)
def test_each_ban_fires(key: str) -> None:
    """Defect 6: biometric bans never did."""
    safe = {"project.practices.emotion_medical": False}
    safe |= {"project.practices.identification_authorised": False}
    on = datetime.date(2026, 12, 2)
    found = asked(on, **safe, **{f"project.practices.{key}": True})
    assert found.verdict == "prohibited"
    assert sum(one.status == "not_met" for one in found.findings) == 1
    assert asked(on, **safe, **{f"project.practices.{key}": None}).verdict == "unknown"


def test_new_bans_have_their_own_date() -> None:
    practice = {"project.practices.intimate_imagery": True}
    assert asked(datetime.date(2026, 12, 1), **practice).verdict == "met"
    assert asked(datetime.date(2026, 12, 2), **practice).verdict == "prohibited"


def test_6_3_clears_neither_annex_i_nor_profiling_nor_what_is_not_documented() -> None:
    """Defect 8."""
    unsafe = {**HIGH_RISK, "project.risk.tested": False}
    claim = {**unsafe, "project.high_risk.narrow_task": True}
    assert asked(LATER, **unsafe).verdict == "not_met"
    assert asked(LATER, **claim).verdict == "met"
    assert asked(LATER, **claim, **{"project.high_risk.profiling": True}).verdict == "not_met"
    undocumented = {**claim, "project.high_risk.exception_documented": False}
    assert asked(LATER, **undocumented).verdict == "not_met"
    annex_i = {"project.about.purposes": ["annex_i_11"]}
    assessed = {**claim, **annex_i, "project.high_risk.third_party_assessment": True}
    assert statuses(asked(LATER, **assessed))["art_9.par_6"] == "not_met"


def test_purposes_of_project_data_and_models_meet() -> None:
    """Defect 10: keys without a counterpart, so that purposes never matched."""
    choices = {kind: _purposes(kind) for kind in ("project", "data", "model")}
    assert choices["project"] == choices["data"] == choices["model"]
    annexes = [one for one in choices["project"] or () if one.startswith("annex_")]
    assert len([one for one in annexes if one.startswith("annex_i_")]) == 20
    assert len([one for one in annexes if one.startswith("annex_iii_")]) == 25
    for kind in ("data", "model"):
        found = asked(**{f"{kind}.about.purposes": ["research"]})
        assert statuses(found)[f"cards.{kind}_purposes"] == found.verdict == "not_met"


def _purposes(kind: Kind) -> dict[str, str] | None:
    return next(one.choices for one in questions(kind) if one.key == "purposes")


def test_every_purpose_of_the_annexes_is_in_a_rule() -> None:
    for purpose in [one for one in _purposes("project") or () if one.startswith("annex_")]:
        found = asked(
            LATER,
            **HIGH_RISK | {"project.about.purposes": [purpose]},
            **{"project.high_risk.third_party_assessment": True, "project.risk.tested": False},
        )
        section_b = purpose in {f"annex_i_{n}" for n in range(13, 21)}
        assert found.verdict == ("met" if section_b else "not_met"), purpose
        assert (statuses(found)["art_2.par_2"] == "met") is section_b


def test_dates_change_verdicts() -> None:
    unsafe = {**HIGH_RISK, "project.risk.tested": False}
    assert asked(datetime.date(2027, 12, 1), **unsafe).verdict == "met"
    assert asked(datetime.date(2027, 12, 2), **unsafe).verdict == "not_met"
    # Before the amendment was in force, the law had an earlier date: not yet reached then.
    before = asked(datetime.date(2026, 7, 26), **unsafe)
    (risk,) = [one for one in before.findings if one.id == "art_9.par_6"]
    assert risk.status == "not_yet_applicable"
    assert "from 2026-08-02" in risk.evidence
    earlier = {
        "project.scope.changed_since": False,
        "project.scope.placed_on": datetime.date(2027, 1, 1),
    }
    assert asked(datetime.date(2028, 1, 1), **{**unsafe, **earlier}).verdict == "met"
    assert asked(datetime.date(2024, 1, 1), **unsafe).verdict == "met"


def test_bad_cards_are_never_silently_met() -> None:
    stale = {"north": Standing(False, "none", "the data of north has moved")}
    forged = {"north": Standing(True, "forged", "another key's")}
    assert asked(TODAY, stale).verdict == "unknown"
    assert asked(TODAY, {"north": Standing(None)}).verdict == "unknown"
    assert asked(TODAY, forged).verdict == "not_met"
    served = {"project.facts.how": "serve"}
    assert asked(TODAY, {"north": Standing(True, "good")}, **served).verdict == "not_met"  # south
    assert (
        asked(TODAY, {one: Standing(True, "good") for one in ("north", "south")}, **served).verdict
        == "met"
    )
    two = tree(entities=("A", "B"))
    change(two, {"entity.about.roles": ["provider"]})
    assert statuses(asked(whole=two))["cards.provider"] == "unknown"
    assert asked(**{"entity.about.roles": ["contributor"]}).verdict == "unknown"
    assert asked(**{"project.about.law": "another"}).verdict == "unknown"
    assert asked(**{"project.about.law": None}).verdict == "unknown"
    assert asked(**{"data.about.holder": "Nobody"}).verdict == "unknown"
    assert asked(**{"project.facts.silos": ["north", "south", "west"]}).verdict == "unknown"
    assert asked(**{"data.north.persons.special": True}).verdict == "unknown"
    research = {"project.scope.research_only": True}
    assert asked(**research).verdict == "unknown"  # and it excludes nothing
    assert predict(Cards(CARDS["project"]()), LAW, TODAY).verdict == "unknown"


def test_what_one_card_left_open_is_unknown_with_its_name() -> None:
    for kind in ("project", "entity", "data", "model"):
        for one in questions(kind):
            path = f"{kind}.{one.section}.{one.key}"
            base = {**HIGH_RISK, "entity.about.roles": ["provider", "deployer"]}
            found = asked(LATER, **base, **{path: None} if path not in base else {})
            for finding in found.findings:
                if finding.status == "unknown" and not finding.id.startswith("cards."):
                    assert f"{one.section}.{one.key}" in finding.evidence


def test_a_tree_takes_the_worst_of_its_federations() -> None:
    own = asked()
    said = {one: Claim(verdict=one, law=own.law, rules="x") for one in VERDICTS}
    for verdict, others in {
        "met": {"eu": said["met"], "uk": said["out_of_scope"]},
        "not_met": {"eu": said["not_met"], "uk": None},
        "unknown": {"eu": said["met"], "uk": None},
        "prohibited": {"eu": said["prohibited"], "uk": said["not_met"]},
    }.items():
        assert with_children(own, others).verdict == verdict


def test_changes_name_what_became_of_a_finding() -> None:
    before, after = (
        asked(),
        asked(**{"data.north.rights.described": None, "model.general_purpose.stated": True}),
    )
    found = changes(before, after)
    assert found[("art_53.par_1.pt_d", "data/north")] == ("not_applicable", "unknown")
    assert changes(before, before) == {}
    assert len(changes(None, before)) == len(before.findings)


# --- Worse answers never make a better verdict -------------------------------------------------

POLAR = [
    (kind, one)
    for kind in ("project", "entity", "data", "model")
    for one in questions(kind)
    if one.worse is not None
]
PURPOSES = list(_purposes("project") or ())


@st.composite
def projects(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], datetime.date]:
    """(cards, the same with some answers worse, a date)."""
    whole = tree()
    days = st.dates(datetime.date(2024, 1, 1), datetime.date(2032, 1, 1))
    change(whole, {
        "project.scope.placed_on": draw(st.none() | days),
        "model.about.released_on": draw(st.none() | days),
        "entity.about.in_union": draw(st.sampled_from([True, False, None])),
        "entity.about.roles": draw(st.sampled_from([["provider"], ["provider", "deployer"]])),
        "model.facts.training_flops": draw(st.sampled_from([None, 1e21, 2e23, 2e25])),
        "model.modified.modifies": draw(st.sampled_from([True, False, None])),
        "model.modified.original_flops": draw(st.sampled_from([None, 1e22, 1e24, 1e26])),
        "model.modified.original_unknown": draw(st.sampled_from([True, False, None])),
        "model.modified.original_systemic": draw(st.sampled_from([True, False, None])),
        "project.about.purposes": draw(st.lists(st.sampled_from(PURPOSES), min_size=1, max_size=3)),
    })  # fmt: skip
    flips = draw(st.lists(st.sampled_from(POLAR), max_size=12))
    for kind, one in flips:
        if one.key != "purposes":
            value = draw(st.sampled_from([worst(one), None]))
            change(whole, {f"{kind}.{one.section}.{one.key}": value})
    worse = {**whole, "project": _copy(whole["project"]), "entity": [*map(_copy, whole["entity"])]}
    worse |= {
        kind: {name: _copy(card) for name, card in whole[kind].items()}
        for kind in ("data", "model")
    }
    for kind, one in draw(st.lists(st.sampled_from(POLAR), min_size=1, max_size=8)):
        path = f"{kind}.{one.section}.{one.key}"
        if one.key == "purposes":
            card = next(iter(worse[kind].values())) if kind in ("data", "model") else worse[kind]
            held = card["about"]["purposes"]
            new = [*held, draw(st.sampled_from(PURPOSES))] if kind == "project" else held[1:]
            change(worse, {path: new})
        else:
            first = (
                whole[kind]
                if kind == "project"
                else (whole["entity"][0] if kind == "entity" else next(iter(whole[kind].values())))
            )
            known = first.get(one.section, {}).get(one.key) is not None
            change(
                worse, {path: draw(st.sampled_from([worst(one), None])) if known else worst(one)}
            )
    return whole, worse, draw(days)


def _copy(card: dict[str, Any]) -> dict[str, Any]:
    return {section: dict(answers) for section, answers in card.items()}


CONSISTENT = {"cards.research", "cards.market", "cards.persons"}


@examples(60)
@given(drawn=projects())
def test_a_worse_answer_never_makes_a_better_verdict(drawn: Any) -> None:
    whole, worse, on = drawn
    before = predict(cards_of(whole), LAW, on)
    assume(
        all(
            one.status in ("met", "not_applicable")
            for one in before.findings
            if one.id in CONSISTENT
        )
    )
    # An answer that was the worst already does not become unknown.
    for kind, one in POLAR:
        for old, new in zip(_all(whole, kind), _all(worse, kind), strict=True):
            was, now = (card.get(one.section, {}).get(one.key) for card in (old, new))
            if isinstance(one.worse, bool) and was == worst(one) and now is None:
                new.setdefault(one.section, {})[one.key] = was
    after = predict(cards_of(worse), LAW, on)
    assert rank(after) <= rank(before), changes(before, after)


def _all(whole: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    cards = whole[kind]
    return [cards] if kind == "project" else cards if kind == "entity" else list(cards.values())


#: What makes a claim one that nothing contradicts.
CLAIMS: dict[str, Any] = {
    "research_only": {"project.about.purposes": ["research"]},
    "before_market": {"project.scope.placed_on": datetime.date(2032, 1, 1)},
}


@pytest.mark.parametrize(
    ("kind", "one"), POLAR, ids=lambda it: it if isinstance(it, str) else f"{it.section}.{it.key}"
)
def test_every_answer_alone(kind: str, one: Any) -> None:
    """Each from best over unknown to worst, in a project where as much as can be applies."""
    base = {**HIGH_RISK, "entity.about.roles": ["provider", "deployer"]}
    base |= {
        "entity.use.public_service": True,
        "model.general_purpose.stated": True,
        "data.persons.personal": True,
    }
    base |= {"project.transparency.interacts": True, "project.transparency.generates": True}
    path = f"{kind}.{one.section}.{one.key}"
    if one.key == "purposes":
        steps = (
            [["annex_iii_5d"], ["annex_iii_5d", "annex_i_1"]]
            if kind == "project"
            else [PURPOSES, []]
        )
    else:
        steps = [best(one), None, worst(one)]
    base |= CLAIMS.get(one.key, {})
    ranks = [rank(asked(LATER, **{**base, path: step})) for step in steps]
    assert ranks == sorted(ranks, reverse=True), ranks
    assert answered("project")  # the helper answers something at all


def test_a_child_says_what_its_own_law_asks_and_not_for_ever(tmp_path: Path) -> None:
    own, folder = asked(), tmp_path / "children"
    assert own.verdict == "met"
    assert with_children(own, {}) == own
    folder.mkdir()
    lines = {"eu": json.dumps(own.as_json()), "us": json.dumps(own.as_json() | {"verdict": "met"})}
    for name, text in lines.items():
        (folder / f"{name}.json").write_text(text)
    claims = read_claims(tmp_path, [])
    assert with_children(own, claims).verdict == "met"
    # A jurisdiction of its own, and nothing said.
    silent = with_children(own, read_claims(tmp_path, ["eu", "ch"]))
    assert (silent.verdict, silent.findings[-3].subject) == ("unknown", "child/ch")
    for days, verdict in ((-1, "unknown"), (0, "met"), (31, "met"), (32, "unknown")):
        later = asked(TODAY + datetime.timedelta(days))
        assert with_children(later, claims).verdict == verdict
    banned = {"us": Claim.model_validate(own.as_json() | {"verdict": "prohibited"})}
    assert with_children(own, claims | banned).verdict == "prohibited"
    (folder / "us.json").write_text('{"verdict": "fine", "law": "2026-11-30", "rules": "x"}')
    with pytest.raises(CardError, match=r"us\.json is no prediction: verdict"):
        read_claims(tmp_path, [])
