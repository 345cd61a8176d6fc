"""Arguments and options that several commands share, and commands with many, as a dataclass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def set_option(example: str) -> Any:
    """--set KEY=VALUE, with an example of a key that matters to the command."""
    words = f"Override a key, e.g. {example}. Repeatable."
    return typer.Option("--set", "-s", metavar="KEY=VALUE", help=words)


def option(words: str, *names: str) -> Any:
    """An option of a single command, with its words."""
    return typer.Option(*names, help=words)


RunFile = Annotated[Path, typer.Argument(help="The run file, TOML.", metavar="RUN.toml")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run folder; runs/NAME by default.")]
Folder = Annotated[Path, typer.Argument(help="The run folder.", metavar="DIR")]
ModelFolder = Annotated[Path, typer.Argument(help="Run folder or Hugging Face folder.")]
ServedFolder = Annotated[
    Path | None, typer.Argument(help="Run folder or serve.home; photon-server by default.")
]
Sets = Annotated[list[str] | None, set_option("local.steps=64")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No live view.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")]


def taking(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter is a dataclass gets an option for each of its fields."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = inspect.signature(options, eval_str=True).parameters
        _, *others = inspect.signature(command, eval_str=True).parameters.values()

        shown = inspect.Signature([*fields.values(), *others])

        @functools.wraps(command)
        def called(*arguments: Any, **named: Any) -> None:
            bound = shown.bind(*arguments, **named)
            bound.apply_defaults()
            given = bound.arguments
            command(options(**{name: given.pop(name) for name in fields}), **given)

        called.__annotations__ = {name: one.annotation for name, one in shown.parameters.items()}
        called.__dict__["__signature__"] = shown
        return called

    return decorate
