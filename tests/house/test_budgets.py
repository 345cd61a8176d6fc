"""The budget printer sees what it should."""

from __future__ import annotations

import runpy
from pathlib import Path

BUDGETS = runpy.run_path(str(Path(__file__).with_name("budgets.py")))


def test_long_files_functions_and_constructors_are_named() -> None:
    arguments = ", ".join(f"a{index}" for index in range(9))
    long = "def long():\n" + "    x = 1\n" * 80
    source = f"class Many:\n    def __init__(self, {arguments}): ...\n{long}" + "y = 2\n" * 418
    assert list(BUDGETS["over_budget"](source, "m.py")) == [
        "m.py: 501 lines (budget 500)",
        "m.py:3 long: 81 lines (budget 80)",
        "m.py:2 __init__: 9 arguments (budget 8)",
    ]


def test_what_keeps_its_budget_is_not_named() -> None:
    source = "class Few:\n    def __init__(self, a, *, b=1): ...\n"
    assert list(BUDGETS["over_budget"](source, "m.py")) == []


def test_report_counts_code_and_tests(tmp_path: Path) -> None:
    for folder, text in (("src", "a = 1\n\nb = 2\n"), ("tests", "c = 3\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text(text, encoding="utf-8")
    assert BUDGETS["budget_report"](tmp_path) == [
        "budgets: 0 exceeded; 2 lines of code, 1 of tests, 0.50 tests per line (budget: at least 1)"
    ]
