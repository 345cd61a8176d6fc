"""Writes docs/configuration.md from the models; `make docs` runs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from photon.config.children import ChildConfig, PolicyConfig
from photon.config.node import NodeConfig
from photon.config.run import RunConfig

_INTRODUCTION = """\
# run.toml, key by key

A run file says what the federation does. Only a model and a data folder must be named; everything
else has a default. The smallest run file, annotated:

```toml
[model]
preset = "tiny"        # a shape; or path = "a Hugging Face folder"

[data]
path = "data/demo"     # made by `photon data prepare`
```

Any key can be set on the command line, as often as needed:

    photon simulate run.toml --set local.steps=64 --set outer.name=nesterov --set outer.lr=0.7

What stands after `=` is read as TOML (`true`, `64`, `1e-3`, `"a string"`); what is not TOML, and
whatever is given for a key that takes text, is read as the text itself.

- A key nobody reads is an error (exit code 11) that names the nearest valid one.
- A value of the wrong type or out of bounds is an error (12), and `"3"` is no number.
- Values that can't work together are an error when the file is read (13), not at round 40.
- Run folders keep the resolved file, every default written out: what ran is what is there.

A run that has begun, or is over, can be given more rounds, or other values for the rounds to come:

    photon resume runs/NAME --rounds 40 --set local.lr=1e-3

The clock goes on, and the schedule is that of the new file, read where the clock stands: a cosine
that had come down after 20 rounds stands half-way up again in a run of 40, as in one planned so.
Set `local.lr` lower, or `local.schedule=constant`, where that is not meant. What changed is an
event, a line of a served run's audit, and in the folder (config.until-round-N.toml is what held
before). Keys that made what the run keeps (model, data, seed, tau, optimizers, codecs) are refused
by name.

This page is written by `make docs` from the models in `src/photon/config/`.
"""

_NODE_INTRODUCTION = """\
## node.toml, key by key

What only the site decides: its text, its machines, what it takes part in. `photon join --node
node.toml` reads it, and it beats whatever a run asks for. The smallest one:

```toml
[data]
path = "data/hospital-a"   # made by `photon data prepare`
```
"""

_BOUNDS = (
    ("minimum", ">= {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "<= {}"),
    ("exclusiveMaximum", "< {}"),
    ("pattern", "matches `{}`"),
)


def reference_page() -> str:
    """docs/configuration.md: a section for each table of both files, a row for each key."""
    run, node = _tables(RunConfig, "## [{}]"), _tables(NodeConfig, "### [{}]")
    after = 1 + list(RunConfig.model_fields).index("federation")
    definitions = RunConfig.model_json_schema()["$defs"]
    inner = {"federation.policy": PolicyConfig, "federation.children.NAME": ChildConfig}
    run[after:after] = [
        _section(name, f"## [{name}]", definitions[model.__name__]) for name, model in inner.items()
    ]
    return "\n".join([_INTRODUCTION, *run, _NODE_INTRODUCTION, *node])


def _tables(model: type[BaseModel], heading: str) -> list[str]:
    schema = model.model_json_schema()
    return [
        _section(name, heading.format(name), schema["$defs"][table["$ref"].rsplit("/", 1)[1]])
        for name, table in schema["properties"].items()
    ]


def _section(name: str, heading: str, schema: dict[str, Any]) -> str:
    about = schema["description"].splitlines()[0].removeprefix(f"[{name}]: ")
    required = schema.get("required", ())
    lines = [
        heading,
        "",
        about[0].upper() + about[1:],
        "",
        "| key | type | default | allowed | meaning |",
        "|---|---|---|---|---|",
    ]
    for key, field in schema["properties"].items():
        cells = (
            f"`{key}`",
            _type_of(field),
            "**required**" if key in required else _default_of(field),
            _bounds_of(field),
            field["description"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _choices(field: dict[str, Any]) -> list[dict[str, Any]]:
    # A key that may be absent is {"anyOf": [what it holds, {"type": "null"}]}.
    return [option for option in field.get("anyOf", ()) if option.get("type") != "null"]


def _value_schema(field: dict[str, Any]) -> dict[str, Any]:
    return next(iter(_choices(field)), field)


def _type_of(field: dict[str, Any]) -> str:
    if len(choices := _choices(field)) > 1:
        return " or ".join(_type_of(choice) for choice in choices)
    value = _value_schema(field)
    if "$ref" in value:
        return "table"
    if value["type"] == "array":
        return f"array of {value['items']['type']}s"
    if value["type"] != "object":
        return value["type"]
    inside = value.get("additionalProperties")
    return f"table of {inside['type']}s" if isinstance(inside, dict) else "table"


def _default_of(field: dict[str, Any]) -> str:
    if "default" not in field:  # a schema leaves out the empty tables and arrays
        return "`[]`" if field.get("type") == "array" else "`{}`"
    if field["default"] is None:
        return "not set"
    if isinstance(field["default"], list):  # tomli_w would give each element a line
        return f"`{json.dumps(field['default'])}`"
    literal = tomli_w.dumps({"v": field["default"]}).removeprefix("v = ").strip()
    return f"`{literal}`"


def _bounds_of(field: dict[str, Any]) -> str:
    if len(choices := _choices(field)) > 1:
        return ", ".join(_bounds_of(choice) for choice in choices)
    value = _value_schema(field)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    inside = value.get("additionalProperties")
    bounded = inside if isinstance(inside, dict) else value
    bounds = [text.format(bounded[key]) for key, text in _BOUNDS if key in bounded]
    return ", ".join(bounds) or "any"


def main(arguments: Sequence[str]) -> int:
    """Print the page, or with `--write PATH` write it there."""
    match list(arguments):
        case []:
            sys.stdout.write(reference_page())
        case ["--write", path]:
            Path(path).write_text(reference_page(), encoding="utf-8")
        case _:
            sys.stderr.write("usage: python docs/reference.py [--write PATH]\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
