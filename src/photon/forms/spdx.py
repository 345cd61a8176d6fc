"""SPDX 3.0.1 with its AI and Dataset profiles, as JSON-LD that the SPDX project's model checked."""

from __future__ import annotations

from typing import Any

from cyclonedx.spdx import fixup_id, is_expression
from spdx_python_model import v3_0_1 as spdx3

from photon.forms.documents import from_template
from photon.forms.reading import Reading


def spdx(reading: Reading) -> dict[str, Any]:
    """The document, after the model has read it."""
    sheets = [*reading.sheets("models"), *reading.sheets("data")]
    said = {one["about.licence"] for one in sheets} - {None}
    licences = {one: fixup_id(one) or (one if is_expression(one) else None) for one in sorted(said)}
    who = {one["about.holder" if one.kind == "data" else "about.provider"] for one in sheets}
    graph = from_template("spdx", reading, licences=licences, names=sorted(who - {None}))
    *elements, document = graph["@graph"]
    document["element"] = [one["spdxId"] for one in elements if "spdxId" in one]
    objects = spdx3.SHACLObjectSet()
    spdx3.JSONLDDeserializer().deserialize_data(graph, objects)
    spdx3.JSONLDSerializer().serialize_data(objects)  # what is missing shows here
    return graph
