"""Text in, tokenised shards out: two passes over the input, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from photon.data.card import data_card
from photon.data.ingest import Source
from photon.data.partition import (
    ByField,
    ByFolder,
    Contiguous,
    Dirichlet,
    DocumentInfo,
    Everything,
    Iid,
    Partitioner,
    fold_small,
    folder_names,
)
from photon.data.prepared import PreparedData, open_data
from photon.data.shards import (
    FORMAT,
    HELD_OUT,
    TRAIN,
    ShardWriter,
    sha256_of,
    splits_record,
    write_manifest,
)
from photon.data.splits import GLOBAL, LOCAL, position_of, split_documents
from photon.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from photon.errors import DataError, DataNotFoundError, DiskFullError, IncompatibleConfigError
from photon.plugins import PARTITIONERS, load_plugin

#: Told (stage, done, total); total is 0 where it is not known yet.
Reporter = Callable[[str, int, int], None]

_BATCH_BYTES = 4_000_000


@dataclass(frozen=True)
class PrepareOptions:
    """What `photon data prepare` takes; at most one way to partition.

    Attributes:
        input: file, folder, or "hf:NAME[:SPLIT]".
        out: folder to make.
        silo_field, iid, dirichlet, contiguous, silo_folders, partitioner: how documents become
            silos; none makes one silo, "all".
        label_field: whose values Dirichlet skews; a constant label when the input has none.
        min_documents: silos with fewer are folded into "other".
        source_field: makes several sources inside each silo, for mixtures.
        tokenizer: tokenizer.json or folder; trained on the training text by default.
        train_bytes: most text the tokenizer is trained on.
        global_fraction, silo_fraction: of documents held out, globally and per silo.
        seed: of splits and of random partitions.
    """

    input: str | os.PathLike[str]
    out: str | os.PathLike[str]
    text_key: str = "text"
    metadata: str | os.PathLike[str] | None = None
    metadata_key: str | None = None
    silo_field: str | None = None
    iid: int | None = None
    dirichlet: tuple[int, float] | None = None
    contiguous: int | None = None
    silo_folders: bool = False
    partitioner: str | None = None
    partitioner_options: dict[str, str] = field(default_factory=dict)
    label_field: str = "file"
    min_documents: int = 1
    source_field: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    eos: str | None = None
    vocab_size: int = 4096
    train_bytes: int = 50_000_000
    global_fraction: float = 0.03
    silo_fraction: float = 0.03
    shard_tokens: int = 2**26
    seed: int = 0
    overwrite: bool = False

    def build_partitioner(self) -> Partitioner:
        """The partitioner these options name.

        Raises:
            IncompatibleConfigError: more than one is named.
            PluginError: a plugin that can't be loaded.
        """
        named: dict[str, Callable[[], Partitioner]] = {}
        if self.silo_field is not None:
            named["--silo-field"] = lambda: ByField(str(self.silo_field))
        if self.iid is not None:
            named["--iid"] = lambda: Iid(self.iid or 0)
        if self.dirichlet is not None:
            count, alpha = self.dirichlet
            named["--dirichlet"] = lambda: Dirichlet(count, alpha, self.label_field)
        if self.contiguous is not None:
            named["--contiguous"] = lambda: Contiguous(self.contiguous or 0)
        if self.silo_folders:
            named["--silo-folders"] = ByFolder
        if self.partitioner is not None:
            kind = load_plugin(PARTITIONERS, self.partitioner, Partitioner)
            named["--partitioner"] = lambda: kind(**self.partitioner_options)
        if len(named) > 1:
            raise IncompatibleConfigError(
                f"{' and '.join(named)} both say how to make silos", hint="Name one of them."
            )
        return next(iter(named.values()))() if named else Everything()


@dataclass(frozen=True)
class _Plan:
    """Silo, split and source of each document, in input order."""

    silos: list[str]
    splits: list[str]
    sources: list[str]
    sizes: list[int]
    remarks: list[str]


def prepare(options: PrepareOptions, progress: Reporter | None = None) -> PreparedData:
    """Make a prepared data folder; the same input and options give the same bytes.

    Args:
        options: what to read and how to cut it.
        progress: told how far it is.

    Raises:
        DataNotFoundError, DataError, EmptySiloError: as their names say; nothing is left behind.
        DiskFullError: no room; nothing is left behind.
    """
    out = Path(options.out)
    report = progress or (lambda stage, done, total: None)
    _check(options, out)
    partitioner = options.build_partitioner()
    metadata = Path(options.metadata) if options.metadata is not None else None
    source = Source(os.fspath(options.input), options.text_key, metadata, options.metadata_key)
    plan = _plan(source, options, partitioner, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_room(out.parent, sum(plan.sizes))
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with _no_room(out):
            tokenizer = _tokenizer(source, plan, options, report)
            _write(source, plan, tokenizer, options, scratch, report)
            scratch.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return open_data(out)


def _check(options: PrepareOptions, out: Path) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not options.overwrite:
            raise DataError(
                f"{out} already exists", hint="Choose another --out, or replace it: --overwrite."
            )
        if not (out / "manifest.json").is_file():
            raise DataError(f"{out} is not a prepared data folder, so it is not overwritten")
    for name in ("global_fraction", "silo_fraction"):
        value = getattr(options, name)
        if not 0 < value < 0.5:
            raise DataError(f"{name} = {value} must lie between 0 and 0.5")


def _plan(
    source: Source, options: PrepareOptions, partitioner: Partitioner, report: Reporter
) -> _Plan:
    infos: list[DocumentInfo] = []
    positions: list[float] = []
    for index, document in enumerate(source.documents()):
        infos.append(DocumentInfo(index, document.fields, len(document.text.encode("utf-8"))))
        positions.append(position_of(document.text, options.seed))
        if index % 256 == 0:
            report("reading", index, 0)
    if not infos:
        raise DataNotFoundError(f"{options.input} holds no text", hint="Every document is empty.")
    names = partitioner.assign(infos, options.seed)
    if len(names) != len(infos):
        raise DataError(
            f"the partitioner named {len(names)} silos for {len(infos)} documents; one each"
        )
    silos = folder_names(fold_small(names, options.min_documents))
    splits, remarks = split_documents(
        positions,
        silos,
        global_fraction=options.global_fraction,
        silo_fraction=options.silo_fraction,
    )
    sources = ["text"] * len(infos)
    if options.source_field is not None:
        by_field = ByField(options.source_field).assign(infos, options.seed)
        sources = folder_names(by_field)
    return _Plan(silos, splits, sources, [info.bytes for info in infos], remarks)


def _tokenizer(
    source: Source, plan: _Plan, options: PrepareOptions, report: Reporter
) -> TextTokenizer:
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer, options.eos)
    report("training the tokenizer", 0, 0)

    def sample() -> Iterator[str]:
        # Evenly spread over the input: every n-th training text once there is more than enough.
        training = [
            size
            for size, split in zip(plan.sizes, plan.splits, strict=True)
            if split not in (GLOBAL, LOCAL)
        ]
        stride = max(1, -(-sum(training) // options.train_bytes))
        number = 0
        for document, split in zip(source.documents(), plan.splits, strict=True):
            if split not in (GLOBAL, LOCAL):
                if number % stride == 0:
                    yield document.text
                number += 1

    return train_tokenizer(sample(), options.vocab_size)


def _write(
    source: Source,
    plan: _Plan,
    tokenizer: TextTokenizer,
    options: PrepareOptions,
    root: Path,
    report: Reporter,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers: dict[tuple[str, str, str], ShardWriter] = {}
    done, total = 0, sum(plan.sizes)
    for batch in _batches(source, plan):
        encoded = tokenizer.encode([text for _, text in batch])
        for (index, text), ids in zip(batch, encoded, strict=True):
            key = _place(plan, index)
            if key not in writers:
                folder = _folder(root, key[0])
                folder.mkdir(parents=True, exist_ok=True)
                stem = key[1] if key[2] == "text" else f"{key[1]}-{key[2]}"
                writers[key] = ShardWriter(folder, stem, dtype, options.shard_tokens)
            tokens = np.array([*ids, tokenizer.eos_id], dtype=dtype)
            writers[key].add(tokens, len(text.encode("utf-8")))
            done += plan.sizes[index]
        report("tokenising", done, total)
    for writer in writers.values():
        writer.close()
    _write_manifests(writers, tokenizer, dtype, plan, options, root)


def _place(plan: _Plan, index: int) -> tuple[str, str, str]:
    """(silo or "" for the global set, split, source) of a document."""
    split, source = plan.splits[index], plan.sources[index]
    if split == GLOBAL:
        return "", HELD_OUT, source
    return plan.silos[index], HELD_OUT if split == LOCAL else TRAIN, source


def _folder(root: Path, silo: str) -> Path:
    return root / "silos" / silo if silo else root / HELD_OUT


def _batches(source: Source, plan: _Plan) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    seen = 0
    for index, document in enumerate(source.documents()):
        seen += 1
        if seen > len(plan.sizes):
            break
        batch.append((index, document.text))
        size += plan.sizes[index]
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if seen != len(plan.sizes):
        raise DataError(
            f"{source.input} changed while it was read ({len(plan.sizes)} documents first, "
            f"{'more' if seen > len(plan.sizes) else seen} then)",
            hint="Run again once nothing writes to it.",
        )
    if batch:
        yield batch


def _write_manifests(
    writers: dict[tuple[str, str, str], ShardWriter],
    tokenizer: TextTokenizer,
    dtype: np.dtype,
    plan: _Plan,
    options: PrepareOptions,
    root: Path,
) -> None:
    tokenizer_record = {
        "sha256": tokenizer.save(root / "tokenizer"),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "eos_token": tokenizer.eos_token,
    }
    hashes: dict[str, str] = {}
    for silo in sorted({key[0] for key in writers}):
        splits: dict[str, dict[str, Any]] = {}
        for (name, split, source), writer in sorted(writers.items()):
            if name == silo:
                splits.setdefault(split, {})[source] = writer.shards
        path = _folder(root, silo) / "manifest.json"
        record = {
            "format": FORMAT,
            "name": silo or HELD_OUT,
            "tokenizer_sha256": tokenizer_record["sha256"],
            "splits": splits_record(splits),
        }
        write_manifest(path, record)
        hashes[silo] = sha256_of(path)
    manifest = {
        "format": FORMAT,
        "photon_version": _version(),
        "dtype": dtype.str,
        "tokenizer": tokenizer_record,
        "held_out": hashes.pop(""),
        "silos": hashes,
        "options": _recorded(options),
        "remarks": plan.remarks,
    }
    write_manifest(root / "manifest.json", manifest)
    card = data_card(open_data(root), manifest)
    (root / "README.md").write_text(card, encoding="utf-8")


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    """The options that shaped the data; folders by their last name only."""
    record = asdict(options)
    for name in ("out", "overwrite"):
        record.pop(name)
    for name in ("input", "metadata", "tokenizer"):
        if record[name] is not None:
            record[name] = Path(record[name]).name
    return record


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
def _no_room(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"no room to write {out}: {error}", hint="Free space or choose another --out."
            ) from error
        raise


def _version() -> str:
    try:
        return version("photon-federated")
    except PackageNotFoundError:
        return "0+uninstalled"
