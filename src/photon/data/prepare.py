"""Text in, tokenised shards out: two passes over the input, nothing half-written."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.models import BPE

from photon.data.card import data_card
from photon.data.ingest import Source
from photon.data.options import PrepareOptions
from photon.data.pieces import batches, pieces
from photon.data.plan import Plan, Reporter, make_plan
from photon.data.prepared import OWN, PreparedData, open_data
from photon.data.scratch import scratch_folder
from photon.data.shards import FORMAT, HELD_OUT, TRAIN, Shard, ShardWriter, Splits, write_manifest
from photon.data.splits import GLOBAL, LOCAL
from photon.data.tokenizer import (
    TextTokenizer,
    byte_level,
    load_tokenizer,
    parallel,
    train_tokenizer,
)
from photon.errors import DiskFullError, MachineError
from photon.store.disk import file_sha256, put_in_place, require_disk, sync_to_disk
from photon.version import photon_version

_COUNTED = ("documents", "tokens", "bytes")
#: Silos or sources that the held-out set is broken down by.
_MOST_PARTS = 200

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
    report = progress or (lambda stage, done, total: None)
    with _in_words(options.out):
        # A link stays a link: what it names is made or replaced.
        out = Path(os.path.realpath(options.out))
        options.check()
        partitioner = options.build_partitioner()
        given = load_tokenizer(options.tokenizer, options.eos) if options.tokenizer else None
        source = options.source()
        with scratch_folder(out) as scratch:  # first: what can't be written is told before the work
            plan = make_plan(source, options, partitioner, report)
            # A token takes 2 to 4 bytes and stands for about as much text: on the safe side.
            needed, hint = sum(plan.sizes), "Free space or choose another --out."
            require_disk(scratch, needed, "the text as tokens", hint)
            with parallel():
                silos = sorted({*plan.silos} - {""}) if options.own_vocabulary else [""]
                made = {one: given or _train(source, plan, options, report, one) for one in silos}
                shards, in_global = _write(source, plan, made, options, scratch, report)
            _describe(shards, made, plan, in_global, options, scratch)
            scratch.chmod(0o755)
            put_in_place(scratch, out)
    return open_data(out, only_to_score=options.held_out_only, own_vocabularies=True)


def _train(
    source: Source, plan: Plan, options: PrepareOptions, report: Reporter, silo: str
) -> TextTokenizer:
    # Evenly spread over the input: every n-th training text once there is more than enough.
    total = sum(size for number, size in enumerate(plan.sizes) if plan.training(number, silo))
    stride = max(1, -(-total // options.train_bytes))
    budget = min(total, options.train_bytes)
    untrained = byte_level(BPE())

    def sample() -> Iterator[str]:
        left, seen = budget, 0
        for number, document in plan.replay(source):
            if not plan.training(number, silo):
                continue
            if seen % stride == 0 and left > 0:
                text = document.text
                if document.bytes > left:
                    text = text.encode("utf-8")[:left].decode("utf-8", "ignore")
                yield from pieces(text, untrained, options.max_document_bytes, document.place)
                left -= document.bytes
                report("training the tokenizer", budget - max(0, left), budget)
            seen += 1

    report("training the tokenizer", 0, budget)
    return train_tokenizer(sample(), options.vocab_size)


def _write(
    source: Source,
    plan: Plan,
    tokenizers: Mapping[str, TextTokenizer],
    options: PrepareOptions,
    root: Path,
    report: Reporter,
) -> tuple[dict[_Key, list[Shard]], dict[int, int]]:
    """Tokenise everything into shards under `root`; also the tokens of each globally held out."""
    dtype = _dtype(tokenizers)
    writers: dict[_Key, ShardWriter] = {}
    done, total = 0, sum(plan.sizes)
    in_global: dict[int, int] = {}
    begun: list[np.ndarray] = []  # pieces of a document whose last is yet to come
    for silo, tokenizer in tokenizers.items():
        texts = ((n, one.text, one.place) for n, one in plan.replay(source, silo))
        for batch in batches(texts, tokenizer.tokenizer, options.max_document_bytes):
            encoded = tokenizer.encode([text for _, text, _ in batch])
            for (number, _, ends), ids in zip(batch, encoded, strict=True):
                begun.append(np.array([*ids, tokenizer.eos_id] if ends else ids, dtype=dtype))
                if not ends:
                    continue
                key = _place(plan, number)
                if key not in writers:
                    folder = _folder(root, key[0])
                    folder.mkdir(parents=True, exist_ok=True)
                    stem = key[1] if key[2] == "text" else f"{key[1]}-{key[2]}"
                    writers[key] = ShardWriter(folder, stem, dtype, options.shard_tokens)
                tokens = np.concatenate(begun) if len(begun) > 1 else begun[0]
                begun.clear()
                writers[key].add(tokens, plan.sizes[number])
                if plan.splits[number] == GLOBAL:
                    in_global[number] = len(tokens)
            for key in {_place(plan, number) for number, _, ends in batch if ends}:
                writers[key].flush()
            done += sum(len(text.encode("utf-8")) for _, text, _ in batch)
            report("tokenising", done, total)
    for writer in writers.values():
        writer.close()
    return {key: writers[key].shards for key in sorted(writers)}, in_global


def _place(plan: Plan, number: int) -> _Key:
    split, source = plan.splits[number], plan.sources[number]
    if split == GLOBAL:
        return "", HELD_OUT, source
    return plan.silos[number], HELD_OUT if split == LOCAL else TRAIN, source


def _folder(root: Path, silo: str) -> Path:
    return root / "silos" / silo if silo else root / HELD_OUT


def _dtype(tokenizers: Mapping[str, TextTokenizer]) -> np.dtype:
    largest = max(one.vocab_size for one in tokenizers.values())
    return np.dtype("<u2" if largest <= 2**16 else "<u4")


def _describe(
    shards: dict[_Key, list[Shard]],
    tokenizers: Mapping[str, TextTokenizer],
    plan: Plan,
    in_global: Mapping[int, int],
    options: PrepareOptions,
    root: Path,
) -> None:
    """Write the tokenizers, all manifests and the data card."""
    saved = {
        silo: one.save((_folder(root, silo) if silo else root) / "tokenizer")
        for silo, one in tokenizers.items()
    }
    tokenizer = next(iter(tokenizers.values()))  # those trained here end texts alike
    tokenizer_record = {
        "sha256": saved.get("", OWN),
        "vocab_size": max(one.vocab_size for one in tokenizers.values()),
        "eos_id": tokenizer.eos_id,
        "eos_token": tokenizer.eos_token,
    }
    _folder(root, "").mkdir(exist_ok=True)
    if options.own_vocabulary:
        plan.remarks.append(
            "no vocabulary is all silos', so the global held-out set is neither trained on nor kept"
        )
    sets: dict[str, dict[str, Any]] = {}
    for silo in sorted({"", *(key[0] for key in shards)}):
        splits: Splits = {}
        for (name, split, source), written in shards.items():
            if name == silo:
                splits.setdefault(split, {})[source] = written
        path = _folder(root, silo) / "manifest.json"
        record = {
            "format": FORMAT,
            "name": silo or HELD_OUT,
            "dtype": _dtype(tokenizers).str,
            "tokenizer_sha256": saved.get(silo, tokenizer_record["sha256"]),
            "splits": splits,
        }
        write_manifest(path, record)
        sets[silo] = {"sha256": file_sha256(path)} | {
            split: {
                what: sum(getattr(shard, what) for shards in sources.values() for shard in shards)
                for what in _COUNTED
            }
            for split, sources in splits.items()
        }
    manifest = {
        "format": FORMAT,
        "photon_version": photon_version(),
        "dtype": _dtype(tokenizers).str,
        "tokenizer": tokenizer_record,
        "held_out": sets.pop(""),
        "held_out_from": _held_out_from(plan, in_global),
        "silos": sets,
        "partition": options.partition_in_words(),
        "options": options.recorded(),
        "remarks": plan.remarks,
    }
    write_manifest(root / "manifest.json", manifest)
    card = root / "README.md"
    opened = open_data(root, only_to_score=options.held_out_only, own_vocabularies=True)
    card.write_bytes(data_card(opened, manifest).encode("utf-8", "backslashreplace"))
    sync_to_disk(card)


def _held_out_from(plan: Plan, tokens: Mapping[int, int]) -> dict[str, Any]:
    """What the global held-out set holds of each silo and source, where these are not too many."""
    labels = {"silo": plan.silos, "source": [origin.source for origin in plan.origins]}
    counts = {kind: {name: Counter() for name in names} for kind, names in labels.items()}
    for number, size in tokens.items():
        for kind, names in labels.items():
            one = {"documents": 1, "tokens": size, "bytes": plan.sizes[number]}
            counts[kind][names[number]].update(one)
    return {
        kind: {name: {what: count[what] for what in _COUNTED} for name, count in parts.items()}
        for kind, parts in counts.items()
        if tokens and 1 < len(parts) <= _MOST_PARTS and "" not in parts
    }


@contextmanager
def _in_words(out: str | os.PathLike[str]) -> Iterator[None]:
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
            f"can't prepare {out}: {error}",
            hint="Choose an --out that can be written. Nothing half-written was kept.",
        ) from error
    except UnicodeEncodeError as error:
        raise MachineError(
            f"can't prepare {os.fspath(out)!a}: file names on this machine are "
            f"{sys.getfilesystemencoding()}, which has no {error.object[error.start]!a}",
            hint="Choose another name, or set LC_ALL=C.UTF-8.",
        ) from error
