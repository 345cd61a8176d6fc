"""Cards for tests: answered as well, or as badly, as they can be, then changed by path."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from photon.cards.bundle import Cards, Standing
from photon.cards.questions import CARDS, Kind, Question, questions

SHA = "ab" * 32


def best(one: Question) -> Any:
    """The best answer to a question; None where none is better."""
    match one.worse:
        case bool():
            return not one.worse
        case "less":
            return list(one.choices or ())
    return None


def worst(one: Question) -> Any:
    """The worst answer."""
    match one.worse:
        case bool():
            return one.worse
        case "less":
            return []
    return None


def answered(kind: Kind, how: Any = best) -> dict[str, dict[str, Any]]:
    """Sections of a card with every question answered that one answer is better for."""
    found: dict[str, dict[str, Any]] = {}
    for one in questions(kind):
        value = how(one)
        if value is not None:
            found.setdefault(one.section, {})[one.key] = value
    return found


def tree(
    silos: Iterable[str] = ("north", "south"),
    entities: Iterable[str] = ("Consortium",),
    how: Any = best,
) -> dict[str, Any]:
    """A whole project: its first entity is the provider, in the Union, of a released model."""
    silos = list(silos)
    project = answered("project", how)
    project["about"] |= {"title": "a project", "law": "eu_ai_act", "purposes": ["general_purpose"]}
    project["scope"] |= {"placed_in_union": True, "placed_on": datetime.date(2026, 9, 1)}
    for key in (
        "military_only",
        "foreign_law_enforcement",
        "research_only",
        "before_market",
        "private_use",
    ):
        project["scope"][key] = False
    project["facts"] = {"how": "simulate", "silos": silos}
    made = []
    for number, name in enumerate(entities):
        entity = answered("entity", how)
        role = "provider" if number == 0 else "contributor"
        entity["about"] |= {"name": name, "roles": [role], "in_union": True}
        made.append(entity)
    data = {}
    for name in silos:
        card = answered("data", how)
        card["about"]["holder"] = next(iter(entities))
        data[name] = card | {"facts": {"silo": name, "data_sha256": SHA, "folder_sha256": SHA}}
    model = answered("model", how)
    model["about"] |= {"released": True, "released_on": datetime.date(2026, 9, 1)}
    model["general_purpose"]["generates"] = ["text"]
    model["modified"] = {"modifies": False}
    model["facts"] = {"name": "round-8", "what": "checkpoint", "training_flops": 1e22}
    return {"project": project, "entity": made, "data": data, "model": {"round-8": model}}


def change(whole: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set answers by path: project.scope.x, entity.NAME.about.x, data.SILO.x.y, model.x.y (all)."""
    for path, value in changes.items():
        kind, *rest = path.split(".")
        *who, section, key = rest
        for card in _cards(whole, kind, who[0] if who else None):
            if value is None:
                card.get(section, {}).pop(key, None)
            else:
                card.setdefault(section, {})[key] = value


def _cards(whole: dict[str, Any], kind: str, name: str | None) -> list[dict[str, Any]]:
    if kind == "project":
        return [whole["project"]]
    if kind == "entity":
        return [one for one in whole["entity"] if name in (None, one["about"]["name"])]
    return [card for at, card in whole[kind].items() if name in (None, at)]


def cards_of(whole: dict[str, Any], standings: Mapping[str, Standing] | None = None) -> Cards:
    """The cards of a tree, checked by their models."""
    project = CARDS["project"].model_validate(whole["project"] | {"entities": whole["entity"]})
    data, models = (
        {name: CARDS[kind].model_validate(card) for name, card in whole[kind].items()}
        for kind in ("data", "model")
    )
    return Cards(project, data, models, dict(standings or {}))
