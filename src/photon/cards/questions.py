"""The pydantic models of cards, made of questions.toml: what people say, and what Photon knows."""

from __future__ import annotations

import datetime
import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

Kind = Literal["project", "entity", "data", "model"]

#: The section that Photon fills in.
FACTS = "facts"

#: Longer than any honest answer: cards come from other organisations.
_Text = Annotated[str, Field(max_length=4000)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Figure = Annotated[float, Field(ge=0, lt=1e40, strict=False)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
_MOST = Field(max_length=100_000)
_TYPES: dict[str, Any] = {
    "yes": bool,
    "text": _Text,
    "date": datetime.date,
    "number": _Figure,
    "list": Annotated[list[_Text], _MOST],
    "count": _Count,
    "sha256": _Sha256,
    "counts": Annotated[dict[_Text, _Count], _MOST],
    "figures": Annotated[dict[_Text, _Figure], _MOST],
    "hashes": Annotated[dict[_Text, _Sha256], _MOST],
    "texts": Annotated[dict[_Text, _Text], _MOST],
    "scores": Annotated[dict[_Text, dict[_Text, _Figure]], _MOST],
}


class Strict(BaseModel):
    """A table of a card: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Question:
    """One question to people, or one fact of Photon's.

    Attributes:
        section, key: where its answer stands in the card.
        ask: in plain words; about: of a fact.
        article: of the Regulation, or "".
        kind: a key of _TYPES.
        choices: name -> meaning; None where anything may be said.
        worse: true, false, "more" or "less"; None where no answer is worse than another.
    """

    section: str
    key: str
    ask: str = ""
    about: str = ""
    article: str = ""
    kind: str = "yes"
    choices: dict[str, str] | None = None
    worse: bool | str | None = None
    needed: bool = False

    @property
    def field(self) -> tuple[Any, Any]:
        """Its type and default, as pydantic takes them."""
        kind: Any = _TYPES[self.kind]
        if self.choices:
            one: Any = Literal[*self.choices]
            kind = Annotated[list[one], _MOST] if self.kind == "list" else one
        words = f"{self.ask or self.about} {self.article}".strip()
        if self.needed:
            return kind, Field(description=words)
        return kind | None, Field(default=None, description=words)


@functools.cache
def questions(kind: Kind, *, facts: bool = False) -> tuple[Question, ...]:
    """All questions of a card in the order in which they are asked; or all facts."""
    tree = tomllib.loads(files("photon.cards").joinpath("questions.toml").read_text("utf-8"))
    return tuple(
        Question(section, key, **{**told, "choices": tree["lists"].get(told.get("choices"))})
        for section, asked in tree[kind].items()
        for key, told in asked.items()
        if (section == FACTS) is facts
    )


def sections(kind: Kind) -> list[tuple[str, list[Question]]]:
    """Questions by section, in order."""
    groups = groupby(questions(kind), key=lambda one: one.section)
    return [(section, list(asked)) for section, asked in groups]


def _card(kind: Kind, **more: Any) -> Any:
    tables: dict[str, Any] = {}
    for name, asked in [*sections(kind), (FACTS, questions(kind, facts=True))]:
        fields: dict[str, Any] = {one.key: one.field for one in asked}
        made = create_model(f"{kind.title()}{name.title()}", __base__=Strict, **fields)
        needed = any(one.needed for one in asked)
        tables[name] = (made, ... if needed else made())
    return create_model(f"{kind.title()}Card", __base__=Strict, **tables, **more)


_Entities = Annotated[list[_card("entity")], Field(default_factory=list, max_length=1000)]

#: By kind; entities stand in the project's.
CARDS: dict[str, Any] = {
    "project": _card("project", entities=(_Entities, ...)),
    "data": _card("data"),
    "model": _card("model"),
}
