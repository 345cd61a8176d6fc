"""What a law says of cards on a date: findings and a verdict. A pure function."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from photon.cards.bundle import Cards
from photon.law.conditions import Condition, Finding, Place, evaluate
from photon.law.rules import Law, Rule

#: Stands on every output.
NOTE = "Prediction, not legal advice"

Status = Literal["met", "not_met", "unknown", "not_applicable", "not_yet_applicable"]
Verdict = Literal["prohibited", "not_met", "unknown", "met", "out_of_scope"]

#: Worst first.
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

#: For so long a child's own prediction is relied on.
MOST_DAYS = 31
#: Of the verdicts that are no statuses themselves.
_STATUS_OF: dict[Any, Status] = {"prohibited": "not_met", "out_of_scope": "not_applicable"}
_CHILD_TODO = "Have it mend what its own `photon comply` names, and send its --json anew."


@dataclass(frozen=True)
class Requirement:
    """One finding.

    Attributes:
        id: of the rule, such as art_50.par_1.
        subject: "project", or "entity/NAME", "data/SILO", "model/NAME".
        evidence: the answers that decide, and dates.
        todo: what to do; empty where nothing is.
    """

    id: str
    subject: str
    status: Status
    evidence: str
    todo: str


@dataclass(frozen=True)
class Prediction:
    """All findings, and what they come to.

    Attributes:
        law: the date.
        rules: id and version of the law file.
    """

    verdict: Verdict
    law: datetime.date
    rules: str
    findings: tuple[Requirement, ...]

    def as_json(self) -> dict[str, Any]:
        """For `photon comply --json`."""
        return asdict(self) | {"law": self.law.isoformat(), "note": NOTE}


def predict(cards: Cards, law: Law, on: datetime.date) -> Prediction:
    """What a law asks of a project on a date, and whether its cards show that it is done.

    Making an answer worse (questions.toml says which one is) never makes the verdict better, if no
    two answers contradicted each other before.
    """
    found: list[Requirement] = []
    banned, known, (project,) = False, {}, cards.subjects("project")
    for rule in law.rule:
        if not rule.holds(on):
            continue
        for subject in cards.subjects(rule.subject):
            here = {"project": project, rule.subject: subject}
            place = Place(cards, here, on, law.conditions, known)
            one = _requirement(rule, subject[0], law, place)
            banned |= rule.banned and one.status == "not_met"
            found.append(one)
    return Prediction(_verdict(found, banned), on, f"{law.law.id} {law.law.version}", tuple(found))


def _verdict(found: Collection[Requirement], banned: bool) -> Verdict:
    if banned:
        return "prohibited"
    for worst in ("not_met", "unknown"):
        if any(one.status == worst for one in found):
            return worst
    of_law = {one.status for one in found if not one.id.startswith("cards.")}
    return "met" if of_law - {"not_applicable"} else "out_of_scope"


def _requirement(rule: Rule, label: str, law: Law, place: Place) -> Requirement:
    def told(status: Status, because: Iterable[str], do: str = "") -> Requirement:
        evidence = "; ".join(dict.fromkeys([*because]))
        return Requirement(rule.id, label, status, f"{rule.says} {evidence}".strip(), do)

    holds = evaluate(rule.when, place)
    if holds.truth is False:
        return told("not_applicable", holds.because)
    due, later = _due(rule, law, place)
    if due.truth is False:
        if later is None:
            return told("not_applicable", due.because)
        return told("not_yet_applicable", [*holds.because, f"it applies from {later}"], rule.do)
    needs = evaluate(rule.needs, place)
    if rule.otherwise == "not_applicable" and needs.truth is not True:
        return told("not_applicable", [*needs.because, "so it frees nobody"], rule.do)
    if holds.truth is None or due.truth is None:
        because = [*holds.because, *due.because]
        if needs.truth is True:  # then the missing answers change nothing
            return told("met", [*needs.because, "whether or not it applies", *because])
        return told("unknown", ["whether it applies is unknown", *because], rule.do)
    if needs.truth is None:
        return told("unknown", needs.because, rule.do)
    if needs.truth is False:
        return told(rule.otherwise, [*needs.because, *holds.because], rule.do)
    return told("met", needs.because or holds.because)


def _due(rule: Rule, law: Law, place: Place) -> tuple[Finding, datetime.date | None]:
    """Whether the rule binds by now, and if not, from when it will; None: never by these dates."""
    if rule.id.startswith("cards."):
        return Finding(True), None
    if place.on < law.law.in_force:
        return Finding(False), law.law.in_force
    if rule.applies is None:
        return Finding(True), None
    starts = [one for one in law.dates[rule.applies] if one.holds(place.on)]
    reached: Condition = {"any": [one.when for one in starts if one.applies <= place.on]}
    later = [
        one.applies
        for one in starts
        if one.applies > place.on and evaluate(one.when, place).truth is not False
    ]
    return evaluate(reached, place), min(later, default=None)


def changes(
    before: Prediction | None, after: Prediction
) -> dict[tuple[str, str], tuple[str | None, str | None]]:
    """(id, subject) -> (status before, status after), where they differ; None: there was none."""
    old, new = (
        {(one.id, one.subject): one.status for one in (found.findings if found else ())}
        for found in (before, after)
    )
    both = {key: (old.get(key), new.get(key)) for key in [*new, *old]}
    return {key: pair for key, pair in both.items() if pair[0] != pair[1]}


class Claim(BaseModel):
    """What a federation inside another is predicted: its own `photon comply --json`.

    Attributes:
        law: the date. rules: id and version of its law file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    verdict: Verdict
    law: datetime.date
    rules: Annotated[str, Field(max_length=200)]


def with_children(found: Prediction, claims: Mapping[str, Claim | None]) -> Prediction:
    """The same, with a finding for each child, and the worst verdict of them all.

    A claim is good for MOST_DAYS from its date; a child without one (None) is unknown.
    """
    more, worst = [], [found.verdict]
    for name, claim in sorted(claims.items()):
        verdict: Any = "unknown"
        told = "there is none"
        if claim is not None:
            told = f"{claim.verdict} on {claim.law}, by {claim.rules}"
            if 0 <= (found.law - claim.law).days <= MOST_DAYS:
                verdict = claim.verdict
            else:
                told += f"; it is good for {MOST_DAYS} days from then"
        status: Any = _STATUS_OF.get(verdict, verdict)
        do = "" if status in ("met", "not_applicable") else _CHILD_TODO
        says = f"A federation inside says what its own law asks of it. {told}"
        more.append(Requirement("cards.child", f"child/{name}", status, says, do))
        worst.append(verdict)
    verdict = min(worst, key=VERDICTS.index)
    return replace(found, verdict=verdict, findings=(*found.findings, *more))
