"""Rows out of one file: JSONL (plain, gzip, zstandard), parquet, saved datasets, hub, metadata."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import zstandard

from photon.errors import DataError, DataNotFoundError, PhotonError

#: "hf:OWNER/NAME[/CONFIG][:SPLIT]": the only spelling that may reach a hub.
HUB_PREFIX = "hf:"

#: What may be named as a field and is never looked for in a row: see `photon.data.ingest.Origin`.
PROVENANCE = ("@file", "@folder", "@split", "@source")

_CHUNK = 1 << 20
_ROWS = 256
#: Most memory that a zstandard frame may ask for: all that `zstd --long=31` writes.
_LARGEST_WINDOW = 2**31
_DAMAGED = (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile)
#: What may stand beside a text; the rest (lists, pictures, sound) is passed over.
_PLAIN = (str, int, float, bool, Decimal, datetime.date, datetime.time, datetime.timedelta)

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """What is read of a row; a column that nobody asked for can't stop the text.

    `fields` are others that are needed, and the options that ask for them; None for all that hold
    plain values.
    """

    text: str = "text"
    fields: Mapping[str, str] | None = None

    def among(self, schema: Any, place: str) -> list[str]:
        """Those of an Arrow schema that are needed; raises DataError if it lacks one."""
        import pyarrow

        kinds = dict(zip(schema.names, schema.types, strict=True))
        nested = {name for name, kind in kinds.items() if pyarrow.types.is_nested(kind)}
        if self.text not in kinds or self.text in nested:
            raise no_text(place, self.text, [*kinds], kinds.get(self.text))
        others = kinds.keys() - nested if self.fields is None else self.fields.keys()
        for name, option in (self.fields or {}).items():
            if name not in kinds:
                raise no_field(option, name, place, kinds)
        return [name for name in kinds if name == self.text or name in others]

    def split(self, row: Row, place: str) -> tuple[str, dict[str, str]]:
        """The text ("" for null), and the other plain values as strings.

        Raises DataError without a text, or if a needed field is no plain value.
        """
        text = row.get(self.text)
        if text is None and self.text in row:
            text = ""  # how tables say that a document is empty
        if not isinstance(text, str):
            found = type(text).__name__ if self.text in row else None
            raise no_text(place, self.text, list(row), found)
        fields: dict[str, str] = {}
        for name, value in row.items():
            if name == self.text or (self.fields is not None and name not in self.fields):
                continue
            if isinstance(value, _PLAIN):
                fields[str(name)] = str(value)
            elif self.fields is not None and value is not None:
                raise DataError(
                    f"{place}: expected one value under {name!r}, found a {type(value).__name__}",
                    hint="Name a field that holds text, a number or a date.",
                )
        return text, fields


def decoded(raw: bytes, place: str) -> str:
    """UTF-8 text, without a byte-order mark; else DataError, whose message `place` begins."""
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
    with path.open("rb") as file:
        parts = _parted(_chunks(file, ""), separator.encode("utf-8"))
        for number, part in enumerate(parts, start=1):
            yield decoded(part, f"{path}, document {number}, is")


def _parted(chunks: Iterable[bytes], mark: bytes) -> Iterator[bytes]:
    """What stands between marks; time is linear in a part's length, however many chunks it has."""
    held = bytearray()
    for chunk in chunks:
        begin = max(0, len(held) - len(mark) + 1)
        held += chunk
        if held.find(mark, begin) >= 0:
            *parts, rest = bytes(held).split(mark)
            yield from parts
            held = bytearray(rest)
    yield bytes(held)


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, object) of each line of a JSONL file; blank lines are passed over.

    Raises DataError, naming file and line, for broken compression, encoding or JSON.
    """
    number = 0
    try:
        # Split at \n alone, as JSONL does, and before decoding, so that an error knows its line.
        with path.open("rb") as file:
            for number, raw in enumerate(_parted(_chunks(file, path.suffix.lower()), b"\n"), 1):
                place = f"{path}:{number}"
                line = decoded(raw, f"{place}:")
                if line.strip():
                    yield place, _object(line, place)
    except _DAMAGED as error:
        if "memory" in str(error):
            raise DataError(
                f"{path} needs more than the {_LARGEST_WINDOW >> 20:,} MiB of memory that Photon "
                f"gives to unpacking (a zstandard window beyond --long=31): {error}",
                hint="Compress it again with a smaller window, for instance `zstd --long=27`.",
            ) from error
        raise DataError(
            f"{path} is damaged or cut short after line {number}: {error}",
            hint="Fetch it, or compress it, again.",
        ) from error


def _object(line: str, place: str) -> Row:
    try:
        row = json.loads(line, parse_int=_integer)
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


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # longer than Python turns into a number
        return Decimal(digits)


def _chunks(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield from iter(partial(unzipped.read, _CHUNK), b"")
    elif suffix == ".zst":
        yield from _zstandard_chunks(file)
    else:
        yield from iter(partial(file.read, _CHUNK), b"")


def _zstandard_chunks(file: BinaryIO) -> Iterator[bytes]:
    # The library's own reader takes a cut file for a short one, without a word.
    frame = None
    while chunk := file.read(_CHUNK):
        while chunk:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            out = frame.decompress(chunk)
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
            if out:
                yield out
    if frame is not None:
        raise EOFError("the last frame has no end")


def parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[str, Row]]:
    """(place, row) of a parquet file, a batch of rows in memory at a time; else DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = columns.among(file.schema_arrow, str(path))
            yield from _rows(file.iter_batches(batch_size=_ROWS, columns=names), f"{path}, row")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {error}", hint="Fetch or write it again."
        ) from error


def _rows(batches: Iterable[Any], place: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of Arrow batches or tables."""
    number = 0
    for batch in batches:
        values = []
        for name in batch.schema.names:
            try:
                values.append(batch.column(name).to_pylist())
            except Exception as error:  # dates that Python does not know, time zones, bad UTF-8
                kind = batch.schema.field(name).type
                raise DataError(
                    f"{place}s {number + 1} to {number + batch.num_rows}: the column {name!r} "
                    f"({kind}) can't be read: {error}",
                    hint="Write that column as text, or do without it.",
                ) from error
        for row in zip(*values, strict=True):
            number += 1
            yield f"{place} {number}", dict(zip(batch.schema.names, row, strict=True))


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` made this folder."""
    saved = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    return saved or (folder / "dataset_dict.json").exists()


def saved_splits(folder: Path) -> dict[str, Any]:
    """Datasets of a folder that `save_to_disk` made, by split ("" of one alone); or DataError."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder} is not a readable Hugging Face dataset: {error}", hint="Save it again."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(name): loaded[name] for name in sorted(loaded, key=str)}
    return {"": loaded}


def saved_rows(dataset: Any, place: str, columns: Columns) -> Iterator[tuple[str, Row]]:
    """(place, row) of one saved dataset, memory-mapped by the library; else DataError."""
    import pyarrow

    names = columns.among(dataset.features.arrow_schema, place)
    try:
        # As Arrow tables: whatever format it was saved with, nothing is decoded.
        chosen = dataset.with_format("arrow").select_columns(names)
        yield from _rows(chosen.iter(batch_size=_ROWS), f"{place} row")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{place} can't be read: {error}", hint="Save it again.") from error


def hub_rows(name: str, columns: Columns) -> Iterator[tuple[str, Row]]:
    """(place, row) of OWNER/NAME[/CONFIG][:SPLIT], streamed from the hub.

    Raises DataNotFoundError without such a dataset or connection, DataError without a text column.
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
        tables = rows.with_format("arrow").iter(batch_size=_ROWS)
        place = f"{HUB_PREFIX}{name}"
        chosen = (table.select(columns.among(table.schema, place)) for table in tables)
        yield from _rows(chosen, f"{place}, row")
    except PhotonError:
        raise
    except Exception as error:
        raise DataNotFoundError(
            f"the hub dataset {owner_and_name!r} (config {config!r}, split {split or 'train'!r}) "
            f"can't be read: {error}",
            hint=f"Spell it {HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME/CONFIG:SPLIT and "
            "check the connection, or download it and name the folder.",
        ) from error


def no_text(place: str, key: str, keys: list[Any], found: object = None) -> DataError:
    """The error for a row without text."""
    what = f"a {found}" if found is not None else "no such key"
    return DataError(
        f"{place}: expected text under {key!r}, found {what}; keys: "
        f"{', '.join(map(str, keys)) or 'none'}",
        hint="Name the key that holds the text with --text-key.",
    )


def no_field(option: str, name: str, place: str, names: Iterable[Any]) -> DataError:
    """The error for a document without a field that an option named."""
    return DataError(
        f"{option} {name}: {place} has no such field, or nothing in it; it has "
        f"{', '.join(sorted(map(str, names))) or 'none'}",
        hint="Name a field that every document has (--metadata joins a CSV to text files), or what "
        f"Photon knows of it: {', '.join(PROVENANCE)}.",
    )


def read_metadata(path: Path, key: str | None) -> dict[str, dict[str, str]]:
    """Rows of a CSV by the file name (or stem) in column `key`, the first by default.

    Raises DataNotFoundError without it; DataError for no CSV or column, or two rows for one file.
    """
    limit = csv.field_size_limit(2**31 - 1)  # a long column that nobody asked for is no error
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
    finally:
        csv.field_size_limit(limit)
