"""A law file: dated rules with their sources, checked when it is read."""

from __future__ import annotations

import datetime
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from photon.cards.bundle import Cards
from photon.cards.questions import CARDS, Kind, Strict
from photon.config.load import load_file
from photon.errors import LawError
from photon.law.conditions import Place, evaluate

_ID = re.compile(r"(cards\.[a-z_]+|art_(\d+[a-z]?)(\.par_\d+[a-z]?)?(\.pt_[a-z]+)?)")

_OURS = Path(__file__).with_name("eu_ai_act.toml")
_Title = Annotated[str, Field(min_length=1)]


class _Dated(Strict):
    """Law from one date until another, on which it is no more; whichever is absent is open."""

    begins: datetime.date = Field(default=datetime.date.min, alias="from")
    until: datetime.date = datetime.date.max

    def holds(self, on: datetime.date) -> bool:
        return self.begins <= on < self.until


class Start(_Dated):
    """From when a rule binds, for whom."""

    applies: datetime.date
    when: Any = Field(default_factory=list)


class Rule(_Dated):
    """One requirement.

    Attributes:
        id: such as art_50.par_1; what is about cards themselves begins with cards.
        subject: kind of card that it is asked of, one after the other.
        applies: name of its dates; none: as long as the law is in force.
        when: for whom it holds. needs: what must be true then.
        otherwise: the status where needs are false; not_applicable: also where they are unknown, as
            it then frees nobody.
    """

    id: str
    subject: Kind
    applies: str | None = None
    says: _Title
    when: Any = Field(default_factory=list)
    needs: list[Any] = Field(default_factory=list)
    otherwise: Literal["not_met", "unknown", "not_applicable"] = "not_met"
    banned: bool = False
    do: str = ""


class _Head(Strict):
    id: _Title
    title: _Title
    version: _Title
    in_force: datetime.date
    wording: Literal["paraphrase", "quoted"]


class Source(Strict):
    """Where it stands: an address, the date of what stands there, and who read it."""

    title: _Title
    address: _Title
    date: datetime.date
    read: _Title


class Law(Strict):
    """A whole law file."""

    law: _Head
    sources: Annotated[list[Source], Field(min_length=1)]
    articles: dict[str, str]
    dates: dict[str, list[Start]] = Field(default_factory=dict)
    conditions: dict[str, Any] = Field(default_factory=dict)
    rule: list[Rule]


def load_law(path: Path | None = None) -> Law:
    """Read a law file; the AI Act of this version of Photon by default.

    Raises:
        LawError: it can't be read, or has a key, article, condition, card field or name that nobody
            knows, or dates of one requirement that overlap.
    """
    path, hint = path or _OURS, "docs/cards.md has the form of a law file."
    law = load_file(path, Law, "law file", hint, LawError)
    if (fault := _fault(law)) is not None:
        raise LawError(f"law file {path}: {fault}", hint=hint)
    return law


def _fault(law: Law) -> str | None:
    """What is wrong, in words: rules are tried on blank cards."""
    data, model = {"silo": "-"}, {"name": "-", "what": "checkpoint"}
    blank = Cards(
        CARDS["project"](entities=[{}]),
        {"-": CARDS["data"](facts=data)},
        {"-": CARDS["model"](facts=model)},
    )
    for rule in law.rule:
        shape = _ID.fullmatch(rule.id)
        if shape is None:
            return f"rule {rule.id!r}: an id is like art_50.par_1.pt_a, or cards.fresh"
        if shape[2] is not None and shape[2] not in law.articles:
            return f"rule {rule.id!r}: article {shape[2]} is not in [articles]"
        if rule.applies is not None and rule.applies not in law.dates:
            return f"rule {rule.id!r}: [[dates.{rule.applies}]] does not exist"
        starts = [one.when for one in law.dates.get(rule.applies or "", ())]
        here = {kind: blank.subjects(kind)[0] for kind in ("project", rule.subject)}
        try:
            place = Place(blank, here, datetime.date.max, law.conditions, {}, trial=True)
            evaluate([rule.when, rule.needs, *starts], place)
        except ValueError as error:
            return f"rule {rule.id!r}: {error}"
    return _overlap(law)


def _overlap(law: Law) -> str | None:
    dated: list[tuple[str, str, _Dated]] = [(one.id, f" of {one.subject}", one) for one in law.rule]
    for name, starts in law.dates.items():
        dated += [(f"dates.{name}", f" for {one.when}" if one.when else "", one) for one in starts]
    for name, _, one in dated:
        if one.begins >= one.until:
            return f"{name}: from {one.begins} until {one.until} is no time"
    dated.sort(key=lambda one: (*one[:2], one[2].begins))
    for (*named, before), (name, of, after) in pairwise(dated):
        if named == [name, of] and before.until > after.begins:
            return f"{name}{of[:80]}: two versions overlap on {after.begins}"
    return None
