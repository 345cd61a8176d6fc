"""The data card: what a prepared folder holds, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from photon.data.prepared import PreparedData
from photon.templates import filled


def data_card(data: PreparedData, manifest: Mapping[str, Any]) -> str:
    """README.md of a prepared folder, Markdown, by its top manifest."""
    given = {"data": data, "manifest": manifest, "options": manifest["options"], "cell": _cell}
    sources = sorted({source for silo in data.silos.values() for source in silo.sources})
    return filled("photon.data", "card.md.j2", **given, sources=sources)


def _cell(name: str) -> str:
    # A file may be called anything; the table has to stay one.
    return "".join(c if c.isprintable() and c not in "|`<" else "?" for c in name)
