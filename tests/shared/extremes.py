"""Documents as an enemy would write them, made from the pydantic models that read them.

`spoiled(model, valid)` gives a valid document in which a few fields, whatever the model has, also
those that the valid one leaves out, hold values at their bounds, beyond them, of another type, or
garbage. Most of a document stays valid, so it gets as far as it can.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

#: Where a field is: keys of tables, and 0 for the first of a list.
Path = tuple[str | int, ...]

#: For tests of spoiled documents. FUZZ_EXAMPLES=2000 looks longer, at other examples each time.
_asked = os.environ.get("FUZZ_EXAMPLES")


def examples(usual: int) -> settings:
    return settings(
        max_examples=int(_asked or usual),
        derandomize=_asked is None,
        suppress_health_check=list(HealthCheck),
    )


_NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**53, 2**63, 10**400, -0.0, 5e-324, 1.7e308, -1.7e308]
_NUMBERS += [math.inf, -math.inf, math.nan, 0.5, True]
_TEXTS = ["", " ", "0", "a" * 5000, "\x00", "\x1b[2J", "[/x]", "\u202e", "\ud800", "\r\n", "../x"]
_TEXTS += ["/etc/passwd", "a/../../b", "<script>", "NaN", "x" * 101, "%s%n", "{}", "\ufeff"]
_OTHERS: list[Any] = [None, [], {}, [[]], {"": None}, [None] * 70]


def spoiled(model: type, valid: dict[str, Any], *, most: int = 3) -> st.SearchStrategy:
    """The valid document with up to `most` fields replaced."""
    fields = list(_fields(TypeAdapter(model).json_schema(), valid))

    def put(changes: list[tuple[Path, Any]]) -> dict[str, Any]:
        document = copy.deepcopy(valid)
        for path, value in changes:
            _put(document, path, value)
        return document

    one = st.sampled_from(fields).flatmap(
        lambda field: st.tuples(st.just(field[0]), st.sampled_from(_values(field[1])))
    )
    return st.lists(one, min_size=1, max_size=most).map(put)


def _fields(schema: dict[str, Any], valid: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every field of a model, its parts' fields among them, with its own schema."""
    definitions = schema.get("$defs", {})

    def walk(path: Path, at: dict[str, Any], depth: int) -> Iterator[tuple[Path, dict]]:
        if "$ref" in at:
            at = definitions[at["$ref"].rpartition("/")[2]]
        if path:
            yield path, at
        if depth > 6:
            return
        for kind in at.get("anyOf", []):
            if "$ref" in kind or kind.get("type") in ("object", "array"):
                yield from walk(path, kind, depth + 1)
        for name, inner in at.get("properties", {}).items():
            yield from walk((*path, name), inner, depth + 1)
        if isinstance(at.get("items"), dict):
            yield from walk((*path, 0), at["items"], depth + 1)

    yield from walk((), schema, 0)
    if isinstance(valid, dict):  # what a model leaves open: tables of any shape
        for name, value in valid.items():
            if isinstance(value, dict):
                yield from (((name, inner), {}) for inner in value)


def _values(schema: dict[str, Any]) -> list[Any]:
    """At the bounds of a field, beyond them, and of every other type."""
    values: list[Any] = []
    for kind in [schema, *schema.get("anyOf", [])]:
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if key in kind:
                bound = kind[key]
                values += [bound, bound - 1, bound + 1, float(bound)]
        for key in ("minLength", "maxLength"):
            if key in kind:
                values += ["a" * kind[key], "a" * (kind[key] + 1)]
        if "maxItems" in kind:
            values += [[0] * (kind["maxItems"] + 1), ["a"] * kind["maxItems"]]
        values += kind.get("enum", [])
    return [*values, *_NUMBERS, *_TEXTS, *_OTHERS]


def _put(document: Any, path: Path, value: Any) -> None:
    at = document
    for step, following in zip(path, [*path[1:], None], strict=True):
        last = following is None
        if isinstance(step, int):
            if not isinstance(at, list):
                return
            while len(at) <= step:
                at.append([] if isinstance(following, int) else {})
            key: Any = step
        else:
            if not isinstance(at, dict):
                return
            key = step
        if last:
            at[key] = copy.deepcopy(value)
            return
        wanted = list if isinstance(following, int) else dict
        if not isinstance(at.get(key) if isinstance(at, dict) else at[key], wanted):
            at[key] = wanted()
        at = at[key]
