"""Prints what outgrew its size budget. A warning to think, never a failure: `make budgets`.

Budgets: 500 lines a file, 80 lines a function, 8 arguments a constructor, and at least as many
lines of tests as of the code they hold.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 500
FUNCTION_LINES = 80
CONSTRUCTOR_ARGUMENTS = 8


def over_budget(source: str, name: str) -> Iterator[str]:
    """One line for each budget that a module's source exceeds."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"{name}: {lines} lines (budget {FILE_LINES})"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{name}:{node.lineno} {node.name}"
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{where}: {length} lines (budget {FUNCTION_LINES})"
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if node.name == "__init__" and len(given) - 1 > CONSTRUCTOR_ARGUMENTS:
            yield f"{where}: {len(given) - 1} arguments (budget {CONSTRUCTOR_ARGUMENTS})"


def code_lines(folder: Path) -> int:
    """Lines that are not blank, over all modules of a folder."""
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return sum(1 for text in texts for line in text.splitlines() if line.strip())


def budget_report(root: Path) -> list[str]:
    """The lines that `make budgets` prints for a repository."""
    found = [
        line
        for folder in ("src", "tests", "benchmarks")
        for path in sorted((root / folder).rglob("*.py"))
        for line in over_budget(path.read_text(encoding="utf-8"), str(path.relative_to(root)))
    ]
    code, tests = code_lines(root / "src"), code_lines(root / "tests")
    ratio = tests / max(code, 1)
    short = "" if ratio >= 1 else " (budget: at least 1)"
    return [
        *(f"budget: {line}" for line in found),
        f"budgets: {len(found)} exceeded; {code} lines of code, {tests} of tests, "
        f"{ratio:.2f} tests per line{short}",
    ]


if __name__ == "__main__":
    sys.stdout.write("\n".join(budget_report(Path(__file__).parents[2])) + "\n")
