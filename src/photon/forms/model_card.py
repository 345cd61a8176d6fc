"""README.md of the Hugging Face hub: metadata in YAML, then the cards' answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

from photon.forms.documents import document
from photon.forms.reading import Reading, one_line

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def model_card(
    reading: Reading,
    license: str | None = None,
    languages: Sequence[str] = (),
    otherwise: str | None = None,
) -> str:
    """README.md.

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
