"""RUN/cards: project.toml, data/SILO.toml and models/NAME.toml, written and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from photon.cards.bundle import Cards, Standing
from photon.cards.filling import Truth, data_facts, model_facts, project_facts, truth_of
from photon.cards.questions import CARDS, Kind
from photon.cards.text import card_text
from photon.config import load_run_config
from photon.config.load import load_file
from photon.errors import CardError
from photon.membership.card_signing import signature_file, signer_of
from photon.store.disk import write_whole

CARDS_FOLDER = "cards"
#: The card of the model that a run is to make, before there is a checkpoint.
PLANNED = "planned"
PROJECT, DATA, MODELS = "project.toml", "data", "models"
_KINDS: dict[str, Kind] = {DATA: "data", MODELS: "model"}


def cards_folder(run: Path) -> Path:
    """Where the cards of a run lie: comply.cards of its run file, or RUN/cards."""
    resolved = run / "config.resolved.toml"
    named = load_run_config(resolved).comply.cards if resolved.is_file() else None
    return Path(named) if named is not None else run / CARDS_FOLDER


def write_cards(run: Path) -> list[Path]:
    """Write or renew the cards of a run; answers stay. Returns what was written.

    A data card whose data moved becomes SILO.vN.toml, and a next version without answers takes its
    place. One whose data is the same is left as it is, so that its signature holds. What was said
    of the planned model is said of the first checkpoint.
    """
    folder, facts, models = cards_folder(run), project_facts(run), model_facts(run)
    written = write_first_cards(folder, facts, {})
    for silo in facts["silos"]:
        known = data_facts(run, silo)
        if known is not None:
            written += write_data_card(folder / DATA / f"{silo}.toml", known)
    planned = folder / MODELS / f"{PLANNED}.toml"
    made = [folder / MODELS / f"{name}.toml" for name in models if name.startswith("round-")]
    if planned.exists() and made:
        planned.replace(made[-1])
    return written + _write_models(folder, models)


def write_first_cards(
    folder: Path, facts: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
) -> list[Path]:
    """Write or renew the cards of a project and its models; data cards are the sites' own."""
    silos = facts["silos"]
    old = _answers(folder / PROJECT, "project")
    entities = old.get("entities") or [{"about": {"name": name}} for name in ["aggregator", *silos]]
    for name, entity in zip(["", *silos], entities, strict=False):
        if not old and name:
            entity["about"]["silos"] = [name]
    about = {"title": facts["run"], "law": "eu_ai_act"} | old.get("about", {})
    project = old | {"about": about, "entities": entities, "facts": facts}
    written = _write(folder / PROJECT, card_text("project", project))
    return [written, *_write_models(folder, models)]


def _write_models(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    written = []
    for name, known in models.items():
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
    return (cards_folder(run) / PROJECT).is_file()


def read_cards(run: Path) -> Cards:
    """All cards of a run or of a planned one, each checked, with the standing of data cards.

    Raises:
        CardError: there are none, or one can't be read, or has a key or answer nobody knows.
    """
    folder = cards_folder(run)
    if not has_cards(run):
        raise CardError(
            f"no cards in {run}: {folder / PROJECT} does not exist",
            hint=f"`photon cards init {run}` writes them, with the questions in them.",
        )
    if not (run / "run.json").exists():  # planned: no run says otherwise than the cards
        return read_cards_in(folder, {}, {}, Truth())
    # Facts are the run's as it is now, whatever a hand wrote there or has happened since.
    return read_cards_in(folder, project_facts(run), model_facts(run), truth_of(run))


def known_cards(run: Path) -> Cards:
    """What Photon knows of a run; nobody was asked anything."""
    facts, models = project_facts(run), model_facts(run)
    project = CARDS["project"](about={"title": facts["run"]}, facts=facts)
    return Cards(project, {}, {name: CARDS["model"](facts=one) for name, one in models.items()})


def read_cards_in(
    folder: Path,
    facts: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    truth: Truth,
    damaged: dict[str, str] | None = None,
) -> Cards:
    """Likewise, of a folder of cards.

    Args:
        facts, models: take the place of those in the project's card (if there are any), and in
            models' of these names.
        damaged: gets, by silo, why a data card can't be read, and the others are read all the same;
            None: that is an error.
    """
    project = read_card(folder / PROJECT, "project")
    project = _with_facts(project, facts) if facts else project
    found: dict[str, dict[str, Any]] = {DATA: {}, MODELS: {}}
    standings: dict[str, Standing] = {}
    for place, cards in found.items():
        for path in sorted((folder / place).glob("*.toml")):
            try:
                card = read_card(path, _KINDS[place])
                name = card.facts.silo if place == DATA else card.facts.name
                if place == DATA and path.name.startswith(f"{name}.v"):
                    continue  # an older version
                if path.name != f"{name}.toml":
                    raise CardError(f"{path} is the card of {name!r}", hint=f"Call it {name}.toml.")
            except CardError as error:
                if damaged is None or place != DATA:
                    raise
                damaged[path.stem] = f" ({error.message[:300]})"
                continue
            if place == DATA:
                standings[name] = standing_of(path, card, truth)
            elif name in models:
                card = _with_facts(card, models[name])
            cards[name] = card
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
    return load_file(path, CARDS[kind], "card", "`photon cards init` writes it.", CardError)


def _with_facts(card: Any, facts: Mapping[str, Any]) -> Any:
    return card.model_copy(update={"facts": type(card.facts).model_validate(facts)})


def _answers(path: Path, kind: Kind) -> dict[str, Any]:
    """What a card holds; nothing where there is none."""
    return read_card(path, kind).model_dump(exclude_none=True) if path.exists() else {}


def _write(path: Path, text: str) -> Path:
    write_whole(path, text, "a card")
    return path
