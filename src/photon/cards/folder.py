"""RUN/cards: project.toml, data/SILO.toml and models/NAME.toml, written and read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from photon.cards.bundle import Cards, Standing
from photon.cards.filling import Known, facts_of_data, known_of
from photon.cards.questions import CARDS, Kind
from photon.cards.text import card_text
from photon.config import load_run_config
from photon.config.load import load_file
from photon.errors import CardError, some
from photon.membership.signing import signature_file, signer_of
from photon.store.disk import write_whole

CARDS_FOLDER = "cards"
#: The card of the model that a run is to make, before there is a checkpoint.
PLANNED = "planned"
PROJECT, DATA, MODELS = "project.toml", "data", "models"


def cards_folder(run: Path) -> Path:
    """Where the cards of a run lie: comply.cards of its run file, or RUN/cards."""
    resolved = run / "config.resolved.toml"
    named = load_run_config(resolved).comply.cards if resolved.is_file() else None
    return Path(named or run / CARDS_FOLDER)


def write_cards(run: Path) -> list[Path]:
    """Write or renew the cards of a run; answers stay. Returns what was written.

    A data card whose data moved becomes SILO.vN.toml, and a next version without answers takes its
    place. One whose data is the same is left as it is, so that its signature holds. What was said
    of the planned model is said of the first checkpoint.
    """
    folder, known = cards_folder(run), known_of(run)
    root = Path(load_run_config(run / "config.resolved.toml").data.path)
    planned = folder / MODELS / f"{PLANNED}.toml"
    made = [folder / MODELS / f"{name}.toml" for name in known.models if name.startswith("round-")]
    if planned.exists() and made:
        planned.replace(made[-1])
    written = write_first_cards(folder, known)
    for silo in known.project["silos"]:
        if (root / "silos" / silo).is_dir():
            facts = facts_of_data(root, silo)
            written += write_data_card(folder / DATA / f"{silo}.toml", facts)
    return written


def write_first_cards(folder: Path, known: Known) -> list[Path]:
    """Write or renew the cards of a project and its models; data cards are the sites' own."""
    silos = known.project["silos"]
    old = _answers(folder / PROJECT, "project")
    entities = old.get("entities") or [{"about": {"name": name}} for name in ["aggregator", *silos]]
    for name, entity in zip(["", *silos], entities, strict=False):
        if not old and name:
            entity["about"]["silos"] = [name]
    about = {"title": known.project["run"], "law": "eu_ai_act"} | old.get("about", {})
    project = old | {"about": about, "entities": entities, "facts": known.project}
    written = [_write(folder / PROJECT, card_text("project", project))]
    for name, facts in known.models.items():
        path = folder / MODELS / f"{name}.toml"
        written.append(_write(path, card_text("model", _answers(path, "model") | {"facts": facts})))
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


def read_cards(run: Path, *, whole: bool = False) -> Cards:
    """All cards of a run or of a planned one, each checked, with the standing of data cards.

    Args:
        whole: a model of the run without a card is an error: the run went on.

    Raises:
        CardError: there are none, or one can't be read, or has a key or answer nobody knows.
    """
    folder = cards_folder(run)
    if not has_cards(run):
        hint = f"`photon cards init {run}` writes them, with the questions in them."
        raise CardError(f"no cards in {run}: {folder / PROJECT} does not exist", hint=hint)
    # Facts are the run's as it is now, whatever a hand wrote there or has happened since.
    known = known_of(run) if (run / "run.json").exists() else Known()  # it is planned
    cards = read_cards_in(folder, known)
    if whole and (missing := sorted(known.models.keys() - cards.models.keys())):
        hint = f"`photon cards init {run}` writes it; answers in other cards stay."
        raise CardError(f"{run} has no card of {some(missing)}", hint=hint)
    return cards


def unasked_cards(run: Path) -> Cards:
    """What Photon knows of a run that has no cards; nobody answered anything."""
    known = known_of(run)
    project = CARDS["project"](about={"title": known.project["run"]}, facts=known.project)
    models = {name: CARDS["model"](facts=facts) for name, facts in known.models.items()}
    return Cards(project, {}, models)


def read_cards_in(folder: Path, known: Known, damaged: dict[str, str] | None = None) -> Cards:
    """Likewise, of a folder of cards.

    Args:
        known: its facts take the place of those in cards, if it has any.
        damaged: gets, by silo, why a data card can't be read, and the others are read all the same;
            None: that is an error.
    """
    project = _with_facts(read_card(folder / PROJECT, "project"), known.project)
    data = {name: (path, card) for name, path, card in _each(folder / DATA, "data", damaged)}
    models = {
        name: _with_facts(card, known.models.get(name, {}))
        for name, _, card in _each(folder / MODELS, "model", None)
    }
    standings = {name: standing_of(path, card, known) for name, (path, card) in data.items()}
    return Cards(project, {name: card for name, (_, card) in data.items()}, models, standings)


def _each(
    folder: Path, kind: Kind, damaged: dict[str, str] | None
) -> Iterator[tuple[str, Path, Any]]:
    for path in sorted(folder.glob("*.toml")):
        try:
            card = read_card(path, kind)
            name = card.facts.silo if kind == "data" else card.facts.name
            if path.name == f"{name}.toml":
                yield name, path, card
            elif not path.name.startswith(f"{name}.v"):  # an older version
                raise CardError(f"{path} is the card of {name!r}", hint=f"Call it {name}.toml.")
        except CardError as error:
            if damaged is None:
                raise
            damaged[path.stem] = f" ({error.message[:300]})"


def standing_of(path: Path, card: Any, known: Known) -> Standing:
    """How far a data card can be relied on, by what the run knows of its silo."""
    silo, facts = card.facts.silo, card.facts
    key, wrong = signer_of(path)
    member = known.keys.get(silo)
    signature = "forged" if wrong else "none" if key is None else "good"
    if key is not None and member is not None and key != member:
        signature, wrong = "forged", f"signed by {key[:19]}..., the member's is {member[:19]}..."
    trained, now = known.trained_on.get(silo), known.now.get(silo)
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
    return card.model_copy(update={"facts": type(card.facts)(**facts)}) if facts else card


def _answers(path: Path, kind: Kind) -> dict[str, Any]:
    """What a card holds; nothing where there is none."""
    return read_card(path, kind).model_dump(exclude_none=True) if path.exists() else {}


def _write(path: Path, text: str) -> Path:
    write_whole(path, text, "a card")
    return path
