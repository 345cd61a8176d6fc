"""`photon init`: a run file that explains itself, and a little text, without fetching anything."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from photon.cli.screen import program, say, show
from photon.errors import RunExistsError

#: Of each silo, so that the first run takes minutes.
_MOST_BYTES = 300_000
_LEAST_CHARACTERS = 300


def init(
    folder: Annotated[
        Path, typer.Argument(help="Folder for both; made if need be.", metavar="[DIR]")
    ] = Path("."),
) -> None:
    """Write a run file with comments, and a little text to try it on.

    Makes DIR/run.toml, and DIR/text with a folder for each of three silos. Nothing is fetched: the
    text is documentation that this machine has already, of Python and of installed packages. Put
    folders of your own in its place when you are ready. Says the next two commands.

    Example: `photon init first`
    """
    run_file, text, data = folder / "run.toml", folder / "text", folder / "data"
    for path in (run_file, text):
        if path.exists():
            raise RunExistsError(
                f"{path} is there already, and is not replaced",
                hint="Name another folder: `photon init DIR`.",
            )
    say("Collecting documentation that is on this machine ...")
    for silo, documents in (
        ("language", _language()),
        ("library", _library()),
        ("packages", _packages()),
    ):
        _write(text / silo, documents)
    recipe = (files("photon") / "recipes" / "first.toml").read_text(encoding="utf-8")
    # The folder's name, so that two runs that were begun like this don't want the same folder.
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.absolute().name).strip("-") or "first"
    for here, there in (
        ('path = "data" ', f"path = {json.dumps(str(data), ensure_ascii=False)} "),
        ('name = "first" ', f'name = "{name}" '),
        ("go to runs/first\n", f"go to runs/{name}\n"),
    ):
        assert recipe.count(here) == 1
        recipe = recipe.replace(here, there)
    run_file.write_text(recipe, encoding="utf-8")
    run_file_, text_, data_ = (shlex.quote(str(path)) for path in (run_file, text, data))
    show(f"Wrote {run_file} and {text} (three silos). Next:")
    show(f"  {program()} data prepare --input {text_} --silo-folders --out {data_}")
    show(f"  {program()} simulate {run_file_}")


def _write(folder: Path, documents: Iterator[tuple[str, str]]) -> None:
    """A text file a document, up to the size of a silo."""
    folder.mkdir(parents=True)
    left = _MOST_BYTES
    for name, text in documents:
        content = text.encode("utf-8", "replace")
        if len(text) >= _LEAST_CHARACTERS and len(content) <= left:
            (folder / f"{name}.txt").write_bytes(content)
            left -= len(content)
        if left < _MOST_BYTES / 50:
            return


def _language() -> Iterator[tuple[str, str]]:
    """Topics of Python's reference, as `help()` shows them."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _library() -> Iterator[tuple[str, str]]:
    """What the standard library's modules say of themselves, their classes and functions."""
    told = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        texts = [ast.get_docstring(one) for one in ast.walk(tree) if isinstance(one, told)]
        yield path.stem, "\n\n".join(text for text in texts if text)


def _packages() -> Iterator[tuple[str, str]]:
    """What installed packages say of themselves."""
    told = {one.name: one.read_text("METADATA") or "" for one in distributions()}
    for name, text in sorted(told.items()):
        yield name, text.partition("\n\n")[2]  # without its headers
