"""`photon cards export`: the cards of a run in one of eight forms."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from photon.cards.bundle import Cards
from photon.cards.folder import read_cards
from photon.errors import CardError
from photon.forms.documents import document, from_template
from photon.forms.reading import Reading, one_line
from photon.law.prediction import NOTE, predict
from photon.law.rules import load_law
from photon.store.disk import write_whole

FORMS = ("cyclonedx", "spdx", "croissant", "hf", "mdf", "summary", "annex4", "oscal")
#: These are published.
_PUBLIC = ("hf", "summary")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def export_cards(
    run: Path, form: str, out: Path, *, on: datetime.date, overwrite: bool = False
) -> list[Path]:
    """Write the cards of a run in a form; returns the files written.

    Args:
        out: the file; of croissant the folder, for a file of each silo.
        on: the law as it is on that day, of oscal.

    Raises:
        CardError: no such form, no cards, one that can't be read or is missing, or a file is there.
        ModuleNotFoundError: of cyclonedx and spdx, without the extra `cards`.
        OSError: it can't be written.
    """
    texts = documents(read_cards(run, whole=True), form, on)
    found = {out / name: text for name, text in texts.items()}
    there = [path for path in found if path.exists()]
    if there and not overwrite:
        hint = "Name another --out, or replace it with --overwrite."
        raise CardError(f"{there[0]} already exists", hint=hint)
    for path, text in found.items():
        write_whole(path, text, "the cards")
    return list(found)


def documents(cards: Cards, form: str, on: datetime.date) -> dict[str, str]:
    """The texts of a form by file name, "" of the only one; the same for the same cards."""
    if form not in FORMS:
        raise CardError(f"no form is called {form!r}", hint=f"There are {', '.join(FORMS)}.")
    reading = Reading(cards, public=form in _PUBLIC)
    match form:  # what an extra has, or takes long, is imported where it is asked for
        case "croissant":
            sheets = reading.sheets("data")
            if not sheets:
                hint = "The sites' cards belong in RUN/cards/data."
                raise CardError("there is no data card to export", hint=hint)
            return {
                f"{one.name}.json": _json(from_template(form, reading, data=one)) for one in sheets
            }
        case "hf":
            return {"": model_card(reading)}
        case "cyclonedx" | "spdx":
            from cyclonedx.spdx import fixup_id, is_expression

            names = {"spdx_id": fixup_id, "is_expression": is_expression}
            bill = from_template(form, reading, **names)
            return {"": _json(_checked(bill) if form == "spdx" else bill)}
        case "oscal":
            law = load_law()
            found = predict(cards, law, on)
            return {"": _json(from_template(form, reading, prediction=found, law=law, note=NOTE))}
    return {"": document(form, reading)}


def model_card(
    reading: Reading,
    license: str | None = None,
    languages: Sequence[str] = (),
    otherwise: str | None = None,
) -> str:
    """README.md of the Hugging Face hub: metadata in YAML, then the cards' answers.

    Args:
        license: as the hub spells it; what the newest model card says by default, or `otherwise`.
        languages: codes as the hub spells them; those of all data cards by default.
    """
    from huggingface_hub.repocard_data import EvalResult, ModelCardData  # slow to import

    answers = (one["about.licence"] or otherwise for one in reading.sheets("model"))
    said = [one for one in answers if one]
    known = files("photon.forms").joinpath("hub_licences.txt").read_text("utf-8").split()
    hubs = license or next((one.lower() for one in said if one.lower() in known), None)
    spoken = {code for one in reading.sheets("data") for code in one["about.languages"] or ()}
    base = next((one["facts.architecture"] for one in reading.sheets("initial")), None)
    scores = [(one["facts.held_out"] or {}).get("", {}) for one in reading.sheets("model")]
    of = ("text-generation", "held-out", "held-out text of all silos")
    kinds = [(kind, one) for kind in ("loss", "perplexity") for one in scores if kind in one]
    results = [EvalResult(*of, kind, one[kind]) for kind, one in kinds]
    front = ModelCardData(
        language=list(languages) or sorted(filter(_LANGUAGE.fullmatch, spoken)) or None,
        license=hubs or ("other" if said else None),
        license_name=one_line(said[0]) if said and not hubs else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["photon", "federated-learning"],
        base_model=base and base.removeprefix("hf:"),
        model_name=one_line(reading.project["facts.run"] or "model") if results else None,
        eval_results=results or None,
    )
    return f"---\n{front.to_yaml()}\n---\n\n{document('hf', reading)}"


def _checked(bill: dict[str, Any]) -> dict[str, Any]:
    """A bill of SPDX that lists its elements, after the SPDX project's model has read it."""
    from spdx_python_model import v3_0_1 as spdx3

    *elements, document = bill["@graph"]
    document["element"] = [one["spdxId"] for one in elements if "spdxId" in one]
    objects = spdx3.SHACLObjectSet()
    spdx3.JSONLDDeserializer().deserialize_data(bill, objects)
    spdx3.JSONLDSerializer().serialize_data(objects)  # what is missing shows here
    return bill


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
