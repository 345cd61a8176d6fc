"""Named tensors as a parcel in a store: chunks first, then the manifest that promises them.

Both ways go tensor by tensor: neither holds the payload in memory as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from photon.compression import Parts, build_codec
from photon.errors import ManifestError
from photon.link.manifest import (
    Chunk,
    Cutter,
    Expected,
    Header,
    Manifest,
    Part,
    Ref,
    TensorRow,
    parse_manifest,
)
from photon.store.contract import Buffer, FolderStore
from photon.store.memory import ReusedMemory
from photon.store.transfer import Wanted

DEFAULT_CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """An encoded tensor.

    Attributes:
        name: in the state.
        shape: of the tensor.
        codec: spec of what encoded it.
        parts: what the codec made of it.
    """

    name: str
    shape: Sequence[int]
    codec: str
    parts: Parts

    def decoded(self) -> Tensor:
        """fp32, in its shape."""
        return build_codec(self.codec).decode(self.parts, self.shape)


class Carrier(Protocol):
    """Moves objects to and from a store; photon.store.transfer.Transfer is one."""

    def send(self, objects: Iterable[tuple[str, Buffer]]) -> object: ...

    def fetch(self, wanted: Iterable[Wanted], *, spool: Path | None = None) -> Iterator[Buffer]: ...


def write_parcel(
    carrier: Carrier,
    folder: str,
    header: Header,
    entries: Iterable[Entry],
    *,
    chunk_bytes: int = DEFAULT_CHUNK,
) -> Ref:
    """Send a parcel; when this returns, all of it is in the store.

    Chunks lie under FOLDER/chunks/<sha256>, so one that is there already is not sent again; the
    manifest is FOLDER/<kind>/round-000012/<silo>.json, or <sha256>.json for what has no silo.

    Args:
        entries: read one at a time, as chunks are sent.

    Raises:
        LinkError: the store can't be reached, refuses, or stalls.
    """
    writer = _Writer(folder, chunk_bytes)
    carrier.send(writer.chunks(entries))
    manifest = writer.manifest(header)
    data = manifest.encoded()
    digest = hashlib.sha256(data).hexdigest()
    if header.silo is not None:
        key = update_keys(folder, header.round, header.silo)[1].format(sha256=digest)
    else:  # its hash is in the name, as keys are never written twice
        key = f"{folder}/{header.kind}/round-{header.round:06d}/{digest}.json"
    carrier.send([(key, data)])
    return Ref(key, len(data), digest, manifest.payload_bytes)


def update_keys(folder: str, number: int, silo: str) -> tuple[str, str]:
    """Where the chunks and the manifest of a silo's update lie, for str.format(sha256=...)."""
    manifest = f"{folder}/update/round-{number:06d}/{silo}-{{sha256:.16}}.json"
    return chunk_key(folder, "{sha256}"), manifest


def chunk_key(folder: str, sha256: str) -> str:
    """Where a chunk lies."""
    return f"{folder}/chunks/{sha256}"


def entries_bytes(header: Header, entries: Iterable[Entry], chunk_bytes: int) -> int:
    """What a parcel of these entries takes on the wire, manifest and all, to the byte.

    Nothing is sent, and no part is looked at but for its size.
    """
    writer = _Writer("", chunk_bytes)
    writer.sent = [Chunk(sha256="0" * 64, bytes=size) for size in writer.sizes(entries)]
    manifest = writer.manifest(header)
    return len(manifest.encoded()) + manifest.payload_bytes


def plain_bytes(header: Header, shapes: Mapping[str, Sequence[int]], chunk_bytes: int) -> int:
    """What a parcel of fp32 tensors of these shapes takes on the wire."""
    entries = (
        Entry(name, shape, "fp32", {"values": torch.empty(tuple(shape), device="meta")})
        for name, shape in shapes.items()
    )
    return entries_bytes(header, entries, chunk_bytes)


class _Writer:
    """Cuts entries into chunks, and keeps the rows of the manifest."""

    def __init__(self, folder: str, chunk_bytes: int) -> None:
        self._folder = folder
        self._cutter = Cutter(chunk_bytes)
        self._open: list[memoryview] = []
        self._offset = 0
        self._codecs: dict[str, int] = {}
        self._rows: list[TensorRow] = []
        self.sent: list[Chunk] = []

    def manifest(self, header: Header) -> Manifest:
        return Manifest(
            header=header, codecs=list(self._codecs), tensors=self._rows, chunks=self.sent
        )

    def chunks(self, entries: Iterable[Entry]) -> Iterator[tuple[str, Buffer]]:
        yield from map(self._cut, self.sizes(map(self._opened, entries)))

    def sizes(self, entries: Iterable[Entry]) -> Iterator[int]:
        """Bytes of each chunk, as soon as entries fill it."""
        for entry in entries:
            row = TensorRow(
                name=entry.name,
                shape=list(entry.shape),
                codec=self._codecs.setdefault(entry.codec, len(self._codecs)),
                offset=self._offset,
                parts=_parts(entry),
            )
            self._rows.append(row)
            self._offset += row.bytes
            yield from self._cutter.add(row.bytes)
        if rest := self._cutter.rest():
            yield rest

    def _opened(self, entry: Entry) -> Entry:
        self._open += [bytes_of(part) for part in entry.parts.values() if part.nbytes]
        return entry

    def _cut(self, size: int) -> tuple[str, Buffer]:
        taken, left = [], size
        while left:
            view = self._open.pop(0)
            taken.append(view[:left])
            if len(view) > left:
                self._open.insert(0, view[left:])
            left -= len(taken[-1])
        data = taken[0] if len(taken) == 1 else b"".join(taken)
        digest = hashlib.sha256(data).hexdigest()
        self.sent.append(Chunk(sha256=digest, bytes=size))
        return chunk_key(self._folder, digest), data


class Parcel:
    """A parcel open for reading: its manifest is here and checked, its chunks are not yet.

    Args:
        carrier: to the store.
        ref: from a task or receipt.
        expected: what the manifest must say.
        memory: for what is decoded, tensors that span chunks, and chunks that are kept here; None
            takes it from the heap.

    Raises:
        ManifestError: it says something else, or is none.
        ChunkCorruptError: it is not the one that `ref` promises.
        LinkError: the store can't be reached, or has no such object.
    """

    def __init__(
        self,
        carrier: Carrier,
        ref: Ref,
        expected: Expected,
        memory: ReusedMemory | None = None,
    ) -> None:
        if ref.bytes > expected.most_manifest_bytes:
            raise ManifestError(
                f"{ref.key} has {ref.bytes} bytes; a manifest of this model has at most "
                f"{expected.most_manifest_bytes}"
            )
        self._carrier = carrier
        self._folder = ref.key.rsplit("/" + expected.header.kind + "/", 1)[0]
        (data,) = carrier.fetch([Wanted(ref.key, ref.bytes, ref.sha256)])
        self.manifest = parse_manifest(bytes(data), ref.key, expected)
        if self.manifest.payload_bytes != ref.payload_bytes:
            raise ManifestError(
                f"{ref.key}: its chunks hold {self.manifest.payload_bytes} bytes, the receipt says "
                f"{ref.payload_bytes}"
            )
        self._codecs = [build_codec(spec) for spec in self.manifest.codecs]
        self._kept: FolderStore | None = None
        self._memory = memory

    def keep(self, folder: Path) -> None:
        """Bring all chunks here, verified; they are read from here from now on, and not again.

        Args:
            folder: of this process alone. What an earlier attempt left in it is not fetched again.

        Raises:
            ChunkCorruptError: bytes are not those promised.
            LinkError: the store can't be reached, or lacks a chunk.
        """
        for _ in self._carrier.fetch(self._wanted(), spool=folder):
            pass
        self._kept = FolderStore(folder, durable=False, memory=self._memory)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Decoded, fp32, one at a time.

        Raises:
            ChunkCorruptError: bytes are not those promised.
            ManifestError: a codec can't read its parts.
        """
        stream = _Stream(self._chunks(), self._memory)
        for row in self.manifest.tensors:
            parts = {}
            for part in row.parts:
                raw = stream.read(part.bytes)
                parts[part.name] = raw.view(getattr(torch, part.dtype))
            yield row.name, self._decoded(row, parts)

    def _decoded(self, row: TensorRow, parts: Parts) -> Tensor:
        try:
            return self._codecs[row.codec].decode(parts, row.shape, self._empty)
        except ValueError as error:
            spec = self.manifest.codecs[row.codec]
            raise ManifestError(
                f"tensor {row.name!r} can't be decoded by {spec}: {error}",
                hint="The sender is of another version, or means harm; its parcel is not used.",
            ) from error

    def _empty(self, count: int) -> Tensor:
        return _room(self._memory, 4 * count).view(torch.float32)

    def _wanted(self) -> list[Wanted]:
        return [
            Wanted(chunk_key(self._folder, chunk.sha256), chunk.bytes, chunk.sha256)
            for chunk in self.manifest.chunks
        ]

    def _chunks(self) -> Iterator[Buffer]:
        if self._kept is not None:
            for chunk in self.manifest.chunks:
                yield self._kept.get(chunk.sha256, max_bytes=chunk.bytes)
        else:
            yield from self._carrier.fetch(self._wanted())


class _Stream:
    """Bytes out of chunks that come one after another."""

    def __init__(self, chunks: Iterator[Buffer], memory: ReusedMemory | None) -> None:
        self._chunks = chunks
        self._memory = memory
        self._chunk: Buffer = b""
        self._at = 0
        self._writable = False

    def read(self, count: int) -> Tensor:
        """uint8 [count], aligned for any dtype; in the chunk's own memory where that will do."""
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        if self._at == len(self._chunk):
            self._next()
        whole = count <= len(self._chunk) - self._at
        if whole and self._writable and self._at % 8 == 0:
            self._at += count
            return torch.frombuffer(
                self._chunk, dtype=torch.uint8, count=count, offset=self._at - count
            )
        room = _room(self._memory, count)
        into, done = room.numpy(), 0
        while done < count:
            if self._at == len(self._chunk):
                self._next()
            some = np.frombuffer(self._chunk, np.uint8)[self._at : self._at + count - done]
            into[done : done + len(some)] = some  # NumPy's lets other threads run meanwhile
            self._at += len(some)
            done += len(some)
        return room

    def _next(self) -> None:
        self._chunk, self._at = next(self._chunks), 0
        self._writable = not memoryview(self._chunk).readonly


def _room(memory: ReusedMemory | None, size: int) -> Tensor:
    """uint8 [size], uninitialised."""
    if memory is None or not size:
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(memory.take(size), dtype=torch.uint8)


def plain_entries(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Entry]:
    """Tensors as they are, in fp32."""
    codec = build_codec("fp32")
    for name, tensor in tensors:
        yield Entry(name, tensor.shape, "fp32", codec.encode(tensor))


def _parts(entry: Entry) -> list[Part]:
    return [
        Part(name=name, dtype=str(part.dtype).removeprefix("torch."), bytes=part.nbytes)  # pyright: ignore[reportArgumentType]
        for name, part in entry.parts.items()
    ]


def bytes_of(part: Tensor) -> memoryview:
    """A part's own bytes, where they lie."""
    return part.contiguous().flatten().view(torch.uint8).numpy().data
