"""All cards of one project together, as the prediction takes them. Nothing here reads a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from photon.errors import some


@dataclass(frozen=True)
class Standing:
    """How far a data card can be relied on.

    Attributes:
        fresh: it is of the data that was trained on; False where that moved; None where nobody here
            can tell.
        signature: "good" of the site's key, "forged" (another's, or over other bytes), or "none".
        why: in words.
    """

    fresh: bool | None = True
    signature: Literal["good", "forged", "none"] = "none"
    why: str = ""

    @property
    def counts(self) -> bool:
        """Whether what people answered in it may be used."""
        return self.fresh is True and self.signature != "forged"


@dataclass(frozen=True)
class Cards:
    """Cards of a project.

    Attributes:
        project: with the entities in it. data: by silo. models: by name.
        standings: of data cards, by silo; one without is fresh and not signed.
    """

    project: Any
    data: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)

    def standing(self, silo: str) -> Standing:
        """Of a data card."""
        return self.standings.get(silo, Standing())

    def subjects(self, kind: str) -> list[tuple[str, str, Any]]:
        """(name for findings, name among its kind, card) of each card of a kind."""
        if kind == "project":
            return [("project", "", self.project)]
        if kind == "entity":
            given = [one.about.name for one in self.project.entities]
            names = [  # told apart, so that no finding is another's
                name if name and given.count(name) == 1 else f"{name or 'entity'} ({n})"
                for n, name in enumerate(given, 1)
            ]
            listed = zip(names, self.project.entities, strict=True)
            return [(f"entity/{name}", name, card) for name, card in listed]
        cards = self.data if kind == "data" else self.models
        return [(f"{kind}/{name}", name, card) for name, card in sorted(cards.items())]


#: Lists that rules compare with.
NAMES: dict[str, Callable[[Cards], list[str]]] = {
    "silos": lambda cards: sorted(cards.data),
    "entities": lambda cards: [one.about.name for one in cards.project.entities if one.about.name],
    "providers": lambda cards: [
        name for _, name, one in cards.subjects("entity") if "provider" in (one.about.roles or ())
    ],
    "checkpoints": lambda cards: [one.facts.what for one in cards.models.values()],
}


def in_words(answer: Any, said: Callable[[str], str] = str, most: int = 8) -> str:
    """An answer or a fact, for people; said: how a text is written; most: entries of a list."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, dict):
        told = ((said(key or "global"), in_words(one, said, most)) for key, one in answer.items())
        return "; ".join(map(": ".join, told))
    if isinstance(answer, list):
        return some((in_words(one, said, most) for one in answer), most) or "none"
    return f"{answer:.6g}" if isinstance(answer, float) else said(str(answer))
