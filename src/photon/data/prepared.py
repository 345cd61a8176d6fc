"""A prepared data folder, opened: silos, held-out sets, tokenizer; every file checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from photon.data.shards import (
    HELD_OUT,
    TRAIN,
    Shard,
    Splits,
    read_manifest,
    read_splits,
    sha256_of,
)
from photon.errors import EmptySiloError, ShardCorruptError, VocabularyMismatchError


@dataclass(frozen=True)
class TextSet:
    """A folder of shards: a silo's, or the global held-out set.

    Attributes:
        name: of the silo; "held_out" for the global set.
    """

    name: str
    path: Path
    splits: Splits

    def shards(self, split: str) -> list[Shard]:
        return [shard for shards in self.splits.get(split, {}).values() for shard in shards]

    def count(self, split: str, what: str) -> int:
        """Sum of "tokens", "documents" or "bytes" over a split."""
        return sum(getattr(shard, what) for shard in self.shards(split))

    @property
    def train_tokens(self) -> int:
        return self.count(TRAIN, "tokens")

    @property
    def sources(self) -> list[str]:
        return sorted(self.splits.get(TRAIN, {}))


@dataclass(frozen=True)
class PreparedData:
    """What `photon data prepare` made.

    Attributes:
        sha256: identifies all shards and the tokenizer.
        dtype: of the token files, little-endian.
    """

    path: Path
    silos: Mapping[str, TextSet]
    held_out: TextSet
    tokenizer_file: Path
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: np.dtype
    sha256: str

    def text_sets(self) -> Iterator[TextSet]:
        yield from self.silos.values()
        yield self.held_out

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every file's sha256 and every token id.

        Args:
            progress: told files done and files in all.

        Raises:
            ShardCorruptError: a hash is not the manifest's.
            VocabularyMismatchError: a token id is outside the tokenizer's vocabulary.
        """
        files = [
            (text_set, shard)
            for text_set in self.text_sets()
            for split in text_set.splits
            for shard in text_set.shards(split)
        ]
        _require_hash(self.tokenizer_file, self.tokenizer_sha256)
        for done, (text_set, shard) in enumerate(files, start=1):
            path = text_set.path / shard.file
            _require_hash(path, shard.sha256)
            _require_hash(text_set.path / shard.index_file, shard.index_sha256)
            top = int(np.memmap(path, dtype=self.dtype, mode="r").max())
            if top >= self.vocab_size:
                raise VocabularyMismatchError(
                    f"{path} holds token id {top}, but {self.tokenizer_file} has "
                    f"{self.vocab_size} tokens",
                    hint="These shards were made with another tokenizer; prepare the data again.",
                )
            if progress is not None:
                progress(done, len(files))


def open_data(path: str | os.PathLike[str]) -> PreparedData:
    """Open a folder made by `photon data prepare`; checks that every file is there and whole.

    Raises:
        DataNotFoundError: no such folder, or not a prepared one.
        ShardCorruptError: a manifest or file is damaged, truncated or missing.
        EmptySiloError: there is no silo, or one without training text.
    """
    root = Path(path).resolve()
    manifest = root / "manifest.json"
    record = read_manifest(manifest)
    try:
        tokenizer = record["tokenizer"]
        dtype = np.dtype(record["dtype"])
        names: dict[str, str] = record["silos"]
        held_out_sha256 = record["held_out"]
        opened = PreparedData(
            path=root,
            silos={
                name: _open_set(name, root / "silos" / name, names[name]) for name in sorted(names)
            },
            held_out=_open_set(HELD_OUT, root / HELD_OUT, held_out_sha256),
            tokenizer_file=root / "tokenizer" / "tokenizer.json",
            tokenizer_sha256=tokenizer["sha256"],
            vocab_size=int(tokenizer["vocab_size"]),
            eos_id=int(tokenizer["eos_id"]),
            dtype=dtype,
            sha256=sha256_of(manifest),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ShardCorruptError(f"{manifest} is damaged: {error!r}") from error
    if not opened.silos:
        raise EmptySiloError(f"{root} holds no silo", hint="Prepare the data again.")
    if not opened.tokenizer_file.is_file():
        raise ShardCorruptError(f"{opened.tokenizer_file} is missing")
    for text_set in opened.text_sets():
        _require_files(text_set, dtype)
    for silo in opened.silos.values():
        if silo.train_tokens == 0:
            raise EmptySiloError(
                f"silo {silo.name!r} in {root} has no training text",
                hint="Give it documents, or prepare the data without it.",
            )
    return opened


def _open_set(name: str, folder: Path, expected: str) -> TextSet:
    path = folder / "manifest.json"
    record = read_manifest(path)
    _require_hash(path, expected)
    return TextSet(name, folder, read_splits(record, path))


def _require_files(text_set: TextSet, dtype: np.dtype) -> None:
    for split in text_set.splits:
        for shard in text_set.shards(split):
            path = text_set.path / shard.file
            expected = shard.tokens * dtype.itemsize
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ShardCorruptError(
                    f"{path} {state}, its manifest says {expected} bytes ({shard.tokens} tokens)",
                    hint="Copy it again from where it was made, or prepare the data again.",
                )
            if not (text_set.path / shard.index_file).is_file():
                raise ShardCorruptError(f"{text_set.path / shard.index_file} is missing")


def _require_hash(path: Path, expected: str) -> None:
    found = sha256_of(path) if path.is_file() else "nothing (the file is missing)"
    if found != expected:
        raise ShardCorruptError(
            f"{path} has sha256 {found[:12]}..., its manifest says {expected[:12]}...",
            hint="It changed since it was made; copy it again or prepare the data again.",
        )
