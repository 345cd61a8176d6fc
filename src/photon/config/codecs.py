"""Codec specs: the text in a run file that says how updates are encoded.

    int8    int8(block=64)    bf16+zstd(level=3)    topk(density=0.02)+int8+zstd    zstd

A spec is up to three stages joined by `+`: a structure (which values, or which factors, are sent),
the values codec of what is left (fp32 where none is named) and zstd. No torch in here, so that a
run file is checked without it; `photon.compression.build_codec` builds what a spec says.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from photon.plugins import CODECS, plugin_names

#: Characters of a spec: it is repeated in every manifest.
MAX_SPEC = 200

Number = int | float

#: Of a stage. structure: goes first and has others encode its tensors. values: encodes all values
#: of a tensor. alone: values that no structure takes. entropy: goes last, loses nothing.
Role = Literal["structure", "values", "alone", "entropy"]


@dataclass(frozen=True)
class Parameter:
    """A number that a stage takes: its default and what it may be.

    Args:
        default: its type, int or float, is the parameter's.
        low: smallest; itself allowed where the number is a whole one.
        high: largest, allowed.
        multiple_of: of what a whole number must be a multiple.
        power_of_two: whether a whole number must be one.
    """

    default: Number
    low: Number
    high: Number
    multiple_of: int = 1
    power_of_two: bool = False

    def allows(self, value: Number) -> bool:
        """Whether a number of the right type is within bounds."""
        if isinstance(self.default, float):
            return self.low < value <= self.high
        whole = int(value)
        good = whole % self.multiple_of == 0 and not (self.power_of_two and whole & (whole - 1))
        return good and self.low <= whole <= self.high

    def __str__(self) -> str:
        if isinstance(self.default, float):
            return f"a number above {self.low:g} to {self.high:g}"
        kind = "a whole number" if self.multiple_of == 1 else f"a multiple of {self.multiple_of}"
        return f"{'a power of two' if self.power_of_two else kind} from {self.low} to {self.high}"


@dataclass(frozen=True)
class Stage:
    """A codec that a spec may name: its role and the parameters it takes."""

    role: Role
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


_BLOCK = {"block": Parameter(128, 16, 4096, power_of_two=True)}

#: By name. A plugin (entry-point group "photon.codecs") is one more, of role values.
STAGES: dict[str, Stage] = {
    "topk": Stage("structure", {"density": Parameter(0.01, 0.0, 1.0)}),
    "lowrank": Stage("structure", {"energy": Parameter(0.95, 0.0, 1.0)}),
    "powersgd": Stage("structure", {"rank": Parameter(4, 1, 1024)}),
    "fp32": Stage("values"),
    "bf16": Stage("values"),
    "fp16": Stage("values"),
    "int8": Stage("values", _BLOCK),
    "int4": Stage("values", _BLOCK),
    "fp4": Stage("values", _BLOCK),
    "sign": Stage("values", _BLOCK),
    "sparseloco": Stage("alone", {"k": Parameter(64, 4, 1024, multiple_of=4)}),
    "ring": Stage("alone", {"bits": Parameter(16, 8, 16)}),
    "zstd": Stage("entropy", {"level": Parameter(3, 1, 19)}),
}


@dataclass(frozen=True)
class StageSpec:
    """A stage as a spec has it.

    Args:
        name: of STAGES, or a plugin's.
        parameters: all of them by name, defaults filled in; a plugin's are those that were given.
    """

    name: str
    parameters: Mapping[str, Number]

    @property
    def plugin(self) -> bool:
        """Whether it is a plugin's."""
        return self.name not in STAGES

    def __str__(self) -> str:
        """In canonical form, `name(parameter=value, ...)`."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name


@dataclass(frozen=True)
class CodecSpec:
    """A spec, read and found in order. As text: the same with every default written out."""

    values: StageSpec
    structure: StageSpec | None = None
    zstd: StageSpec | None = None

    def __iter__(self) -> Iterator[StageSpec]:
        """Its stages in order."""
        stages = (self.structure, self.values, self.zstd)
        return (stage for stage in stages if stage is not None)

    def __str__(self) -> str:
        return "+".join(map(str, self))


@lru_cache
def parse_codec(spec: str) -> CodecSpec:
    """Read a spec.

    Raises:
        ValueError: it is too long, not of the grammar, names a stage or a parameter that nobody
            knows or a number out of bounds, or has stages in an order that means nothing; says
            what is allowed or what to write instead.
    """
    if len(spec) > MAX_SPEC:
        raise ValueError(f"a codec of {len(spec)} characters; at most {MAX_SPEC} are allowed")
    words = [_word(text.strip(), spec) for text in _BETWEEN_STAGES.split(spec)]
    _require_order(words)
    found = {_PLACES[word.role]: word.stage for word in words}
    return CodecSpec(found.get(1, StageSpec("fp32", {})), found.get(0), found.get(2))


#: A plus sign, but for those of numbers in brackets.
_BETWEEN_STAGES = re.compile(r"\+(?![^()]*\))")
_STAGE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\((.*)\))?", re.DOTALL)
_GIVEN = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(\S+)\s*", re.ASCII)
_INT = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")

_PLACES: Mapping[Role, int] = {"structure": 0, "values": 1, "alone": 1, "entropy": 2}
_ONE_OF = ("one structure at a time", "one values codec at a time", "zstd once")


class _Word(NamedTuple):
    """A stage as it was written, and what that means."""

    text: str
    role: Role
    stage: StageSpec


def _word(text: str, spec: str) -> _Word:
    match = _STAGE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"codec {spec!r}: {text!r} is not a stage; write a name, and its parameters in "
            "brackets if it has any, like int8 or int8(block=64)"
        )
    name, inside = match[1], match[2] or ""
    role = _role_of(name)
    known = STAGES[name].parameters if name in STAGES else None
    numbers: dict[str, Number] = {}
    for part in inside.split(",") if inside.strip() else ():
        given = _GIVEN.fullmatch(part)
        if given is None:
            raise ValueError(
                f"codec {name}: {part.strip()!r} is not a parameter; write name=number, with "
                "commas between them"
            )
        if given[1] in numbers:
            raise ValueError(f"codec {name}: parameter {given[1]!r} is given twice")
        numbers[given[1]] = _number(name, known, *given.groups())
    ordered = {key: numbers.get(key, one.default) for key, one in (known or {}).items()}
    return _Word(text, role, StageSpec(name, numbers if known is None else ordered))


def _role_of(name: str) -> Role:
    if name in STAGES:
        return STAGES[name].role
    plugins = plugin_names(CODECS)
    if name in plugins:
        return "values"
    near = difflib.get_close_matches(name, [*STAGES, *plugins], n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    others = f"; of plugins: {', '.join(plugins)}" if plugins else ""
    raise ValueError(f"no codec is called {name!r}{guess} (there are: {', '.join(STAGES)}{others})")


def _number(name: str, known: Mapping[str, Parameter] | None, key: str, text: str) -> Number:
    """What was given for a parameter, in its type; of a plugin's, in the type it is written in."""
    if known is not None and key not in known:
        allowed = ", ".join(known) or "none"
        raise ValueError(f"codec {name} has no parameter {key!r} (it has: {allowed})")
    value = int(text) if _INT.fullmatch(text) else float(text) if _FLOAT.fullmatch(text) else None
    if value is None or not math.isfinite(value):
        raise ValueError(f"codec {name}: {key} = {text} is not a number")
    if known is None:
        return value
    kind = type(known[key].default)
    if (isinstance(value, float) and kind is int) or not known[key].allows(value):
        raise ValueError(f"codec {name}: {key} = {text}: {known[key]} is needed")
    return kind(value)


def _require_order(words: list[_Word]) -> None:
    """At most one stage of each place, in order, and no company that a stage can't have.

    Raises:
        ValueError: saying what to write instead.
    """
    text = "+".join(word.text for word in words)
    places = [[word for word in words if _PLACES[word.role] == place] for place in range(3)]
    choices: dict[str, None] = {}
    for picked in itertools.product(*(place or [None] for place in places)):
        some = [word for word in picked if word is not None]
        if any(word.role == "alone" for word in some):
            some = [word for word in some if word.role != "structure"]
        choices["+".join(word.text for word in some)] = None
    if text in choices:
        return
    twice = (one for found, one in zip(places, _ONE_OF, strict=True) if len(found) > 1)
    why = next(twice, "a structure goes first, then a values codec, then zstd")
    alone = [word for word in words if word.role == "alone"]
    if alone and (places[0] or len(places[1]) > 1):
        why = f"{alone[0].stage.name} chooses and encodes values itself"
        choices = {choice: None for choice in choices if alone[0].text in choice}
    written = " or ".join(map(repr, [*choices][:3]))
    raise ValueError(f"codec {text!r}: {why}; write {written}")
