"""README's tour is true: its commands, its run file and its Python run as printed, in order."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.cli.main import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[list[str]]:
    """Indented lines of a shell, as their words."""
    lines = re.findall(
        r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in lines]


def photon(words: list[str]) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output)
    return result.stdout


def test_the_tour(tmp_path, monkeypatch):
    """In an empty folder, with nothing but what `make demo` installed."""
    monkeypatch.chdir(tmp_path)
    tour = section("A first run of your own")
    activate, *words = commands(tour)
    assert activate == [".", ".venv/bin/activate"]
    assert Path(sys.executable).with_name("photon").exists()
    *words, quick = words
    assert [line[:2] for line in words] == [
        ["photon", "init"],
        ["photon", "data"],
        ["photon", "simulate"],
        ["photon", "report"],
        ["photon", "generate"],
        ["photon", "export"],
    ]
    plain = words[2]
    assert quick[: len(plain)] == plain
    small = quick[len(plain) :]  # what README itself says makes it a matter of seconds
    assert small[::2] == ["--set"] * 3
    said = photon(words[0][1:])
    assert [shlex.split(line) for line in said.splitlines()[-2:]] == words[1:3]
    for line in [words[1], quick, *words[3:]]:
        said = photon(line[1:])
        if "generate" in line:
            assert said.startswith("This function returns")
    assert Path("runs/first/report.html").exists()
    assert Path("first/model/config.json").exists()

    (shown,) = re.findall(r"```toml\n(.*?)```", tour, re.DOTALL)
    written = tomllib.loads(Path("first/run.toml").read_text())
    for table, keys in tomllib.loads(shown).items():
        assert keys.items() <= written[table].items()

    (python,) = re.findall(r"```python\n(.*?)```", section("From Python"), re.DOTALL)
    rounds = '"federation.rounds=4"'
    assert rounds in python
    python = python.replace(rounds, ", ".join(f'"{pair}"' for pair in small[1::2]))
    space: dict = {}
    exec(compile(python, "README.md", "exec"), space)
    assert len(space["table"]["loss"]) > 2
    assert Path("runs/again/summary.json").exists()
    assert Path("first/again/config.json").exists()


def test_the_words_are_few_and_each_is_used() -> None:
    words = re.findall(r"^\| ([a-z, ]+?) \|", section("Words"), re.MULTILINE)[1:]
    assert len(words) <= 12
    for word in words:
        for part in word.replace("inner, outer", "outer").split(", "):
            assert len(re.findall(rf"\b{part}", README)) > 1, part


def test_what_is_said_to_be_in_the_repository_is_there() -> None:
    for name in re.findall(r"`((?:docs|tests|recipes|src|benchmarks|deploy)/[^`\s]*)`", README):
        assert (Path(__file__).parents[1] / name).exists(), name


@pytest.mark.parametrize("page", sorted((Path(__file__).parents[1] / "docs").glob("*.md")))
def test_the_index_has_every_page(page: Path) -> None:
    index = (page.parent / "README.md").read_text(encoding="utf-8")
    assert page.name == "README.md" or f"({page.name})" in index
