"""Encoded tensors in a file, between processes of one machine: written as they come, read in place.

Nothing is hashed: whoever could change the file could change the process that reads it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from photon.link.parcel import Entry, bytes_of
from photon.store.disk import writing

#: Parts begin at multiples of this, so that they can be read as any dtype where they lie.
_ALIGNMENT = 8


@dataclass(frozen=True)
class _Part:
    name: str
    dtype: torch.dtype
    count: int
    offset: int


@dataclass(frozen=True)
class EntryFile:
    """A file of entries, open to whoever has this; what was read changes if it is written over.

    Attributes:
        path: of the parts, one after another.
        rows: of each entry, its name, shape and codec, and where its parts lie.
    """

    path: Path
    rows: list[tuple[str, tuple[int, ...], str, list[_Part]]] = field(default_factory=list)

    @classmethod
    def of_plain(cls, path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> EntryFile:
        """Write tensors in fp32, without a look at their values; as `write` otherwise."""
        plain = ((name, one.to("cpu", torch.float32)) for name, one in tensors)
        entries = (Entry(name, one.shape, "fp32", {"values": one}) for name, one in plain)
        return cls.write(path, entries)

    @classmethod
    def write(cls, path: Path, entries: Iterable[Entry]) -> EntryFile:
        """Write entries to `path`, one in memory at a time.

        A file that is there is written over, which is five times as fast: it has its pages.

        Raises:
            DiskFullError: no room.
        """
        written = cls(path)
        mode = "r+b" if path.exists() else "wb"
        with writing("an update or a version", path), path.open(mode) as file:
            for entry in entries:
                parts = []
                for name, part in entry.parts.items():
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    parts.append(_Part(name, part.dtype, part.numel(), file.tell()))
                    file.write(bytes_of(part))
                written.rows.append((entry.name, tuple(entry.shape), entry.codec, parts))
            file.write(b"\0")  # no file is empty, as none can be mapped
        return written

    def read(self) -> list[Entry]:
        """The entries; their bytes come from the file as they are looked at."""
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

        def tensor(part: _Part) -> torch.Tensor:
            if not part.count:
                return torch.empty(0, dtype=part.dtype)
            dtype, count, offset = part.dtype, part.count, part.offset
            return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)

        return [
            Entry(name, shape, codec, {part.name: tensor(part) for part in parts})
            for name, shape, codec, parts in self.rows
        ]
