"""RUN/cards: project.toml, data/SILO.toml and models/NAME.toml, written and read back."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from photon.cards.bundle import Cards, Standing
from photon.cards.filling import Truth, data_facts, model_facts, project_facts, truth_of
from photon.cards.questions import CARDS, Kind, questions
from photon.cards.signing import signature_file, signer_of
from photon.cards.text import card_text
from photon.errors import CardError
from photon.store.disk import write_whole

CARDS_FOLDER = "cards"
PROJECT, DATA, MODELS = "project.toml", "data", "models"
_KINDS: dict[str, Kind] = {DATA: "data", MODELS: "model"}


def write_cards(run: Path) -> list[Path]:
    """Write or renew the cards of a run; answers stay. Returns what was written.

    A data card whose data moved becomes SILO.vN.toml, and a next version without answers takes its
    place. One whose data is the same is left as it is, so that its signature holds.
    """
    folder = run / CARDS_FOLDER
    facts = project_facts(run)
    silos = facts["silos"]
    old = _answers(folder / PROJECT, "project")
    entities = old.get("entities") or [{"about": {"name": name}} for name in ["aggregator", *silos]]
    for name, entity in zip(["", *silos], entities, strict=False):
        if not old and name:
            entity["about"]["silos"] = [name]
    about = {"title": facts["run"], "law": "eu_ai_act"} | old.get("about", {})
    project = old | {"about": about, "entities": entities, "facts": facts}
    written = [_write(folder / PROJECT, card_text("project", project))]
    for silo in silos:
        known = data_facts(run, silo)
        if known is not None:
            written += write_data_card(data_card_of(run, silo), known)
    for name, known in model_facts(run).items():
        path = folder / MODELS / f"{name}.toml"
        answers = _answers(path, "model") | {"facts": known}
        written.append(_write(path, card_text("model", answers)))
    return written


def data_card_of(folder: Path, silo: str) -> Path:
    """Where the data card of a silo lies."""
    return folder / CARDS_FOLDER / DATA / f"{silo}.toml"


def write_data_card(path: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write a silo's data card for what its data is now; nothing if there is one that says so."""
    was = _answers(path, "data")
    before = was.get("facts", {})
    if was and before.get("data_sha256") == facts["data_sha256"]:
        if before == before | facts:
            return []
        signature_file(path).unlink(missing_ok=True)  # it was over other facts
        return [_write(path, card_text("data", was | {"facts": before | facts}))]
    version = before.get("version", 0)
    for file in (path, signature_file(path)) if was else ():
        if file.exists():
            file.rename(file.with_name(file.name.replace(".toml", f".v{version}.toml")))
    given = {} if was else {"about": {"holder": facts["silo"]}}
    answers = given | {"facts": {**facts, "version": version + 1}}
    return [_write(path, card_text("data", answers, was))]


def has_cards(run: Path) -> bool:
    """Whether a run has cards."""
    return (run / CARDS_FOLDER / PROJECT).is_file()


def read_cards(run: Path) -> Cards:
    """All cards of a run, each checked, with the standing of data cards.

    Raises:
        CardError: there are none, or one can't be read, or has a key or answer nobody knows.
    """
    folder = run / CARDS_FOLDER
    if not has_cards(run):
        raise CardError(
            f"no cards in {run}: {folder / PROJECT} does not exist",
            hint=f"`photon cards init {run}` writes them, with the questions in them.",
        )
    # Facts are the run's as it is now, whatever a hand wrote there or has happened since.
    project = _with_facts(read_card(folder / PROJECT, "project"), project_facts(run))
    known = model_facts(run)
    found: dict[str, dict[str, Any]] = {DATA: {}, MODELS: {}}
    standings: dict[str, Standing] = {}
    truth = truth_of(run)
    for place, cards in found.items():
        for path in sorted((folder / place).glob("*.toml")):
            card = read_card(path, _KINDS[place])
            name = card.facts.silo if place == DATA else card.facts.name
            if path.name != f"{name}.toml":
                if place == DATA and path.name.startswith(f"{name}.v"):
                    continue  # an older version
                raise CardError(f"{path} is the card of {name!r}", hint=f"Call it {name}.toml.")
            cards[name] = (
                _with_facts(card, known[name]) if place == MODELS and name in known else card
            )
            if place == DATA:
                standings[name] = standing_of(path, card, truth)
    return Cards(project, found[DATA], found[MODELS], standings)


def standing_of(path: Path, card: Any, truth: Truth) -> Standing:
    """How far a data card can be relied on, by what the run knows of its silo."""
    silo, facts = card.facts.silo, card.facts
    key, wrong = signer_of(path)
    member = truth.keys.get(silo)
    signature = "forged" if wrong else "none" if key is None else "good"
    if key is not None and member is not None and key != member:
        signature, wrong = "forged", f"signed by {key[:19]}..., the member's is {member[:19]}..."
    trained, now = truth.trained_on.get(silo), truth.now.get(silo)
    fresh, why = True, ""
    if trained is None:
        fresh, why = None, f"the run does not say on which data {silo} trained"
    elif facts.folder_sha256 != trained:
        fresh, why = False, f"the card is of other data than {silo} trained on"
    elif now is not None and facts.data_sha256 != now:
        fresh, why = False, f"the data of {silo} has moved since the card was written"
    told = "; ".join(part for part in (why, wrong) if part)
    return Standing(fresh, signature, told or (f"signed by {key}" if key else "not signed"))


def read_card(path: Path, kind: Kind) -> Any:
    """One card; raises CardError as `read_cards`."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CardError(f"can't read the card {path}: {error}") from error
    try:
        return CARDS[kind].model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            asked = (*questions(kind), *questions("entity"))
            near = difflib.get_close_matches(at, [f"{one.section}.{one.key}" for one in asked], 1)
            hint = f"Did you mean {near[0]}?" if near else "See `photon cards schema`."
            raise CardError(f"{path}: nobody asks for {at!r}", hint=hint) from None
        raise CardError(f"{path}: {at} = {first.get('input')!r:.100}: {first['msg']}") from None


def _with_facts(card: Any, facts: Mapping[str, Any]) -> Any:
    return card.model_copy(update={"facts": type(card.facts).model_validate(facts)})


def _answers(path: Path, kind: Kind) -> dict[str, Any]:
    """What a card holds; nothing where there is none."""
    return read_card(path, kind).model_dump(exclude_none=True) if path.exists() else {}


def _write(path: Path, text: str) -> Path:
    write_whole(path, text, "a card")
    return path
