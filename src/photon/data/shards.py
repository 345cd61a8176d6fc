"""Token shards: flat little-endian files, an index of document ends, and manifests with hashes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import DataNotFoundError, ShardCorruptError

FORMAT = 1
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class Shard:
    """One token file and its index.

    Attributes:
        file: name in its folder; the index is the same name with ".ends.npy".
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
        return self.file.removesuffix(".bin") + ".ends.npy"


#: split -> source -> shards
Splits = dict[str, dict[str, list[Shard]]]


class ShardWriter:
    """Writes one source of one split, rolling over at `shard_tokens`.

    Args:
        folder: where shards go; exists.
        stem: file names start with it.
        dtype: uint16 or uint32, little-endian.
        shard_tokens: a shard is closed once it holds as many.
    """

    def __init__(self, folder: Path, stem: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._stem = folder, stem
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self.shards: list[Shard] = []
        self._file: Any = None

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document (its end-of-text token included)."""
        if self._file is None:
            self._name = f"{self._stem}-{len(self.shards):05d}.bin"
            self._file = (self._folder / self._name).open("wb")
            self._digest, self._ends, self._bytes, self._tokens = hashlib.sha256(), [], 0, 0
        raw = tokens.astype(self._dtype, copy=False).tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._tokens += len(tokens)
        self._bytes += text_bytes
        self._ends.append(self._tokens)
        if self._tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        index = self._folder / (self._name.removesuffix(".bin") + ".ends.npy")
        np.save(index, np.array(self._ends, dtype="<u8"))
        self.shards.append(
            Shard(
                self._name,
                self._tokens,
                len(self._ends),
                self._bytes,
                self._digest.hexdigest(),
                sha256_of(index),
            )
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def splits_record(splits: Splits) -> dict[str, Any]:
    return {
        split: {source: [asdict(shard) for shard in shards] for source, shards in sources.items()}
        for split, sources in splits.items()
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest; errors name the file.

    Raises:
        DataNotFoundError: it is not there.
        ShardCorruptError: it is not JSON, or of a format this version does not read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataNotFoundError(
            f"{path} does not exist, so {path.parent} is not a prepared data folder",
            hint="Make one with `photon data prepare --input TEXT --out DIR`.",
        ) from None
    except (OSError, ValueError) as error:
        raise ShardCorruptError(f"can't read {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ShardCorruptError(
            f"{path} has format {found!r}, this Photon reads format {FORMAT}",
            hint="Prepare the data again with this version.",
        )
    return record


def read_splits(record: dict[str, Any], path: Path) -> Splits:
    try:
        return {
            split: {
                source: [Shard(**shard) for shard in shards] for source, shards in sources.items()
            }
            for split, sources in record["splits"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardCorruptError(f"{path} is damaged: {error}") from error
