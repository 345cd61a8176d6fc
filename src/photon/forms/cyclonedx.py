"""CycloneDX 1.7 ML-BOM: the library writes the bill, a template what it has no words for."""

# The library's decorators hide the signatures of its classes.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import uuid
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion

from photon.forms.documents import from_template, plain
from photon.forms.reading import Reading, Sheet, one_line


def bill_of_materials(reading: Reading) -> dict[str, Any]:
    """Every model and data card is a component; the newest checkpoint is what the bill is about."""
    sheets = {one.label: one for one in (*reading.sheets("models"), *reading.sheets("data"))}
    made = {label: _component(one) for label, one in sheets.items()}
    newest = [one.label for one in reading.sheets("model")]
    version = reading.project["facts.photon_version"]
    photon = Component(name="photon", version=version, type=ComponentType.APPLICATION)
    about = made[newest[0]] if newest else None
    bom = Bom(
        serial_number=uuid.UUID(reading.uuid("cyclonedx")),
        metadata=BomMetaData(
            timestamp=reading.begun, tools=ToolRepository(components=[photon]), component=about
        ),
        components=[one for one in made.values() if one is not about],
        properties=_properties(reading.project),
    )
    if about:
        used = [one for what in ("data", "tokenizer", "initial") for one in reading.sheets(what)]
        bom.register_dependency(about, [made[one.label] for one in used])
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_7).output_as_string()
    bill = json.loads(text)
    for one in [bill["metadata"].get("component", {}), *bill.get("components", ())]:
        if one.get("bom-ref") in sheets:
            one |= from_template("cyclonedx", reading, sheet=sheets[one["bom-ref"]])
    return bill


def _component(sheet: Sheet) -> Component:
    data = sheet.kind == "data"
    who = sheet["about.holder" if data else "about.provider"]
    version = sheet["facts.version" if data else "facts.round"]
    kind = ComponentType.MACHINE_LEARNING_MODEL
    return Component(
        name=one_line(sheet.name) or sheet.label,
        version=None if version is None else str(version),
        type=ComponentType.DATA if data or sheet["facts.what"] == "tokenizer" else kind,
        bom_ref=sheet.label,
        description=f"Not relied on: {sheet.doubt}" if sheet.doubt else None,
        supplier=OrganizationalEntity(name=who) if who else None,
        licenses=[
            LicenseFactory().make_from_string(one) for one in [sheet["about.licence"]] if one
        ],
        hashes=_hashes(sheet["facts.data_sha256" if data else "facts.weights_sha256"]),
        properties=_properties(sheet),
    )


def _hashes(sha256: str | None) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []


def _properties(sheet: Sheet) -> list[Property]:
    """Every answer and every fact: a new one needs no line here."""
    told = sheet.answered()
    return [Property(name=f"photon:{where}", value=plain(value)) for where, value in told]
