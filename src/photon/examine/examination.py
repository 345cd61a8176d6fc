"""One silo's text, examined document by document, and the record of what may leave."""

import functools
import multiprocessing
import secrets
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from photon.data import PreparedData, SiloData
from photon.data.shards import HELD_OUT, TRAIN
from photon.data.tokenizer import read_tokenizer
from photon.errors import DataError, EmptySiloError
from photon.examine import cells
from photon.examine.cells import LEAST_CELL, MOST_CELL, Name, Table
from photon.examine.detect import FOUND, NOT, detect, method, tables
from photon.examine.signatures import BANDS, Signer, alike, key_name, words_of
from photon.membership.records import Sha256
from photon.store.disk import file_sha256

COPIES, SEEN = ["alone", "copy of an earlier one"], ["apart", "in training text"]
#: Tables of held-out documents; all others are of documents to train on.
_HELD = ("held out by the silo", "global held-out set")
#: Characters that are looked at at a time, and tokens that a process is given.
_PIECE, _BATCH_TOKENS = 1 << 20, 1 << 20
_Silo = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,200}\z")]
_Counts = Counter[tuple[str, str]]
_Text = tuple[PreparedData, SiloData, str]  # whose, and which split of it
_Batch = tuple[Path, list[int]]  # a shard, and where in it documents begin; at last, where one ends
_Progress = Callable[[str, int, int], None]


class Examination(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Counts that `photon.examine.cells` lets out; a table that is absent may not leave.

    method is the detectors, documents those to train on; held_out_sha256 is the manifest of the
    global held-out set that was looked for; losses are nats a token on probe texts, by group; key
    is the sites' key by name, and signatures_sha256 the file beside, None without.
    """

    format: Literal[1] = 1
    method: Annotated[str, Field(max_length=100)]
    silo: _Silo
    data_sha256: Sha256
    folder_sha256: Sha256
    min_cell: Annotated[int, Field(ge=LEAST_CELL, le=MOST_CELL)]
    documents: cells.Count
    tables: Annotated[dict[Name, Table], Field(max_length=200)]
    held_out_sha256: Sha256
    losses: Annotated[dict[_Silo, Annotated[float, Field(ge=0, lt=1e4)]], Field(max_length=1000)]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}\z")] | None = None
    signatures_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _possible(self) -> "Examination":
        for name, table in self.tables.items():
            counts = [*table.cells.values(), *[table.joined_documents] * bool(table.joined)]
            if min(counts, default=0) < self.min_cell:
                raise ValueError(f"{name} has a count below the cell size of {self.min_cell}")
            if name not in _HELD and sum(counts) != self.documents:
                raise ValueError(f"{name} has {sum(counts)} documents of {self.documents}")
        return self

    def figures(self) -> dict[str, float]:
        """As people and data cards have them; joined cells are "A + rest"."""
        found: dict[str, float] = {"documents": self.documents, "min_cell": self.min_cell}
        for name, table in self.tables.items():
            joined = " + ".join([*table.joined, "rest"])
            counts = table.cells | ({joined: table.joined_documents} if table.joined else {})
            found |= {f"{name}: {cell}": count for cell, count in counts.items()}
        return found | {f"loss: {group}": loss for group, loss in self.losses.items()}


def examine(
    data: PreparedData,
    silo: str,
    *,
    key: bytes | None = None,
    held_out: PreparedData | None = None,
    min_cell: int = cells.DEFAULT_CELL,
    losses: Mapping[str, float] | None = None,
    workers: int = 1,
    progress: _Progress = lambda *_: None,
) -> tuple[Examination, np.ndarray | None]:
    """Examine a silo's training text. What is written meanwhile goes again, Ctrl-C or not.

    Args:
        key: the sites', of `read_key`; without it copies are found under one that nobody keeps.
        held_out: whose global held-out set is looked for; that of `data` by default.
        losses: of a model on probe texts, nats a token, by group.
        progress: told (stage, tokens done, of how many).

    Returns:
        The record; and with a key signatures in no order, uint64 [documents, BANDS].

    Raises:
        EmptySiloError: no such silo, or so few documents that nothing may leave.
        DataError: min_cell is out of bounds.
    """
    only = list(data.silos) if len(data.silos) == 1 else [silo]  # goes by the member's name
    part, apart = data.silo(only[0]), held_out or data
    documents = part.train_documents
    if not LEAST_CELL <= min_cell <= MOST_CELL:
        raise DataError(f"--min-cell {min_cell} is not from {LEAST_CELL} to {MOST_CELL:,}")
    if documents < 2 * min_cell:
        few = f"silo {silo!r} has {documents} documents to train on"
        raise EmptySiloError(f"{few}: below twice the cell size of {min_cell} nothing may leave")
    detectors = method()  # an error here where they are not installed
    names = tables() | {COPIES[1]: COPIES}
    with tempfile.TemporaryDirectory(prefix="photon-examine-") as scratch:
        signing = key or secrets.token_bytes(64)
        walk = functools.partial(_walked, Path(scratch), signing, workers, progress)
        counts, signed = walk((data, part, TRAIN))
        twice = alike(signed, signed, earlier=True)
        counts.update((COPIES[1], COPIES[int(one)]) for one in twice)
        for name, text in zip(_HELD, ((data, part), (apart, apart.held_out)), strict=True):
            if text[1].held_out_documents:
                names[name], others = SEEN, walk((*text, HELD_OUT))[1]
                counts.update((name, SEEN[int(one)]) for one in alike(others, signed))
        kept = None if key is None else signed[np.argsort(signed[:, 0], kind="stable")]
    let_out: dict[str, Table] = {}
    for name, every in names.items():
        told = {cell: counts[name, cell] for cell in every}
        told |= {NOT: documents - told[FOUND]} if FOUND in told else {}
        if (table := cells.publish(told, every, min_cell)) is not None:
            let_out[name] = table
    record = Examination(
        method=detectors,
        silo=silo,
        min_cell=min_cell,
        documents=documents,
        tables=let_out,
        folder_sha256=data.sha256,
        data_sha256=file_sha256(part.path / "manifest.json"),
        held_out_sha256=file_sha256(apart.held_out.path / "manifest.json"),
        losses=dict(losses or {}),
        key=None if key is None else key_name(key),
    )
    return record, kept


def _walked(
    scratch: Path, key: bytes, workers: int, progress: _Progress, text: _Text
) -> tuple[_Counts, np.ndarray]:
    """What documents count, of text to train on, and their signatures in order."""
    _, part, split = text
    shards = part.shards(split)
    total, documents = sum(one.tokens for one in shards), sum(one.documents for one in shards)
    # On disk, so that many short documents take no memory.
    file = scratch / f"{split}-{part.name}.npy"
    signed = np.lib.format.open_memmap(file, "w+", "<u8", (documents, BANDS))
    counts, row, done = _Counts(), 0, 0
    look, batches = functools.partial(_look, key, text), list(_batches(part, split))
    # Ctrl-C is heard by this process alone.
    quiet = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), *quiet)
    mapped = pool.map if min(workers, len(batches)) > 1 else map
    try:
        for tokens, found, rows in mapped(look, batches):
            counts.update(found)
            signed[row : row + len(rows)] = rows
            row, done = row + len(rows), done + tokens
            progress("examining" if split == TRAIN else "looking for held-out text", done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return counts, signed


def _batches(part: SiloData, split: str) -> Iterator[_Batch]:
    """Documents of a split, shard by shard, some at a time."""
    for shard in part.shards(split):
        ends = np.load(part.path / shard.index_file).astype(np.int64)
        borders = [0]
        for some in np.split(ends, np.flatnonzero(np.diff(ends // _BATCH_TOKENS)) + 1):
            borders = [borders[-1], *some.tolist()]
            yield part.path / shard.file, borders


_tokenizer = functools.cache(read_tokenizer)


def _look(key: bytes, text: _Text, batch: _Batch) -> tuple[int, _Counts, np.ndarray]:
    """(tokens, what documents count, their signatures) of a batch."""
    data, part, split = text
    (file, borders), signer, counts = batch, Signer(key), _Counts()
    tokens = np.memmap(file, dtype=data.dtype, mode="r")
    decode, rows = _tokenizer(part.tokenizer_file).decode, []
    for start, end in pairwise(borders):
        told = decode(tokens[start : end - 1].tolist(), skip_special_tokens=False)
        at = range(0, max(1, len(told)), _PIECE)
        words = [words_of(told[one : one + _PIECE]) for one in at]
        rows.append(signer.signature(words))
        if split == TRAIN:
            counts.update(detect(told, words))
    return borders[-1] - borders[0], counts, np.array(rows)
