"""Each promise of the threat model names a test, and each test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "threat-model.md"
TEXT = PAGE.read_text(encoding="utf-8")

#: `tests/a/test_b.py`, `tests/a/test_b.py::test_c`, or `::test_c` of the file named last.
NAMED = re.compile(r"`(tests/[a-z_/]+(?:\.py)?)?(?:::(test_\w+))?`")


def named_tests() -> list[tuple[str, str]]:
    """File (or folder) and test ("" for all of it), in the order of the page."""
    found, last = [], ""
    for path, test in NAMED.findall(TEXT):
        last = path or last
        if path or test:
            found.append((last, test))
    return found


def promises() -> list[str]:
    """Rows of the tables that have a column for tests."""
    rows, promising = [], False
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            promising = False
        elif line == "| tries to | what stops it | test |":
            promising = True
        elif promising and not line.startswith("|---"):
            rows.append(line)
    return rows


@pytest.mark.parametrize(("path", "test"), sorted(set(named_tests())))
def test_what_is_named_is_there(path, test):
    place = ROOT / path
    assert place.exists(), f"{PAGE.name} names {path}, which is not there"
    if test:
        defined = {
            node.name
            for node in ast.walk(ast.parse(place.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert test in defined, f"{PAGE.name} names {path}::{test}, which is not there"


def test_each_promise_names_its_test():
    rows = promises()
    assert len(rows) > 30
    without = [row for row in rows if not NAMED.search(row.rsplit("|", 2)[1])]
    assert not without, without
