"""A prepared data folder, opened: silos, held-out sets, tokenizer; every file checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from photon.data.shards import HELD_OUT, TRAIN, Shard, Splits, read_manifest, read_splits
from photon.errors import (
    DataNotFoundError,
    EmptySiloError,
    MachineError,
    ShardCorruptError,
    VocabularyMismatchError,
)
from photon.store.disk import file_sha256

_AGAIN = "Copy it again from where it was made, or prepare the data again."
#: In place of a tokenizer's hash, where each silo has one of its own.
OWN = "own"
_CHUNK_BYTES = 1 << 22
_DTYPES = ("<u2", "<u4")


def _total(what: str, *splits: str) -> property:
    """A sum over the shards of some splits, as a property of SiloData."""
    return property(
        lambda part: sum(getattr(shard, what) for split in splits for shard in part.shards(split))
    )


@dataclass(frozen=True)
class SiloData:
    """A folder of shards: a silo's, or the global held-out set.

    Attributes:
        name: of the silo; "held_out" for the global set.
        path: its folder.
        splits: "train" and "held_out", each by source; the global set has no "train".
        tokenizer_file, tokenizer_sha256: of what cut it: the folder's, or the silo's own.
    """

    name: str
    path: Path
    splits: Splits
    tokenizer_file: Path
    tokenizer_sha256: str

    def shards(self, split: str) -> list[Shard]:
        """Shards of a split, source by source in the order of their names."""
        sources = self.splits.get(split, {})
        return [shard for source in sorted(sources) for shard in sources[source]]

    #: Tokens to train on, end-of-text included; documents; UTF-8 bytes of their text.
    train_tokens = _total("tokens", TRAIN)
    train_documents = _total("documents", TRAIN)
    train_bytes = _total("bytes", TRAIN)
    #: The same of held-out text.
    held_out_tokens = _total("tokens", HELD_OUT)
    held_out_documents = _total("documents", HELD_OUT)
    held_out_bytes = _total("bytes", HELD_OUT)
    #: The same of both splits.
    tokens = _total("tokens", TRAIN, HELD_OUT)
    documents = _total("documents", TRAIN, HELD_OUT)
    bytes = _total("bytes", TRAIN, HELD_OUT)

    @property
    def sources(self) -> list[str]:
        """Names of the sources to train on, sorted."""
        return sorted(self.splits.get(TRAIN, {}))


@dataclass(frozen=True, repr=False)
class PreparedData:
    """What `photon data prepare` made.

    Attributes:
        path: its folder.
        silos: by name, sorted; none where all text is held out.
        held_out: the global held-out set; empty where silos have vocabularies of their own.
        tokenizer_file: tokenizer.json; its folder is what transformers reads.
        tokenizer_sha256: of that file; OWN where there is none but those of SiloData.
        vocab_size: every token id is below it.
        eos_id: the token that ends each document.
        dtype: of the token files, little-endian.
        sha256: of manifest.json, which holds or leads to every other hash: identifies the data set.
        remarks: what `prepare` thinks its user should know, in words.
    """

    path: Path
    silos: Mapping[str, SiloData]
    held_out: SiloData
    tokenizer_file: Path
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: np.dtype
    sha256: str
    remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        silos = ", ".join(f"{name}: {one.train_tokens:,}" for name, one in self.silos.items())
        return f"PreparedData({str(self.path)!r}, tokens of silos {{{silos[:200]}}})"

    @property
    def own_vocabularies(self) -> bool:
        """Whether a token id means something else in each silo."""
        return self.tokenizer_sha256 == OWN

    @property
    def tokenizers(self) -> dict[Path, str]:
        """sha256 of each tokenizer.json that cut something here."""
        return {one.tokenizer_file: one.tokenizer_sha256 for one in self.sets() if one.splits}

    def silo(self, name: str) -> SiloData:
        """One by its name; raises EmptySiloError where there is none of it."""
        if name not in self.silos:
            raise EmptySiloError(
                f"no silo named {name!r} in {self.path}",
                hint=f"Its silos: {', '.join(self.silos)}.",
            )
        return self.silos[name]

    def sets(self) -> Iterator[SiloData]:
        """The silos, then the global held-out set."""
        yield from self.silos.values()
        yield self.held_out

    def shards(self) -> Iterator[tuple[Path, Shard]]:
        """All of them, each with its folder."""
        for part in self.sets():
            for split in part.splits:
                yield from ((part.path, shard) for shard in part.shards(split))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every file's sha256 and every token id, a few megabytes in memory at a time.

        Args:
            progress: told files done and files in all.

        Raises:
            ShardCorruptError: a hash of a shard or of the tokenizer is not the manifest's.
            VocabularyMismatchError: a token id is outside the tokenizer's vocabulary.
            MachineError: a file can't be read.
        """
        files = list(self.shards())
        with _in_words(self.path):
            for file, sha256 in self.tokenizers.items():
                _require_same(file, sha256)
            for done, (folder, shard) in enumerate(files, start=1):
                path = folder / shard.file
                found, top = _read_through(path, self.dtype)
                _require_same(path, shard.sha256, found)
                _require_same(folder / shard.index_file, shard.index_sha256)
                if top >= self.vocab_size:
                    raise VocabularyMismatchError(
                        f"{path} holds token id {top}, but the vocabulary in {self.path} has "
                        f"{self.vocab_size} tokens (0 to {self.vocab_size - 1})",
                        hint="These shards were made with another tokenizer; prepare the data "
                        "again.",
                    )
                if progress is not None:
                    progress(done, len(files))


def open_data(
    path: str | os.PathLike[str], *, only_to_score: bool = False, own_vocabularies: bool = False
) -> PreparedData:
    """Open a folder made by `photon data prepare`; checks that every file is there and whole.

    Sizes are checked, and the hashes of manifests; `PreparedData.verify` checks the rest.

    Args:
        path: the folder; "~" is a home.
        only_to_score: nothing is trained, so a folder without silos (--held-out-only) will do.
        own_vocabularies: a folder with one for each silo (--own-vocabulary) will do.

    Raises:
        DataNotFoundError: no such folder, or not a prepared one.
        DataError: of a format this version does not read.
        ShardCorruptError: a manifest or file is damaged, truncated or missing.
        VocabularyMismatchError: a silo's tokens were made with another tokenizer, or may be.
        EmptySiloError: there is no silo, or one without training text.
        MachineError: it may not be read.
    """
    with _in_words(path):
        root = Path(os.path.realpath(Path(path).expanduser()))
        if not root.exists():
            raise DataNotFoundError(
                f"no prepared data at {path}",
                hint="Make it with `photon data prepare --input TEXT --out DIR`, or correct the "
                "path.",
            )
        manifest = root / "manifest.json"
        record = read_manifest(manifest)
        try:
            tokenizer: Mapping[str, Any] = record["tokenizer"]
            made_with = tokenizer["sha256"]
            names: Mapping[str, Any] = record["silos"]
            if record["dtype"] not in _DTYPES:
                raise ValueError(f"dtype = {record['dtype']!r}, not one of {', '.join(_DTYPES)}")
            opened = PreparedData(
                path=root,
                silos={
                    name: _open_set(name, root / "silos" / name, names[name], root, made_with)
                    for name in sorted(names)
                },
                held_out=_open_set(HELD_OUT, root / HELD_OUT, record["held_out"], root, made_with),
                tokenizer_file=root / "tokenizer" / "tokenizer.json",
                tokenizer_sha256=made_with,
                vocab_size=int(tokenizer["vocab_size"]),
                eos_id=int(tokenizer["eos_id"]),
                dtype=np.dtype(record["dtype"]),
                sha256=file_sha256(manifest),
                remarks=tuple(record.get("remarks", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardCorruptError(f"{manifest} is damaged: {error!r}", hint=_AGAIN) from error
        if opened.own_vocabularies and not own_vocabularies:
            raise VocabularyMismatchError(
                f"each silo in {root} has a vocabulary of its own, and this takes one for all",
                hint="That is text for `photon simulate`; prepare it without --own-vocabulary.",
            )
        _require_whole(opened, only_to_score)
        return opened


@contextmanager
def _in_words(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says of a folder that it won't read, as an error of Photon's."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"can't read the prepared data at {path}: {error.strerror}: {error.filename}",
            hint="Correct the path, or make it readable.",
        ) from error


def _open_set(name: str, folder: Path, entry: Any, root: Path, tokenizer_sha256: str) -> SiloData:
    if Path(name).name != name:
        raise ValueError(f"silo {name!r}")
    # The first folders of this format gave the bare hash, without a summary beside it.
    expected = entry if isinstance(entry, str) else entry["sha256"]
    path = folder / "manifest.json"
    if not path.is_file():
        raise ShardCorruptError(f"{path} is missing", hint=_AGAIN)
    _require_same(path, expected)
    record = read_manifest(path)
    if tokenizer_sha256 not in (OWN, record.get("tokenizer_sha256")):
        raise VocabularyMismatchError(
            f"the tokens of {path} were made with the tokenizer "
            f"{str(record.get('tokenizer_sha256'))[:12]}..., the folder's is "
            f"{tokenizer_sha256[:12]}...",
            hint="Silos of one folder share a tokenizer; prepare the data again.",
        )
    file = (folder if tokenizer_sha256 == OWN else root) / "tokenizer" / "tokenizer.json"
    return SiloData(name, folder, read_splits(record, path), file, record["tokenizer_sha256"])


def _require_whole(data: PreparedData, only_to_score: bool) -> None:
    if not (data.silos or only_to_score):
        raise EmptySiloError(
            f"{data.path} holds no silo: its text is held out to score models with",
            hint="Prepare text to train on without --held-out-only.",
        )
    if lost := [file for file in data.tokenizers if not file.is_file()]:
        raise ShardCorruptError(f"{lost[0]} is missing", hint=_AGAIN)
    for folder, shard in data.shards():
        size = shard.tokens * data.dtype.itemsize
        _require_size(folder / shard.file, size, f"{shard.tokens} tokens")
        _require_size(folder / shard.index_file, shard.index_size, f"{shard.documents} documents")
    for silo in data.silos.values():
        if silo.train_tokens == 0:
            raise EmptySiloError(
                f"silo {silo.name!r} in {data.path} has no training text",
                hint="Give it documents, or prepare the data without it.",
            )


def _require_size(path: Path, expected: int, what: str) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes"
        raise ShardCorruptError(
            f"{path} {state}, its manifest says {expected} bytes ({what})", hint=_AGAIN
        )


def _require_same(path: Path, expected: str, found: str | None = None) -> None:
    """Refuse a file of another sha256 than its manifest says; read for it unless it was already."""
    found = found or file_sha256(path)
    if found != expected:
        raise ShardCorruptError(
            f"{path} has sha256 {found[:12]}..., its manifest says {expected[:12]}...",
            hint="It changed since it was made. " + _AGAIN,
        )


def _read_through(path: Path, dtype: np.dtype) -> tuple[str, int]:
    """(sha256, largest token id) of a token file."""
    digest, top = hashlib.sha256(), -1
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            whole = np.frombuffer(chunk, dtype=dtype, count=len(chunk) // dtype.itemsize)
            top = max(top, int(whole.max(initial=0)))
    return digest.hexdigest(), top
