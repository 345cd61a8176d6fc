"""Rows out of one file: JSONL (plain, gzip, zstandard), parquet, saved datasets, hub, metadata."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import zstandard

from photon.errors import DataError, DataNotFoundError, PhotonError

#: "hf:OWNER/NAME[/CONFIG][:SPLIT]": the only spelling that may reach a hub.
HUB_PREFIX = "hf:"

_CHUNK = 1 << 20
_DAMAGED = (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile)

Row = dict[str, Any]


def decoded(raw: bytes, place: str) -> str:
    """UTF-8 text, without a byte-order mark; `place` begins the message of an error.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}",
            hint="Convert it to UTF-8, for instance with iconv.",
        ) from error


def text_parts(path: Path, separator: str | None) -> Iterator[str]:
    """The documents of a text file: all of it, or the parts between separators, streamed."""
    if separator is None:
        yield decoded(path.read_bytes(), f"{path} is")
        return
    mark, rest, number = separator.encode("utf-8"), b"", 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            *parts, rest = (rest + chunk).split(mark)
            for part in parts:
                number += 1
                yield decoded(part, f"{path}, document {number}, is")
    yield decoded(rest, f"{path}, document {number + 1}, is")


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, object) of each line of a JSONL file; blank lines are passed over.

    Raises:
        DataError: broken compression, encoding or JSON; names file and line.
    """
    number = 0
    try:
        for number, raw in enumerate(_lines(path), start=1):
            place = f"{path}:{number}"
            line = decoded(raw, f"{place}:")
            if line.strip():
                yield place, _object(line, place)
    except _DAMAGED as error:
        raise DataError(
            f"{path} is damaged or cut short after line {number}: {error}",
            hint="Fetch it, or compress it, again.",
        ) from error


def _object(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{place}: not JSON: {error}", hint="Each line must be one JSON object (JSONL)."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected an object, found {line.strip()[:40]!r}",
            hint="Each line must be one JSON object (JSONL).",
        )
    return row


def _lines(path: Path) -> Iterator[bytes]:
    # Split at \n alone, as JSONL does, and before decoding, so that an error knows its line.
    with path.open("rb") as file:
        rest = b""
        for chunk in _chunks(file, path.suffix.lower()):
            *lines, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
            yield from lines
        if rest:
            yield rest


def _chunks(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=file) as unzipped:
            while chunk := unzipped.read(_CHUNK):
                yield chunk
    elif suffix == ".zst":
        yield from _zstandard_chunks(file)
    else:
        while chunk := file.read(_CHUNK):
            yield chunk


def _zstandard_chunks(file: BinaryIO) -> Iterator[bytes]:
    # The library's own reader takes a cut file for a short one, without a word.
    frame = None
    while chunk := file.read(_CHUNK):
        while chunk:
            if frame is None:
                frame = zstandard.ZstdDecompressor().decompressobj()
            out = frame.decompress(chunk)
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
            if out:
                yield out
    if frame is not None:
        raise EOFError("the last frame has no end")


def parquet_rows(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of a parquet file, a batch of rows in memory at a time.

    Raises:
        DataError: it can't be read, or has no column `key`.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if key not in schema.names:
                raise no_text(str(path), key, schema.names)
            columns = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {error}", hint="Fetch or write it again."
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` made this folder."""
    saved = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return saved or (folder / "dataset_dict.json").exists()


def saved_rows(folder: Path) -> Iterator[tuple[str, str, Row]]:
    """(split, place, row) of a dataset saved with `save_to_disk`; memory-mapped by the library.

    Raises:
        DataError: it can't be read.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} is not a readable Hugging Face dataset: {error}") from error
    parts: dict[str, Any] = {"": loaded}
    if isinstance(loaded, datasets.DatasetDict):
        parts = {str(name): part for name, part in loaded.items()}
    for split in sorted(parts):
        for number, row in enumerate(parts[split], start=1):
            yield split, f"{folder}, {split + ' ' if split else ''}row {number}", row


def hub_rows(name: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of OWNER/NAME[/CONFIG][:SPLIT], streamed from the hub.

    Raises:
        DataNotFoundError: no such dataset, or no connection.
    """
    import datasets

    path, _, split = name.partition(":")
    owner_and_name, config = path, None
    if path.count("/") > 1:
        owner, short, config = path.split("/", 2)
        owner_and_name = f"{owner}/{short}"
    try:
        rows: Any = datasets.load_dataset(
            owner_and_name, config, split=split or "train", streaming=True
        )
        for number, row in enumerate(rows, start=1):
            yield f"{HUB_PREFIX}{name}, row {number}", row
    except PhotonError:
        raise
    except Exception as error:
        raise DataNotFoundError(
            f"the hub dataset {owner_and_name!r} (config {config!r}, split {split or 'train'!r}) "
            f"can't be read: {error}",
            hint=f"Spell it {HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME/CONFIG:SPLIT and "
            "check the connection, or download it and name the folder.",
        ) from error


def text_and_fields(row: Mapping[str, Any], key: str, place: str) -> tuple[str, dict[str, str]]:
    """The text under `key` ("" for null), and the other plain values as strings.

    Raises:
        DataError: no such key, or no text under it.
    """
    text = row.get(key)
    if text is None and key in row:
        text = ""  # how tables say that a document is empty
    if not isinstance(text, str):
        raise no_text(place, key, list(row), None if key not in row else type(text).__name__)
    plain = (str, int, float, bool, datetime.date)
    return text, {
        str(name): str(value)
        for name, value in row.items()
        if name != key and isinstance(value, plain)
    }


def no_text(place: str, key: str, keys: list[Any], found: str | None = None) -> DataError:
    """The error for a row without text."""
    what = f"a {found}" if found else "no such key"
    return DataError(
        f"{place}: expected text under {key!r}, found {what}; keys: "
        f"{', '.join(map(str, keys)) or 'none'}",
        hint="Name the key that holds the text with --text-key.",
    )


def read_metadata(path: Path, key: str | None) -> dict[str, dict[str, str]]:
    """Rows of a CSV by the file name (or stem) in column `key`, the first by default.

    Raises:
        DataNotFoundError: it does not exist.
        DataError: not a CSV, no such column, or two rows for one file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            column = key if key is not None else (columns[0] if columns else "")
            if column not in columns:
                raise DataError(
                    f"{path} has no column {column!r}; its columns: {', '.join(columns) or 'none'}",
                    hint="Name the column that holds file stems with --metadata-key.",
                )
            rows: dict[str, dict[str, str]] = {}
            for row in reader:
                stem = PurePath(row[column] or "").name
                if stem in rows:
                    raise DataError(
                        f"{path}:{reader.line_num}: a second row for {stem!r}",
                        hint="Keep one row for each file, or name another --metadata-key.",
                    )
                rows[stem] = {name: value for name, value in row.items() if isinstance(value, str)}
            return rows
    except (FileNotFoundError, IsADirectoryError):
        raise DataNotFoundError(f"no metadata file at {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a readable CSV: {error}") from error
