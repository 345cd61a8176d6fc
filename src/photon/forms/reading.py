"""Cards as a form reads them: what is answered, what is not, and what can't be relied on."""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any, get_args

from photon.cards.bundle import Cards
from photon.cards.questions import FACTS, Kind, Question, questions
from photon.errors import CardError

_MODELS = {"model": "checkpoint", "initial": "initial", "tokenizer": "tokenizer"}
#: Hashes by file: machine forms have a place for them, and nobody reads them in prose.
_HASHES = ("files", "shards")


@dataclass(frozen=True)
class Sheet:
    """One card: its label, such as data/north, its name, and why it can't be relied on, if so."""

    label: str
    name: str
    kind: Kind
    card: Any
    doubt: str = ""

    def __getitem__(self, where: str) -> Any:
        """What stands at SECTION.KEY; None without an answer, a blank one, or in doubt."""
        section, _, key = where.partition(".")
        value = None if self.doubt else getattr(getattr(self.card, section), key)
        if where == "facts.recipe" and value:
            return {name: _no_path(name, one) for name, one in value.items()}
        if where == "facts.architecture" and value and self.card.facts.what == "initial":
            return _no_path("model.path", value)
        return None if isinstance(value, str) and not one_line(value) else value

    def told(self, where: str) -> Iterator[Told]:
        """At SECTION.KEY, where KEY may be a pattern.

        KEY?PICK is whether PICK is in the list there, or what the table there has for it.
        """
        section, _, key = where.partition(".")
        key, picks, pick = key.partition("?")
        for one in questions(self.kind, facts=section == FACTS):
            if one.section == section and fnmatchcase(one.key, key):
                value = self[f"{section}.{one.key}"]
                if picks and value is not None:
                    value = value.get(pick) if isinstance(value, dict) else pick in value
                if value is not None or "*" not in key or section != FACTS:
                    yield Told(self, one, value, pick)

    def answered(self) -> Iterator[tuple[str, Any]]:
        """(SECTION.KEY, value) of every answer and fact, hashes by file apart."""
        for one in (*questions(self.kind), *questions(self.kind, facts=True)):
            value = self[f"{one.section}.{one.key}"]
            if value is not None and one.key not in _HASHES:
                yield f"{one.section}.{one.key}", value


@dataclass(frozen=True)
class Told:
    """One answer or fact of a card, or the lack of it; pick: which entry of a list or table."""

    sheet: Sheet
    question: Question
    value: Any
    pick: str


class Reading:
    """All cards of a project, by subject.

    Args:
        public: for a form that is published. Which organisations trained across sites is theirs to
            say, so their data cards are numbered in it.
    """

    def __init__(self, cards: Cards, *, public: bool = False) -> None:
        self._sheets: dict[str, list[Sheet]] = {kind: [] for kind in get_args(Kind)}
        for kind in get_args(Kind):
            for label, name, card in cards.subjects(kind):
                standing = cards.standing(name if kind == "data" else "")
                doubt = "" if standing.counts else standing.why or "not current"
                self._sheets[kind].append(Sheet(label, name, kind, card, doubt))
        self.project = self._sheets["project"][0]
        if public and self.project["facts.how"] == "serve":
            self._sheets["data"] = [
                replace(one, label=f"data/{n}", name=str(n), doubt=one.doubt and "not current")
                for n, one in enumerate(self._sheets["data"], 1)
            ]

    def sheets(self, subject: str) -> list[Sheet]:
        """Of project, entity, provider, data, models, and of them model, initial or tokenizer.

        "model" is the newest checkpoint.
        """
        if subject == "provider":
            return [
                one for one in self._sheets["entity"] if "provider" in (one["about.roles"] or "")
            ]
        if subject not in _MODELS:
            return self._sheets[subject.rstrip("s")]
        found = [one for one in self._sheets["model"] if one["facts.what"] == _MODELS[subject]]
        return sorted(found, key=lambda one: one["facts.round"] or 0)[-1:]

    def told(self, path: str) -> list[Told]:
        """What stands at SUBJECT.SECTION.KEY (`Sheet.told`) in each card of the subject."""
        subject, _, where = path.partition(".")
        return [told for one in self.sheets(subject) for told in one.told(where)]

    @functools.cached_property
    def sha256(self) -> str:
        """Of all that the cards say, and of how far they can be relied on."""
        said = {
            one.label: [one.doubt, one.card.model_dump(mode="json", exclude_none=True)]
            for sheets in self._sheets.values()
            for one in sheets
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def uuid(self, *what: str) -> str:
        """The same for the same cards."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(["photon", self.sha256, *what])))

    @property
    def begun(self) -> datetime:
        """When the run began, UTC, in whole seconds: the time that documents bear.

        Raises:
            CardError: the project card does not say.
        """
        given = self.project["facts.started_at"]
        if given is None:
            hint = "Export the cards of RUN once it has begun, after `photon cards init RUN`."
            raise CardError("no start of the run is known: it is only planned", hint=hint)
        try:
            found = datetime.fromisoformat(given).replace(microsecond=0)
        except ValueError:
            raise CardError(f"project card: facts.started_at = {given!r} is no ISO time") from None
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)


def _no_path(key: str, value: str) -> str:
    """A path of the machine that trained is nobody else's business: its last name stays."""
    path = key.endswith(".path") and not value.startswith("hf:")
    return PurePath(value).name if path else value


def one_line(text: str) -> str:
    """Without line breaks and what a page or a terminal would obey rather than show."""
    shown = (c if c.isprintable() or c in "\u200c\u200d" else " " for c in text)
    return " ".join("".join(shown).split())
