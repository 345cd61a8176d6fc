"""Forms as documents: fields kept as data and answered from the cards, and templates of JSON."""

from __future__ import annotations

import functools
import html
import json
import re
import sys
import tomllib
from importlib.resources import files
from typing import Any

from pydantic import Field

from photon.cards.bundle import in_words
from photon.cards.questions import Strict
from photon.forms.reading import Reading, Told, one_line
from photon.templates import filled

#: Stands in the place of what no card answers.
NOT_ANSWERED = "not answered"

_MARKS = re.compile(r"([\\`*_{}\[\]|~$#!])")


class _Field(Strict):
    """One field of a form.

    Attributes:
        id, name: as the form has them. part: the section it stands in.
        paths: what answers it (`Reading.told`); none where no card asks for it.
        views: who sees it; none: everybody.
        total: the sum over all cards, if all have it.
        band: of the form, says it in words. times, says: a factor, and the pattern of
            a figure, or of how many a list has.
    """

    part: str
    name: str
    id: str = ""
    paths: list[str] = Field(default_factory=list, alias="from")
    views: list[str] = Field(default_factory=list)
    total: bool = False
    band: str | None = None
    times: float = 1
    says: str = ""


class Form(Strict):
    """A whole form: views by id, for whom; bands by name, [bound, what is said below it]."""

    title: str
    about: str
    views: dict[str, str] = Field(default_factory=dict)
    bands: dict[str, list[list[Any]]] = Field(default_factory=dict)
    after: str = ""
    fields: list[_Field] = Field(alias="field")

    def lines(self, field: _Field, reading: Reading) -> list[str]:
        """A field's answers: of each card that is asked, also what it does not say."""
        told = [one for path in field.paths for one in reading.told(path)]
        if field.total and told and all(one.value is not None for one in told):
            return [self._figure(field, sum(one.value for one in told))]
        if not any(one.value is not None or one.sheet.doubt for one in told):
            return [NOT_ANSWERED]
        return [
            f"{marked(one.sheet.label)}, {_asked(one)} {self._answer(field, one)}" for one in told
        ]

    def _answer(self, field: _Field, told: Told) -> str:
        if told.sheet.doubt:
            return f"{NOT_ANSWERED}: the card can't be relied on ({marked(told.sheet.doubt)})"
        if told.value is None:
            return NOT_ANSWERED
        if isinstance(told.value, int | float) and not isinstance(told.value, bool):
            return self._figure(field, told.value)
        if isinstance(told.value, list) and field.says:
            return field.says.format(len(told.value))
        meant = told.question.choices or {}
        return in_words(
            told.value,
            lambda text: marked(f"{text} ({meant[text]})" if text in meant else text),
            sys.maxsize,
        )

    def _figure(self, field: _Field, value: float) -> str:
        if field.band:
            return next(says for bound, says in self.bands[field.band] if value < bound)
        says = field.says or ("{:,}" if isinstance(value, int) else "{:.6g}")
        return says.format(value if field.times == 1 else value * field.times)


@functools.cache
def form(name: str) -> Form:
    """The form in NAME.toml."""
    text = files("photon.forms").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return Form.model_validate(tomllib.loads(text))


def document(name: str, reading: Reading) -> str:
    """A form as Markdown."""
    return filled("photon.forms", "form.md.j2", form=form(name), reading=reading, marked=marked)


def from_template(name: str, reading: Reading, **more: Any) -> Any:
    """A template of JSON, filled in; what is null or empty in it is left out."""
    given = {"reading": reading, "line": one_line, "plain": plain, **more}
    return _pruned(json.loads(filled("photon.forms", f"{name}.json.j2", **given)))


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _pruned(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if one not in (None, "", [], {})}
    if isinstance(value, list):
        return [_pruned(one) for one in value if one is not None]
    return value


def _asked(told: Told) -> str:
    asked = told.question.ask or f"{told.question.key.replace('_', ' ')}:"
    pick = (told.question.choices or {}).get(told.pick, told.pick)
    return f"{asked} {pick}:" if pick else asked


def plain(value: Any) -> str:
    """An answer or a fact as text for a program."""
    text = json.dumps(value, ensure_ascii=False, default=str).strip('"')
    return value if isinstance(value, str) else text


def marked(text: str) -> str:
    """Text in Markdown, on one line, none of it markup."""
    return _MARKS.sub(r"\\\1", html.escape(one_line(text), quote=False))
