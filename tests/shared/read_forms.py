"""Forms of cards as others read them: each raises where what reads the form finds a fault.

Seven seconds of imports, so each reader is imported where it reads: every process of tests collects
all modules, and one of them reads forms.
"""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from photon.forms.documents import form

if TYPE_CHECKING:
    from cyclonedx.validation.json import JsonStrictValidator


@functools.cache
def _cyclonedx() -> JsonStrictValidator:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_7)


def read_form(name: str, text: str) -> Any:
    """What a form says, by what validates it: JSON as a tree, Markdown as its text."""
    if name == "cyclonedx":
        fault = _cyclonedx().validate_str(text)
        assert fault is None, fault
        return json.loads(text)
    if name == "spdx":
        return _spdx(json.loads(text))
    if name == "croissant":
        from mlcroissant import Dataset

        found = Dataset(jsonld=json.loads(text)).metadata.ctx
        assert (found.issues.errors, found.is_v1_1()) == (set(), True)
        return json.loads(text)
    if name == "oscal":
        return _oscal(json.loads(text))
    if name == "hf":
        ModelCard(text)  # reads the YAML, and evaluations by their schema
        text = text.split("\n---\n", 1)[1]
    html = MarkdownIt().render(text)
    tags = set(re.findall(r"</?([a-z0-9]+)", html))
    assert tags <= {"h1", "h2", "h3", "p", "strong", "ul", "li", "pre", "code"}, tags
    assert re.findall(r"<strong>(.*?)</strong>", html) == headings(name)
    return text


def headings(name: str) -> list[str]:
    """Of every field of a form for people, once for each view that has it."""
    asked = form(name)
    return [
        f"{one.id} {one.name}".strip()
        for view in asked.views or [""]
        for one in asked.fields
        if not view or view in one.views
    ]


def _spdx(tree: dict[str, Any]) -> dict[str, Any]:
    import spdx_python_model

    model, objects = spdx_python_model.load_data(tree)
    assert objects.link() == set()  # nothing refers to what is not there
    again = model.JSONLDSerializer().serialize_data(objects)  # raises where something is missing
    assert len(again["@graph"]) == len(tree["@graph"])
    return tree


def _oscal(tree: dict[str, Any]) -> dict[str, Any]:
    from trestle.oscal.assessment_results import Model

    Model.model_validate(tree)
    whole = tree["assessment-results"]
    (result,) = whole["results"]
    resources = {one["uuid"] for one in whole["back-matter"]["resources"]}
    observed = {one["uuid"] for one in result["observations"]}
    assert whole["import-ap"]["href"][1:] in resources
    assert len(observed) == len(result["observations"])
    for one in result["observations"]:
        assert {subject["subject-uuid"] for subject in one["subjects"]} <= resources
    for one in result.get("findings", ()):
        assert {part["observation-uuid"] for part in one["related-observations"]} <= observed
    return tree
