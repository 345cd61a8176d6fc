"""Token shards: flat little-endian files, an index of document ends, and manifests with hashes.

And shards one after another as one long run of tokens, read in place.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import DataError, DataNotFoundError, ShardCorruptError
from photon.store.disk import file_sha256, sync_to_disk

#: Version of the folder's layout.
FORMAT = 1
TRAIN, HELD_OUT = "train", "held_out"

#: Bytes of an index file before its numbers (NumPy's header is padded to 64).
_INDEX_HEADER = 128


@dataclass(frozen=True)
class Shard:
    """One token file and its index.

    Attributes:
        file: name in its folder; the index is the same name with ".ends.npy": uint64 [documents],
            where each document ends, in tokens from the start of the file.
        tokens: in the file, each document's end-of-text included.
        documents: in the file.
        bytes: UTF-8 bytes of the text they came from.
        sha256, index_sha256: of the two files.
    """

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        """Name of the index in the same folder."""
        return self.file.removesuffix(".bin") + ".ends.npy"

    @property
    def index_size(self) -> int:
        """Bytes of the index file."""
        return _INDEX_HEADER + 8 * self.documents


#: split -> source -> shards
Splits = dict[str, dict[str, list[Shard]]]


class ShardWriter:
    """Writes one source of one split into an existing folder, rolling over at `shard_tokens`.

    No file stays open between calls, so a thousand silos don't need a thousand descriptors.
    """

    def __init__(self, folder: Path, stem: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._stem = folder, stem
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self.shards: list[Shard] = []
        self._begin()

    def _begin(self) -> None:
        self._name = f"{self._stem}-{len(self.shards):05d}.bin"
        self._digest, self._pending = hashlib.sha256(), bytearray()
        self._ends: list[int] = []
        self._bytes = self._tokens = 0

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document (its end-of-text token included); `flush` puts it on disk."""
        self._pending += tokens.astype(self._dtype, copy=False).tobytes()
        self._tokens += len(tokens)
        self._bytes += text_bytes
        self._ends.append(self._tokens)
        if self._tokens >= self._shard_tokens:
            self.close()

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending:
            with (self._folder / self._name).open("ab") as file:
                file.write(self._pending)
            self._digest.update(self._pending)
            self._pending.clear()

    def close(self) -> None:
        """End the shard at hand; a later `add` begins the next."""
        if not self._ends:
            return
        self.flush()
        path = self._folder / self._name
        sync_to_disk(path)
        index = path.with_name(self._name.removesuffix(".bin") + ".ends.npy")
        # Not np.save(index): on a full disk its error has no errno, and nobody could tell.
        written = io.BytesIO()
        np.save(written, np.array(self._ends, dtype="<u8"))
        index.write_bytes(written.getvalue())
        sync_to_disk(index)
        self.shards.append(
            Shard(
                self._name,
                self._tokens,
                len(self._ends),
                self._bytes,
                self._digest.hexdigest(),
                file_sha256(index),
            )
        )
        self._begin()


def write_manifest(path: Path, record: Mapping[str, Any]) -> None:
    """JSON with sorted keys, shards as objects: the same record gives the same bytes."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, default=asdict) + "\n"
    # A file's name may hold bytes that are no UTF-8: as JSON's escapes they come back the same.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
    sync_to_disk(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest; errors name the file.

    Raises:
        DataNotFoundError: it is not there.
        ShardCorruptError: it is not JSON.
        DataError: it is of a format this version does not read.
    """
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataNotFoundError(
            f"{path} does not exist, so {path.parent} is not a prepared data folder",
            hint="Make one with `photon data prepare --input TEXT --out DIR`.",
        ) from None
    except (OSError, ValueError) as error:
        raise ShardCorruptError(
            f"can't read {path}: {error}",
            hint="Copy it again from where it was made, or prepare the data again.",
        ) from error
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != FORMAT:
        raise DataError(
            f"{path} has format {found!r}; this version of Photon reads format {FORMAT}",
            hint="Prepare the data again with this version, or use the version that made it.",
        )
    return record


def read_splits(record: Mapping[str, Any], path: Path) -> Splits:
    """The splits of a silo's manifest; ShardCorruptError if something lacks or can't be."""
    try:
        return {
            split: {
                source: [_shard(shard) for shard in shards] for source, shards in sources.items()
            }
            for split, sources in record["splits"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ShardCorruptError(f"{path} is damaged: {error}") from error


def _shard(record: Mapping[str, Any]) -> Shard:
    shard = Shard(**record)
    for name in ("tokens", "documents", "bytes"):
        value = getattr(shard, name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} = {value!r}")
    # A manifest may come from elsewhere: a name must not lead out of its folder.
    if Path(shard.file).name != shard.file or not shard.file.endswith(".bin"):
        raise ValueError(f"file = {shard.file!r}")
    return shard


class TokenRun:
    """The tokens of some shards of a folder, end to end; nothing is opened before it is read."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
        self._folder, self._shards, self._dtype = folder, list(shards), dtype
        self._starts = [0, *accumulate(shard.tokens for shard in self._shards)]
        self._maps: dict[int, np.ndarray] = {}
        self._ends: np.ndarray | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens start .. start + len(out) - 1 into `out`; shard borders don't matter."""
        done = 0
        which = bisect_right(self._starts, start) - 1
        while done < len(out):
            offset = start + done - self._starts[which]
            part = self._tokens_of(which)[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            which += 1

    def document_of(self, start: int, count: int) -> np.ndarray:
        """int64 [count]: number of the document that tokens start .. start + count - 1 are of."""
        if self._ends is None:
            parts = [
                np.load(self._folder / shard.index_file) + np.uint64(first)
                for shard, first in zip(self._shards, self._starts, strict=False)
            ]
            self._ends = np.concatenate(parts)
        positions = np.arange(start, start + count, dtype=np.uint64)
        return np.searchsorted(self._ends, positions, side="right")

    def close(self) -> None:
        """Unmap the shards; a later read maps them again."""
        self._maps.clear()
        self._ends = None

    def _tokens_of(self, which: int) -> np.ndarray:
        if which not in self._maps:
            path = self._folder / self._shards[which].file
            # As a plain array: slicing a memmap costs several times as much.
            self._maps[which] = np.asarray(np.memmap(path, dtype=self._dtype, mode="r"))
        return self._maps[which]
