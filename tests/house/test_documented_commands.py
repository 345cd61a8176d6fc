"""Every `photon ...` in pages, hints and errors is a real command with real options."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from photon.cli.main import app
from photon.config import RunConfig
from photon.config.node import NodeConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
#: Design pages may speak of commands that later versions bring; these speak of this one.
PROMISES = [page for page in PAGES if page.name not in {"ARCHITECTURE.md", "LAB.md"}]


COMMANDS = get_command(app)


def commands_in(text: str) -> list[str]:
    """Command lines in code blocks and in `inline code`, with continuation lines joined."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^(?: {4}|\$ )?\s*(?:\.venv/bin/)?(photon [a-z].*)$", text, re.MULTILINE)
    inline = re.findall(r"`(photon [a-z][^`]*)`", text)
    prose = re.compile(r"^photon [a-z]+ [a-z]+ [a-z]+ [a-z]+")  # a wrapped sentence, not a command
    return [line for line in [*blocks, *inline] if not prose.match(line)]


def wrong_with(line: str) -> str | None:
    """What is not there: the command or the option that a command line names."""
    words = shlex.split(line, comments=True)[1:]
    command: Any = COMMANDS
    while hasattr(command, "commands") and words and re.match(r"[a-z]", words[0]):
        if words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    known = {"--help", "-h"}
    for parameter in command.params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    unknown = [
        word
        for word in words
        if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known
    ]
    return f"no option {unknown[0]!r}" if unknown else None


@pytest.mark.parametrize("page", PROMISES, ids=lambda page: page.name)
def test_documented_commands_exist(page: Path) -> None:
    for line in commands_in(page.read_text(encoding="utf-8")):
        assert wrong_with(line) is None, f"{page.name}: `{line}`"


def test_the_readme_shows_commands() -> None:
    assert len(commands_in((ROOT / "README.md").read_text(encoding="utf-8"))) >= 8


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("photon simulate run.toml --set local.steps=3", None),
        ("photon simulat run.toml", "no command 'simulat'"),
        ("photon simulate run.toml --sets a=1", "no option '--sets'"),
        ("photon data prepar", "no command 'prepar'"),
    ],
)
def test_what_is_not_there_is_found(line: str, problem: str | None) -> None:
    assert wrong_with(line) == problem


def test_every_command_shows_an_example_in_its_help() -> None:
    def leaves(command: Any, path: str) -> list[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            return [(path, command)]
        found: list[tuple[str, Any]] = []
        for name, child in command.commands.items():
            found += leaves(child, f"{path} {name}")
        return found

    for path, command in leaves(COMMANDS, "photon"):
        if path != "photon version":
            assert f"`{path}" in (command.help or ""), f"{path} --help has no example"
        for line in commands_in(command.help or ""):
            assert wrong_with(line) is None, f"{path} --help: `{line}`"


def strings_in(source: Path) -> list[str]:
    """A module's strings, docstrings and f-strings among them; X stands for what they put in."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    within = {
        id(part) for one in ast.walk(tree) if isinstance(one, ast.JoinedStr) for part in one.values
    }
    found: list[str] = []
    for one in ast.walk(tree):
        if isinstance(one, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in one.values]
            found.append("".join(map(str, parts)))
        elif isinstance(one, ast.Constant) and isinstance(one.value, str) and id(one) not in within:
            found.append(one.value)
    return found


def options_of(command: Any) -> set[str]:
    found = {"--help"}
    for parameter in command.params:
        found |= {*parameter.opts, *parameter.secondary_opts}
    for child in getattr(command, "commands", {}).values():
        found |= options_of(child)
    return found


SOURCES = sorted((ROOT / "src" / "photon").rglob("*.py"))


def test_what_code_and_hints_advise_exists() -> None:
    checked = 0
    for source in SOURCES:
        for text in strings_in(source):
            for line in re.findall(r"`(photon [a-z][^`]*)`", " ".join(text.split())):
                line = re.sub(r"\(.*|[\[\]|]| \.\.\.", " ", line)
                assert wrong_with(line) is None, f"{source.name}: `{line}`"
                checked += 1
    assert checked > 100


def test_what_the_law_file_advises_exists() -> None:
    law = (ROOT / "src/photon/law/eu_ai_act.toml").read_text(encoding="utf-8")
    lines = re.findall(r"(photon [a-z][^`)\n\"]*)", law)
    assert len(lines) >= 4
    for line in lines:
        assert wrong_with(line) is None, line


def test_options_that_hints_name_exist() -> None:
    known, checked = options_of(COMMANDS), 0
    for source in SOURCES:
        calls = [
            one for one in ast.walk(ast.parse(source.read_text())) if isinstance(one, ast.Call)
        ]
        for hint in (key.value for call in calls for key in call.keywords if key.arg == "hint"):
            text = re.sub(r"`[^`]*`", "", ast.unparse(hint))  # whole commands: see above
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text):
                assert option in known, f"{source.name}: {text}"
                checked += 1
    assert checked > 20


def test_keys_that_pages_hints_and_errors_name_exist() -> None:
    known: dict[str, set[str]] = {}
    for config in (RunConfig, NodeConfig):
        for table, field in config.model_fields.items():
            known.setdefault(table, set()).update(getattr(field.annotation, "model_fields", {}))
    named = re.compile(rf"(?<![\w./`-])({'|'.join(known)})\.([a-z_]+)\b(?!\()")
    files = {"json", "jsonl", "log", "md", "safetensors", "sig", "toml"}
    texts = {page.name: [page.read_text(encoding="utf-8")] for page in PROMISES}
    texts |= {str(source): strings_in(source) for source in SOURCES}
    for name, parts in texts.items():
        for table, key in (found for part in parts for found in named.findall(part)):
            wrong = key not in known[table] | files and f"{table}.{key}" != "local.stepz"
            assert not wrong, f"{name}: {table}.{key}"
