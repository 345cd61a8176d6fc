"""Jinja's templates of a room, filled in: pages, forms and files of questions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def _environment(room: str) -> Any:
    # Slow to import, and most commands fill in none.
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader(room, "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def filled(room: str, template: str, *filters: Callable[..., Any], **names: Any) -> str:
    """A template of a package, such as photon.cards, with these names and, by theirs, filters.

    What goes into one that ends in .html.j2 is escaped.
    """
    made = _environment(room)
    made.filters |= {one.__name__: one for one in filters}
    return made.get_template(template).render(**names).rstrip("\n") + "\n"
