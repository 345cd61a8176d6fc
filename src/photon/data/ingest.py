"""Documents from text, JSONL (also .gz, .zst), parquet and Hugging Face datasets, streamed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from photon.errors import DataError, DataNotFoundError

TEXT_ENDINGS = (".txt", ".text", ".md")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz", ".json.zst")
PARQUET_ENDINGS = (".parquet",)
ENDINGS = (*TEXT_ENDINGS, *JSONL_ENDINGS, *PARQUET_ENDINGS)

#: "hf:name", "hf:name/config:split": the only spelling that may reach a hub.
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Document:
    """A text with the fields that stood beside it.

    Attributes:
        text: never empty.
        fields: other columns, as strings; "file" and "folder" are always there for files.
    """

    text: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """What to read and how.

    Attributes:
        input: a file, a folder, or "hf:NAME[:SPLIT]".
        text_key: column of the text in JSONL, parquet and datasets.
        metadata: a CSV whose rows are joined to text files by file stem.
        metadata_key: its column that holds the stem; the first by default.
    """

    input: str
    text_key: str = "text"
    metadata: Path | None = None
    metadata_key: str | None = None

    def documents(self) -> Iterator[Document]:
        """Every non-empty document, in an order that depends on names only.

        Raises:
            DataNotFoundError: the input does not exist, or holds nothing that can be read.
            DataError: broken compression, JSON, encoding or parquet; names file and line.
        """
        extra = _read_metadata(self.metadata, self.metadata_key) if self.metadata else {}
        unmatched = set(extra)
        for document, stem in self._raw():
            if extra and stem is not None:
                unmatched.discard(stem)
                document = Document(document.text, {**document.fields, **extra.get(stem, {})})
            if document.text.strip():
                yield document
        if extra and len(unmatched) == len(extra):
            raise DataError(
                f"no row of {self.metadata} belongs to a file of {self.input}: for instance "
                f"{sorted(extra)[0]!r} is no file's stem",
                hint="Name the column that holds file stems with --metadata-key.",
            )

    def _raw(self) -> Iterator[tuple[Document, str | None]]:
        if self.input.startswith(HUB_PREFIX):
            for document in _from_hub(self.input.removeprefix(HUB_PREFIX), self.text_key):
                yield document, None
            return
        root = Path(self.input)
        if not root.exists():
            raise DataNotFoundError(
                f"no input at {root}",
                hint=f"Name a file, a folder, or a hub dataset as {HUB_PREFIX}NAME.",
            )
        if root.is_dir() and _is_saved_dataset(root):
            for document in _from_saved(root, self.text_key):
                yield document, None
            return
        for path in _files(root):
            folder = "" if root.is_file() else _first_folder(path, root)
            base = {"file": path.name, "folder": folder}
            if path.name.endswith(TEXT_ENDINGS):
                yield Document(_read_text(path), base), path.stem
            else:
                rows = _parquet_rows if path.name.endswith(PARQUET_ENDINGS) else _jsonl_rows
                for place, row in rows(path):
                    yield _document(row, self.text_key, base, place), None


def _files(root: Path) -> list[Path]:
    if root.is_file():
        if not root.name.endswith(ENDINGS):
            raise DataError(
                f"{root} has an ending Photon does not read",
                hint=f"It reads {', '.join(ENDINGS)}.",
            )
        return [root]
    found = sorted(path for path in root.rglob("*") if path.is_file())
    readable = [path for path in found if path.name.endswith(ENDINGS)]
    if not readable:
        raise DataNotFoundError(
            f"{root} holds no file that Photon reads ({len(found)} files in all)",
            hint=f"It reads {', '.join(ENDINGS)}.",
        )
    return readable


def _first_folder(path: Path, root: Path) -> str:
    inside = path.relative_to(root).parts
    return inside[0] if len(inside) > 1 else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error}", hint="Convert it, for instance with iconv."
        ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: expected an object, found {line[:40]!r}")
                yield f"{path}:{number}", row
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: not UTF-8: {error}") from error
    except (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is damaged or cut short after line {number}: {error}",
            hint="Fetch or compress it again.",
        ) from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        return io.TextIOWrapper(io.BufferedReader(_ZstdFile(path)), encoding="utf-8")
    return path.open(encoding="utf-8")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike zstandard's reader it notices a missing end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._file.read(1 << 16)
            if not raw:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(raw)
            if self._frame.eof:  # what follows belongs to another frame
                self._file.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _document(row: Mapping[str, Any], key: str, base: Mapping[str, str], place: str) -> Document:
    text = row.get(key)
    if not isinstance(text, str):
        found = "no such key" if key not in row else f"a {type(text).__name__}"
        raise DataError(
            f"{place}: expected text under {key!r}, found {found}; "
            f"keys: {', '.join(map(str, row))}",
            hint="Name the key that holds the text with --text-key.",
        )
    fields = {
        str(name): str(value)
        for name, value in row.items()
        if name != key and isinstance(value, str | int | float | bool)
    }
    return Document(text, {**base, **fields})


def _is_saved_dataset(root: Path) -> bool:
    return (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists()


def _from_saved(root: Path, key: str) -> Iterator[Document]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:
        raise DataError(f"{root} is not a readable Hugging Face dataset: {error}") from error
    parts: dict[str, Any] = (
        {str(name): part for name, part in loaded.items()}
        if isinstance(loaded, datasets.DatasetDict)
        else {"train": loaded}
    )
    for split in sorted(parts):
        for number, row in enumerate(parts[split]):
            yield _document(row, key, {"split": split}, f"{root}, {split} row {number}")


def _from_hub(name: str, key: str) -> Iterator[Document]:
    import datasets

    name, _, split = name.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _document(row, key, {}, f"{HUB_PREFIX}{name}, row {number}")
    except DataError:
        raise
    except Exception as error:
        raise DataNotFoundError(
            f"the hub dataset {name!r} (split {split or 'train'!r}) can't be read: {error}",
            hint="Check the name and the connection, or download it and name the folder.",
        ) from error


def _read_metadata(path: Path, key: str | None) -> dict[str, dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            column = key or (columns[0] if columns else "")
            if column not in columns:
                raise DataError(
                    f"{path} has no column {column!r}; its columns: {', '.join(columns) or 'none'}"
                )
            return {
                Path(row[column]).stem: {
                    name: value for name, value in row.items() if isinstance(value, str)
                }
                for row in reader
            }
    except FileNotFoundError:
        raise DataNotFoundError(f"no metadata file at {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a readable CSV: {error}") from error
