"""Codec specs: the text in a run file that says how updates are encoded.

    int8    int8(block=64)    bf16+zstd(level=3)    topk(density=0.02)+int8+zstd    zstd

A spec is up to three stages joined by `+`: a structure (which values, or which factors, are sent),
the values codec of what is left (fp32 where none is named) and zstd. No torch in here, so that a
run file is checked without it; `photon.compression.build_codec` builds what a spec says, and
refuses to be imported where its classes and these tables differ.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

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
        low: smallest; itself allowed unless `above`.
        high: largest, allowed.
        multiple_of: of what a whole number must be a multiple.
        power_of_two: whether a whole number must be one.
        above: whether it must be larger than `low`.
    """

    default: Number
    low: Number
    high: Number
    multiple_of: int = 1
    power_of_two: bool = False
    above: bool = False

    def allows(self, value: Number) -> bool:
        """Whether a number of the right type is within bounds."""
        if not (self.low < value or (value == self.low and not self.above)) or value > self.high:
            return False
        if isinstance(self.default, float):
            return math.isfinite(value)
        whole = int(value)
        return whole % self.multiple_of == 0 and not (self.power_of_two and whole & (whole - 1))

    def __str__(self) -> str:
        if isinstance(self.default, float):
            return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"
        kind = "a whole number"
        if self.power_of_two:
            kind = "a power of two"
        elif self.multiple_of > 1:
            kind = f"a multiple of {self.multiple_of}"
        return f"{kind} from {self.low} to {self.high}"


@dataclass(frozen=True)
class Stage:
    """A codec that a spec may name: its role and the parameters it takes."""

    role: Role
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


_BLOCK = {"block": Parameter(128, 16, 4096, power_of_two=True)}

#: By name. A plugin (entry-point group "photon.codecs") is one more, of role values.
STAGES: dict[str, Stage] = {
    "topk": Stage("structure", {"density": Parameter(0.01, 0.0, 1.0, above=True)}),
    "lowrank": Stage("structure", {"energy": Parameter(0.95, 0.0, 1.0, above=True)}),
    "powersgd": Stage("structure", {"rank": Parameter(4, 1, 1024)}),
    "fp32": Stage("values"),
    "bf16": Stage("values"),
    "fp16": Stage("values"),
    "int8": Stage("values", _BLOCK),
    "int4": Stage("values", _BLOCK),
    "fp4": Stage("values", _BLOCK),
    "sign": Stage("values", _BLOCK),
    "sparseloco": Stage("alone", {"k": Parameter(64, 4, 1024, multiple_of=4)}),
    "zstd": Stage("entropy", {"level": Parameter(3, 1, 19)}),
}


@dataclass(frozen=True)
class StageSpec:
    """A stage as a spec has it.

    Args:
        name: of STAGES, or a plugin's.
        parameters: all of them by name, defaults filled in; a plugin's are those that were given.
        plugin: whether it is a plugin.
    """

    name: str
    parameters: Mapping[str, Number]
    plugin: bool = False

    def __str__(self) -> str:
        return stage_text(self.name, self.parameters)


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


def stage_text(name: str, parameters: Mapping[str, Number]) -> str:
    """A stage in canonical form, `name(parameter=value, ...)`."""
    given = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return f"{name}({given})" if given else name


def parse_codec(spec: str) -> CodecSpec:
    """Read a spec.

    Raises:
        ValueError: it is too long, not of the grammar, names a stage or a parameter that nobody
            knows or a number out of bounds, or has stages in an order that means nothing; says
            what is allowed or what to write instead.
    """
    if len(spec) > MAX_SPEC:
        raise ValueError(f"a codec of {len(spec)} characters; at most {MAX_SPEC} are allowed")
    words = [_Word.of(text, spec) for text in _split(spec)]
    _require_order(words)
    found = {_group(word.role): word.stage() for word in words}
    values = found.get("values", StageSpec("fp32", {}))
    return CodecSpec(values, found.get("structure"), found.get("entropy"))


_STAGE = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\((.*)\)\s*)?", re.DOTALL)
_GIVEN = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(\S+)\s*", re.ASCII)
_INT = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def _split(spec: str) -> list[str]:
    """Stages between the plus signs, but for those of numbers in brackets."""
    return re.split(r"\+(?![^()]*\))", spec)


@dataclass(frozen=True)
class _Word:
    """A stage as it was written."""

    text: str
    name: str
    role: Role
    given: Mapping[str, str]

    @classmethod
    def of(cls, text: str, spec: str) -> _Word:
        match = _STAGE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"codec {spec!r}: {text.strip()!r} is not a stage; write a name, and its "
                "parameters in brackets if it has any, like int8 or int8(block=64)"
            )
        name, inside = match.groups()
        return cls(text.strip(), name, _role_of(name), _given(name, inside))

    def stage(self) -> StageSpec:
        known = STAGES.get(self.name)
        if known is None:
            numbers = {key: _number(self.name, key, text) for key, text in self.given.items()}
            return StageSpec(self.name, numbers, plugin=True)
        for key in self.given:
            if key not in known.parameters:
                allowed = ", ".join(known.parameters) or "none"
                raise ValueError(f"codec {self.name} has no parameter {key!r} (it has: {allowed})")
        return StageSpec(
            self.name,
            {
                key: _checked(self.name, key, parameter, self.given[key])
                if key in self.given
                else parameter.default
                for key, parameter in known.parameters.items()
            },
        )


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


def _given(name: str, inside: str | None) -> dict[str, str]:
    """Parameters as written, by name."""
    found: dict[str, str] = {}
    for part in inside.split(",") if inside is not None and inside.strip() else ():
        match = _GIVEN.fullmatch(part)
        if match is None:
            raise ValueError(
                f"codec {name}: {part.strip()!r} is not a parameter; write name=number, with "
                "commas between them"
            )
        key, text = match.groups()
        if key in found:
            raise ValueError(f"codec {name}: parameter {key!r} is given twice")
        found[key] = text
    return found


def _number(name: str, key: str, text: str) -> Number:
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    raise ValueError(f"codec {name}: {key} = {text} is not a number")


def _checked(name: str, key: str, parameter: Parameter, text: str) -> Number:
    wanted: Callable[[Number], Number] = type(parameter.default)
    value = _number(name, key, text)
    right = wanted is float or isinstance(value, int)
    if not right or not parameter.allows(value):
        raise ValueError(f"codec {name}: {key} = {text}: {parameter} is needed")
    return wanted(value)


def _group(role: Role) -> str:
    return "values" if role == "alone" else role


_ORDER = ("structure", "values", "entropy")
_ONE_OF = {
    "structure": "one structure at a time",
    "values": "one values codec at a time",
    "entropy": "zstd once",
}


def _require_order(words: list[_Word]) -> None:
    """At most one stage of each group, in order, and no company that a stage can't have.

    Raises:
        ValueError: saying what to write instead.
    """
    text = "+".join(word.text for word in words)
    groups = {group: [w for w in words if _group(w.role) == group] for group in _ORDER}
    alone = [word for word in groups["values"] if word.role == "alone"]
    if alone and (groups["structure"] or len(groups["values"]) > 1):
        raise ValueError(
            f"codec {text!r}: {alone[0].name} chooses and encodes values itself; write "
            f"{_joined([alone[0], *groups['entropy'][:1]])!r}"
        )
    for group, found in groups.items():
        if len(found) > 1:
            kept = [[w for w in words if w not in found or w is one] for one in found]
            choices = dict.fromkeys(repr(_joined(sorted(some, key=_place))) for some in kept)
            raise ValueError(
                f"codec {text!r}: {_ONE_OF[group]}; write {' or '.join(list(choices)[:3])}"
            )
    right = sorted(words, key=_place)
    if right != words:
        raise ValueError(
            f"codec {text!r}: a structure goes first, then a values codec, then zstd; write "
            f"{_joined(right)!r}"
        )


def _place(word: _Word) -> int:
    return _ORDER.index(_group(word.role))


def _joined(words: list[_Word]) -> str:
    return "+".join(word.text for word in words)
