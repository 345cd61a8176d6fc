"""Text in, tokenised shards out: two passes over the input, nothing half-written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from photon.data.card import data_card
from photon.data.ingest import Source
from photon.data.options import PrepareOptions
from photon.data.plan import Plan, Reporter, make_plan
from photon.data.prepared import PreparedData, open_data
from photon.data.scratch import put_in_place, scratch_folder
from photon.data.shards import (
    FORMAT,
    HELD_OUT,
    TRAIN,
    Shard,
    ShardWriter,
    Splits,
    sha256_of,
    splits_record,
    sync,
    write_manifest,
)
from photon.data.splits import GLOBAL, LOCAL
from photon.data.tokenizer import TextTokenizer, load_tokenizer, parallel, train_tokenizer
from photon.errors import DiskFullError, MachineError
from photon.version import photon_version

#: Text tokenised at a time, in bytes.
_BATCH_BYTES = 4_000_000

#: (silo or "" for the global set, split, source)
_Key = tuple[str, str, str]


def prepare(options: PrepareOptions, progress: Reporter | None = None) -> PreparedData:
    """Make a prepared data folder; the same input and options give the same bytes.

    Args:
        options: what to read and how to cut it.
        progress: told (stage, done, total): documents while reading (total 0 until it is known),
            bytes while tokenising.

    Raises:
        DataNotFoundError, DataError, EmptySiloError: the input, as their names say.
        IncompatibleConfigError, PluginError: options that don't go together; a broken plugin.
        DiskFullError: no room.
        MachineError: a file or folder that can't be read or written.
        In every case, Ctrl-C too, nothing is left behind and what was at `out` is still there.
    """
    # A link stays a link: what it names is made or replaced.
    out = Path(options.out).resolve()
    report = progress or (lambda stage, done, total: None)
    with _in_words(out):
        options.check()
        partitioner = options.build_partitioner()
        given = load_tokenizer(options.tokenizer, options.eos) if options.tokenizer else None
        source = options.source()
        plan = make_plan(source, options, partitioner, report)
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_room(out.parent, sum(plan.sizes))
        with scratch_folder(out) as scratch:
            with parallel():
                tokenizer = given or _train(source, plan, options, report)
                shards = _write(source, plan, tokenizer, options, scratch, report)
            _describe(shards, tokenizer, plan, options, scratch)
            scratch.chmod(0o755)
            put_in_place(scratch, out)
    return open_data(out)


def _train(source: Source, plan: Plan, options: PrepareOptions, report: Reporter) -> TextTokenizer:
    # Evenly spread over the input: every n-th training text once there is more than enough.
    total = sum(size for number, size in enumerate(plan.sizes) if plan.training(number))
    stride = max(1, -(-total // options.train_bytes))
    budget = min(total, options.train_bytes)

    def sample() -> Iterator[str]:
        left, seen = budget, 0
        for number, document in plan.replay(source):
            if not plan.training(number):
                continue
            if seen % stride == 0 and left > 0:
                if document.bytes <= left:
                    yield document.text
                else:
                    yield document.text.encode("utf-8")[:left].decode("utf-8", "ignore")
                left -= document.bytes
                report("training the tokenizer", budget - max(0, left), budget)
            seen += 1

    report("training the tokenizer", 0, budget)
    return train_tokenizer(sample(), options.vocab_size)


def _write(
    source: Source,
    plan: Plan,
    tokenizer: TextTokenizer,
    options: PrepareOptions,
    root: Path,
    report: Reporter,
) -> dict[_Key, list[Shard]]:
    """Tokenise everything into shards under `root`."""
    dtype = _dtype(tokenizer)
    writers: dict[_Key, ShardWriter] = {}
    done, total = 0, sum(plan.sizes)
    for batch in _batches(source, plan):
        encoded = tokenizer.encode([text for _, text in batch])
        for (number, _), ids in zip(batch, encoded, strict=True):
            key = _place(plan, number)
            if key not in writers:
                folder = _folder(root, key[0])
                folder.mkdir(parents=True, exist_ok=True)
                stem = key[1] if key[2] == "text" else f"{key[1]}-{key[2]}"
                writers[key] = ShardWriter(folder, stem, dtype, options.shard_tokens)
            tokens = np.array([*ids, tokenizer.eos_id], dtype=dtype)
            writers[key].add(tokens, plan.sizes[number])
            done += plan.sizes[number]
        for key in {_place(plan, number) for number, _ in batch}:
            writers[key].flush()
        report("tokenising", done, total)
    for writer in writers.values():
        writer.close()
    return {key: writers[key].shards for key in sorted(writers)}


def _batches(source: Source, plan: Plan) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for number, document in plan.replay(source):
        batch.append((number, document.text))
        size += document.bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _place(plan: Plan, number: int) -> _Key:
    split, source = plan.splits[number], plan.sources[number]
    if split == GLOBAL:
        return "", HELD_OUT, source
    return plan.silos[number], HELD_OUT if split == LOCAL else TRAIN, source


def _folder(root: Path, silo: str) -> Path:
    return root / "silos" / silo if silo else root / HELD_OUT


def _dtype(tokenizer: TextTokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _describe(
    shards: dict[_Key, list[Shard]],
    tokenizer: TextTokenizer,
    plan: Plan,
    options: PrepareOptions,
    root: Path,
) -> None:
    """Write the tokenizer, all manifests and the data card."""
    tokenizer_record = {
        "sha256": tokenizer.save(root / "tokenizer"),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "eos_token": tokenizer.eos_token,
    }
    sets: dict[str, dict[str, Any]] = {}
    for silo in sorted({key[0] for key in shards}):
        splits: Splits = {}
        for (name, split, source), written in shards.items():
            if name == silo:
                splits.setdefault(split, {})[source] = written
        path = _folder(root, silo) / "manifest.json"
        record = {
            "format": FORMAT,
            "name": silo or HELD_OUT,
            "dtype": _dtype(tokenizer).str,
            "tokenizer_sha256": tokenizer_record["sha256"],
            "splits": splits_record(splits),
        }
        write_manifest(path, record)
        sets[silo] = {"sha256": sha256_of(path), **_summary(splits)}
    manifest = {
        "format": FORMAT,
        "photon_version": photon_version(),
        "dtype": _dtype(tokenizer).str,
        "tokenizer": tokenizer_record,
        "held_out": sets.pop(""),
        "silos": sets,
        "partition": options.partition_in_words(),
        "options": options.recorded(),
        "remarks": plan.remarks,
    }
    write_manifest(root / "manifest.json", manifest)
    card = root / "README.md"
    card.write_bytes(data_card(open_data(root), manifest).encode("utf-8"))
    sync(card)


def _summary(splits: Splits) -> dict[str, dict[str, int]]:
    return {
        split: {
            what: sum(getattr(shard, what) for shards in sources.values() for shard in shards)
            for what in ("documents", "tokens", "bytes")
        }
        for split, sources in splits.items()
    }


def _require_room(folder: Path, text_bytes: int) -> None:
    # A token takes 2 to 4 bytes and stands for about as much text, so this is on the safe side.
    free = shutil.disk_usage(folder).free
    if free < text_bytes:
        raise DiskFullError(
            f"{text_bytes / 1e9:.2f} GB of text need about as much room in {folder}; "
            f"{free / 1e9:.2f} GB are free",
            hint="Free space or choose another --out.",
        )


@contextmanager
def _in_words(out: Path) -> Iterator[None]:
    """Errors of the operating system as Photon's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"no room to write {out}: {error.strerror or error}",
                hint="Free space or choose another --out. Nothing half-written was kept.",
            ) from error
        raise MachineError(
            f"can't prepare {out}: {error}", hint="Nothing half-written was kept."
        ) from error
