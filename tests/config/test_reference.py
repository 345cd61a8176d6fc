"""docs/configuration.md is what the models say, and its example is a run file."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from photon.config import NodeConfig, RunConfig, parse_run_config

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "configuration.md"
REFERENCE = runpy.run_path(str(DOCS / "reference.py"))
main, reference_page = REFERENCE["main"], REFERENCE["reference_page"]


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run `make docs`"


@pytest.mark.parametrize(("model", "heading"), [(RunConfig, "\n## "), (NodeConfig, "\n### ")])
def test_every_key_has_a_row(model: type[BaseModel], heading: str) -> None:
    page = reference_page()
    for section, field in model.model_fields.items():
        table = field.annotation
        assert table is not None
        part = page.split(f"{heading}[{section}]\n")[1].split(heading)[0]
        rows = re.findall(r"^\| `(\w+)` ", part, flags=re.MULTILINE)
        assert rows == list(table.model_fields)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "row",
    [
        "| `path` | string | **required** | any |",
        "| `seed` | integer | `0` | >= 0, < 2147483648 |",
        "| `mixture` | table of numbers | `{}` | > 0 |",
        "| `sample` | integer | not set | >= 1 |",
        '| `merge` | string | `"delta"` | `delta`, `adopt` |',
        "| `verify` | boolean | `true` | any |",
    ],
)
def test_rows_give_type_default_and_bounds(row: str) -> None:
    assert row in reference_page()


def test_its_example_is_a_run_file() -> None:
    example = re.search(r"```toml\n(.*?)```", reference_page(), flags=re.DOTALL)
    assert example is not None
    assert parse_run_config(tomllib.loads(example[1])).model.preset == "tiny"


def test_command_prints_writes_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == reference_page()
    assert main(["--write", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == reference_page()
    assert main(["--wrong"]) == 2
    assert "usage:" in capsys.readouterr().err


def test_a_row_is_one_line_whatever_its_default() -> None:
    for line in reference_page().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 6, line
