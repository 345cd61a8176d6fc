"""Reading run.toml, node.toml and clock.toml: overrides, errors that name the nearest valid key."""

from __future__ import annotations

import copy
import difflib
import os
import reprlib
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from photon.config.assembly import assembled, require_own_word
from photon.config.children import ChildConfig, check_children
from photon.config.clock import ClockConfig
from photon.config.node import NodeConfig
from photon.config.run import RunConfig
from photon.errors import (
    ConfigError,
    IncompatibleConfigError,
    InvalidValueError,
    PhotonError,
    UnknownKeyError,
)

_File = TypeVar("_File", bound=BaseModel)

_WHOLE = {RunConfig: "a run file", NodeConfig: "a node file", ClockConfig: "a clock"}
_WHOLE[ChildConfig] = "a federation inside another"

#: What is quoted of a value: it may be another organisation's, and end on a screen.
_MOST_QUOTED = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = _MOST_QUOTED


def load_run_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: the TOML file.
        overrides: dotted assignments such as "local.steps=64"; values are TOML, or bare words.

    Raises:
        ConfigError: no such file, or not TOML.
        UnknownKeyError: a key nobody reads; names the nearest valid one.
        InvalidValueError: wrong type or out of bounds.
        IncompatibleConfigError: values that can't work together.
    """
    tree = _read(path, "run file", "`photon init DIR` writes one to start from.")
    federation = tree.get("federation")
    if isinstance(federation, dict) and isinstance(federation.get("children"), dict):
        children = assembled(federation["children"], Path(path).parent, _read_child)
        federation["children"] = children
        for override in overrides:
            require_own_word(children, override)
    return parse_run_config(tree, overrides, source=str(path))


def load_served(
    path: str | os.PathLike[str], parent: Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Read what an aggregator serves: a run file, or a federation's that is inside another.

    Of the latter, which has [serve] beside its own keys, the parent says what is trained, task by
    task: the result's [model] stands for it.

    Args:
        parent: serve.parent, of a federation inside another.

    Raises:
        ConfigError: as `load_run_config`.
    """
    name, hint = Path(path).stem, "It has the keys of [federation.children.NAME]; docs/worldlm.md."
    tree = _read(path, "run file", "`photon init DIR` writes one to start from.")
    if parent is None and not tree.keys() & {"silos", "children"}:
        return load_run_config(path, overrides)
    own = assembled({name: {"file": str(path)}}, Path(), _read_child)[name]
    if not (members := [*own.get("silos", []), *own.get("children", {})]):
        raise IncompatibleConfigError(f"{path} names no members in silos or children", hint=hint)
    serve = {"silos": members, **tree.get("serve", {}), "child": own}
    serve |= {"parent": str(parent.absolute())} if parent else {}
    mine = {"serve": serve, "comply": tree.get("comply", {})}
    tree = {"run": {"name": name}, "model": {"preset": "tiny"}, "data": {"path": "."}}
    tree["federation"] = {key: own[key] for key in ("sample", "quorum") if key in own}
    config = _parsed(tree | mine, RunConfig, overrides, str(path))
    home = str(Path(config.serve.home) / "parent")
    return config.having(data={"path": home})


def load_node_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> NodeConfig:
    """Read a site's node file; as `load_run_config`."""
    hint = (
        "Two lines are enough, [data] and below it path = "
        '"the folder that `photon data prepare` made".'
    )
    return _parsed(_read(path, "node file", hint), NodeConfig, overrides, str(path))


def load_clock(path: str | os.PathLike[str]) -> ClockConfig:
    """Read a clock file; as `load_run_config`."""
    return load_file(path, ClockConfig, "clock", "See docs/clock.md for the keys of a clock.")


def load_file(
    path: str | os.PathLike[str],
    model: type[_File],
    what: str,
    hint: str = "",
    kind: type[PhotonError] = ConfigError,
) -> _File:
    """Read any TOML file that a model describes; as `load_run_config`, or errors of one kind.

    what: it is, for messages. hint: where it is missing.
    """
    try:
        return _parsed(_read(path, what, hint), model, (), str(path))
    except ConfigError as error:
        raise (error if kind is ConfigError else kind(error.message, hint=error.hint)) from None


def parse_run_config(
    tree: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "run config"
) -> RunConfig:
    """Validate a run config given as nested dicts; raises as `load_run_config`."""
    config = _parsed(tree, RunConfig, overrides, source)
    check_children(config)
    return config


def _read_child(path: Path) -> dict[str, Any]:
    """A file with the keys of [federation.children.NAME]; those below it may be files again."""
    hint = "It has the keys of [federation.children.NAME]; docs/groups.md."
    tree = _read(path, "file of a federation", hint)
    for section in ("serve", "comply"):
        tree.pop(section, None)  # its own aggregator's
    alone = {name: value for name, value in tree.items() if name != "children"}
    _parsed(alone, ChildConfig, (), str(path))
    return tree


def _read(path: str | os.PathLike[str], kind: str, hint: str) -> dict[str, Any]:
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors on Windows write a BOM
    except FileNotFoundError:
        raise ConfigError(f"no {kind} at {file}", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {kind} {file}: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error


def _parsed(
    tree: dict[str, Any], model: type[_File], overrides: Sequence[str], source: str
) -> _File:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"a config is made of tables, not of {tree!r:.80}",
            hint="photon.load_config(PATH) reads a file.",
        )
    tree = copy.deepcopy(tree)
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _assign(tree, override, model)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _translated(error, source, model) from None


def resolved_toml(config: BaseModel) -> str:
    """The whole config with its defaults written out, as TOML that loads to the same config."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def write_resolved(config: BaseModel, path: Path) -> None:
    """Write `resolved_toml` atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(resolved_toml(config), encoding="utf-8")
    partial.replace(path)


def _assign(tree: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    key, equals, literal = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"override {override!r} is not of the form section.key=value",
            hint="Example: --set local.steps=64",
        )
    here = tree
    for depth, part in enumerate(parts[:-1]):
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise UnknownKeyError(
                f"override {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a table"
            )
    here[parts[-1]] = _toml_value(literal.strip(), _takes_text(parts, root))


def _toml_value(literal: str, text: bool) -> Any:
    # Shells eat quotes, so what does not read as TOML is taken as a string; so is run.name=2026,
    # as nothing but a string can be meant there.
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        return literal
    return literal if text and not isinstance(value, str) else value


def _takes_text(parts: list[str], root: type[BaseModel]) -> bool:
    field = _field_of(parts, root)
    return field is not None and str in _options_of(field.annotation)


def _suggestion(loc: tuple[int | str, ...], root: type[BaseModel]) -> str:
    *tables, key = map(str, loc)
    here = list((_model_at(tables, root) or root).model_fields)
    elsewhere = [
        f"{section}.{key}"
        for section, field in root.model_fields.items()
        if (table := _section_of(field.annotation)) is not None and key in table.model_fields
    ]
    if elsewhere:
        return f"{key} belongs to another table: {' or '.join(elsewhere)}."
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {'.'.join([*tables, near[0]])}?"
    place = f"[{'.'.join(tables)}]" if tables else _WHOLE.get(root, "it")
    return f"Valid keys of {place}: {', '.join(sorted(here))}."


def _options_of(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(one for part in typing.get_args(annotation) for one in _options_of(part))
    if typing.get_origin(annotation) is Annotated:
        return _options_of(typing.get_args(annotation)[0])
    return (annotation,)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for option in _options_of(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _model_at(parts: Sequence[str], root: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    names = iter(parts)
    for part in names:
        field = model.model_fields.get(part) if model is not None else None
        annotation = field.annotation if field is not None else None
        if typing.get_origin(annotation) in (dict, list):  # of tables, whatever the name of one
            annotation = typing.get_args(annotation)[-1] if next(names, None) else None
        model = _section_of(annotation)
    return model


def _field_of(parts: Sequence[str], root: type[BaseModel]) -> FieldInfo | None:
    model = _model_at(parts[:-1], root)
    return model.model_fields.get(parts[-1]) if model is not None else None


def _translated(error: ValidationError, source: str, root: type[BaseModel]) -> ConfigError:
    details = error.errors(include_url=False)
    first = min(details, key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        hint = _suggestion(first["loc"], root)
        return UnknownKeyError(f"{source}: unknown key {_SHORT.repr(key)}", hint=hint)
    found = _SHORT.repr(first.get("input"))
    if first["type"] == "model_type":
        return InvalidValueError(f"{source}: {key} = {found} must be a table, [{key}]")
    message = first["msg"].removeprefix("Value error, ")
    if len(message) > 5 * _MOST_QUOTED:
        message = f"{message[: 5 * _MOST_QUOTED]} ..."
    others = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "value_error" and len(first["loc"]) <= 1:
        where = f"[{key}]: " if key else ""
        return IncompatibleConfigError(f"{source}: {where}{message}{others}")
    if first["type"] == "missing":
        return InvalidValueError(f"{source}: {key} is missing{others}", hint=_describe(key, root))
    return InvalidValueError(
        f"{source}: {key} = {found}: {message[:1].lower()}{message[1:]}{others}",
        hint=_describe(key, root),
    )


def _describe(dotted: str, root: type[BaseModel]) -> str | None:
    parts = dotted.split(".")
    field = _field_of(parts[:2], root)  # what stands inside data.mixture is described with it
    if field is None:
        return None
    if _section_of(field.annotation) is not None:
        return f"Add a table [{dotted}]; docs/configuration.md starts with an example."
    return f"{'.'.join(parts[:2])}: {field.description}"
