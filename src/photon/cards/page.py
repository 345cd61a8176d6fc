"""All cards on one readable page, without scripts; and the prediction, where there is one."""

from __future__ import annotations

from typing import Any, get_args

from photon.cards.bundle import Cards, in_words
from photon.cards.questions import Kind, sections


def cards_page(cards: Cards, prediction: Any = None) -> str:
    """The page as text.

    Args:
        prediction: a photon.law.prediction.Prediction.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # slow to import

    environment = Environment(
        loader=PackageLoader("photon.cards", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        (label, cards.standing(name) if kind == "data" else None, _tables(kind, card))
        for kind in get_args(Kind)
        for label, name, card in cards.subjects(kind)
    ]
    return environment.get_template("cards.html.j2").render(
        title=cards.project.about.title or "a project", shown=shown, prediction=prediction
    )


def _tables(kind: Kind, card: Any) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Sections of (question, article, answer) with answers; the last is what Photon knows."""
    tables = []
    for section, asked in sections(kind):
        rows = [
            (one.ask, one.article, in_words(told))
            for one in asked
            if (told := getattr(getattr(card, section), one.key)) is not None
        ]
        tables.append((section.replace("_", " "), rows))
    facts = card.facts.model_dump(exclude_none=True)
    known = [(key.replace("_", " "), "", in_words(value)) for key, value in facts.items()]
    return [one for one in [*tables, ("known to Photon", known)] if one[1]]
