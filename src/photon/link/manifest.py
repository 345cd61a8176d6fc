"""What a parcel consists of: tensors, how each is encoded, and the chunks that carry their bytes.

docs/wire-format.md describes it for those who read it with other tools.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.errors import ManifestError, first_fault

FORMAT = "photon-link"
VERSION = 1

#: A chunk is closed at a tensor's end once it holds so much: an unchanged tensor beside a changed
#: one then keeps its chunk.
SMALLEST_CHUNK = 4 << 20
LARGEST_CHUNK = 64 << 20

#: What a tensor may take on the wire: no codec needs twice fp32, and small ones have headers.
_MOST_PER_VALUE = 8
_MOST_PER_TENSOR = 4096

_DTYPE_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8}
_DTYPE_BYTES |= {"float16": 2, "bfloat16": 2, "float32": 4}

Kind = Literal["update", "state", "outer_update", "once"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", strict=True)]
Bytes = Annotated[int, Field(ge=0, le=2**50, strict=True)]
_Whole = Annotated[int, Field(ge=0, lt=2**48)]

#: Of a key in a store, between its slashes.
SEGMENT = "[A-Za-z0-9][A-Za-z0-9._-]*"

#: Of a dataclass that is read from outside, as a field of a model; its numbers are strict by type.
CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)


class Record(BaseModel):
    """What is read from outside: a key that it does not know, or another type, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Part(Record):
    """Some of a tensor's encoded bytes: what the codec calls it, its numbers, its size."""

    name: Annotated[str, Field(max_length=100)]
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32"]
    bytes: _Whole


class TensorRow(Record):
    """One tensor: `codec` indexes the manifest's codecs, `offset` counts payload bytes."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    shape: Annotated[list[_Whole], Field(max_length=8)]
    codec: Annotated[int, Field(ge=0, lt=64)]
    offset: _Whole
    parts: Annotated[list[Part], Field(max_length=64)]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


class Chunk(Record):
    """A run of payload bytes, an object of its own."""

    sha256: Sha256
    bytes: Annotated[int, Field(gt=0, le=LARGEST_CHUNK)]


class Header(Record):
    """Whose parcel it is.

    Attributes:
        run, round, silo: of the update; a state has no silo, and its round is the last merged.
        model: fingerprint of the model's names and shapes.
        base: sha256 of the state that an update was taken from, or that an outer update goes on
            top of; None for a state.
    """

    kind: Kind
    run: Annotated[str, Field(max_length=200)]
    round: _Whole
    silo: Annotated[str, Field(max_length=200)] | None = None
    model: Annotated[str, Field(max_length=100)]
    base: Annotated[str, Field(max_length=100)] | None = None


class Manifest(Record):
    """A parcel's table of contents. All of it is checked when it is read."""

    format: Literal["photon-link"] = FORMAT
    version: Literal[1] = VERSION
    header: Header
    codecs: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=64)]
    tensors: list[TensorRow]
    chunks: list[Chunk]

    @property
    def payload_bytes(self) -> int:
        return sum(chunk.bytes for chunk in self.chunks)

    def encoded(self) -> bytes:
        """As it is stored: JSON, sorted keys, no spaces."""
        record = self.model_dump(mode="json")
        return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Ref:
    """What travels in a task or receipt in place of tensors; bounds hold where it comes from there.

    Attributes:
        key: of the manifest, in the store.
        bytes: of the manifest.
        sha256: of the manifest, and through it of everything.
        payload_bytes: of the chunks.
    """

    __pydantic_config__ = CLOSED

    key: Annotated[str, Field(max_length=512, pattern=f"^{SEGMENT}(/{SEGMENT})*$")]
    bytes: Bytes
    sha256: Sha256
    payload_bytes: Bytes

    @property
    def wire_bytes(self) -> int:
        """All that moves."""
        return self.bytes + self.payload_bytes


@dataclass(frozen=True)
class Expected:
    """What the reader knows already; a manifest that says anything else is refused.

    Attributes:
        header: equal in every field.
        shapes: of each tensor, by name, all and no other.
        codecs: specs that may occur.
    """

    header: Header
    shapes: Mapping[str, Sequence[int]]
    codecs: frozenset[str]

    @property
    def most_manifest_bytes(self) -> int:
        """No manifest of such a model is longer."""
        names = sum(len(name) for name in self.shapes)
        values = sum(math.prod(shape) for shape in self.shapes.values())
        chunks = values * _MOST_PER_VALUE // SMALLEST_CHUNK + len(self.shapes) + 1
        return 20_000 + 6 * names + 2_000 * len(self.shapes) + 120 * chunks


def parse_manifest(data: bytes, key: str, expected: Expected) -> Manifest:
    """A manifest that is well formed, consistent in itself, and the expected one.

    Raises:
        ManifestError: it is not; names the key and the first thing that is wrong.
    """
    try:
        record = json.loads(data)
        version = record.get("version") if isinstance(record, dict) else None
        if version != VERSION:
            raise ManifestError(
                f"{key} is of wire format version {version!r}; this Photon reads version {VERSION}",
                hint="Install the same version of Photon on both sides.",
            )
        manifest = Manifest.model_validate(record)
    except (ValueError, RecursionError) as error:
        told = first_fault(error) if isinstance(error, ValidationError) else str(error)[:200]
        raise ManifestError(f"{key} is no manifest: {told}") from error
    problem = _problem(manifest, expected)
    if problem is not None:
        raise ManifestError(
            f"{key}: {problem}",
            hint="Nothing of it is used. Both sides must run the same version of Photon on the "
            "same run file, and answer the round's own task.",
        )
    return manifest


def _problem(manifest: Manifest, expected: Expected) -> str | None:
    """The first thing that is not as it must be."""
    for field, wanted in expected.header:
        found = getattr(manifest.header, field)
        if found != wanted:
            return f"{field} is {found!r}, expected {wanted!r}"
    unknown = sorted(set(manifest.codecs) - expected.codecs)
    if unknown:
        return f"codec {unknown[0]!r} is not the run's ({', '.join(sorted(expected.codecs))})"
    names = [row.name for row in manifest.tensors]
    if len(set(names)) != len(names):
        return "a tensor is listed twice"
    if set(names) != set(expected.shapes):
        odd = sorted(set(names) ^ set(expected.shapes))
        return f"{len(odd)} tensors are missing or unknown, {odd[0]!r} for one"
    return _size_problem(manifest, expected)


def _size_problem(manifest: Manifest, expected: Expected) -> str | None:
    offset = 0
    for row in manifest.tensors:
        shape = list(expected.shapes[row.name])
        if row.shape != shape:
            return f"tensor {row.name!r} has shape {row.shape}, expected {shape}"
        if row.codec >= len(manifest.codecs):
            return f"tensor {row.name!r} names codec {row.codec} of {len(manifest.codecs)}"
        if row.offset != offset:
            return f"tensor {row.name!r} is at offset {row.offset}, expected {offset}"
        most = _MOST_PER_VALUE * math.prod(shape) + _MOST_PER_TENSOR
        if row.bytes > most:
            return f"tensor {row.name!r} takes {row.bytes} bytes, at most {most} are plausible"
        for part in row.parts:
            if part.bytes % _DTYPE_BYTES[part.dtype]:
                return f"part {part.name!r} of {row.name!r} has {part.bytes} bytes of {part.dtype}"
        offset += row.bytes
    if manifest.payload_bytes != offset:
        return f"its chunks hold {manifest.payload_bytes} bytes, its tensors {offset}"
    return None


def shapes_fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """sha256 (hex) of names and shapes, in the order of names."""
    listed = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class Cutter:
    """Where chunks end in a stream of tensors.

    A chunk ends when it is full, and at a tensor's end once it holds SMALLEST_CHUNK.

    Args:
        chunk_bytes: of a full chunk, SMALLEST_CHUNK to LARGEST_CHUNK.
    """

    def __init__(self, chunk_bytes: int) -> None:
        if not SMALLEST_CHUNK <= chunk_bytes <= LARGEST_CHUNK:
            raise ValueError(
                f"chunks of {chunk_bytes} bytes; {SMALLEST_CHUNK} to {LARGEST_CHUNK} are allowed"
            )
        self._chunk_bytes = chunk_bytes
        self._open = 0

    def add(self, count: int) -> list[int]:
        """Sizes of the chunks that a tensor of so many bytes closes."""
        self._open += count
        closed = []
        while self._open >= self._chunk_bytes:
            closed.append(self._chunk_bytes)
            self._open -= self._chunk_bytes
        if self._open >= SMALLEST_CHUNK:
            closed.append(self.rest())
        return closed

    def rest(self) -> int:
        """Size of the chunk still open; 0 for none. It is closed now."""
        rest, self._open = self._open, 0
        return rest
