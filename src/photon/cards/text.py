"""Cards as people get them: TOML with every question, and all of them on one readable page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import tomli_w

from photon.cards.bundle import Cards, in_words
from photon.cards.questions import Kind, sections
from photon.templates import filled


def card_text(kind: Kind, answers: Mapping[str, Any], was: Mapping[str, Any] | None = None) -> str:
    """A card as TOML that reads back to the same.

    Args:
        answers: by section and key, "facts" and, of a project, "entities" among them.
        was: answers of an older version, shown but not given.
    """
    facts = {key: value for key, value in answers.get("facts", {}).items() if value is not None}
    given = {"kind": kind, "answers": answers, "was": was or {}, "facts": {"facts": facts}}
    return filled("photon.cards", "card.toml.j2", **given, sections=sections, toml=tomli_w.dumps)


def cards_page(cards: Cards, prediction: Any = None) -> str:
    """A page without scripts.

    Args:
        prediction: a photon.law.prediction.Prediction.
    """
    given = {"cards": cards, "prediction": prediction, "kinds": get_args(Kind)}
    return filled("photon.cards", "cards.html.j2", **given, sections=sections, in_words=in_words)
