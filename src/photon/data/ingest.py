"""Documents from text, JSONL (also .gz, .zst), parquet and Hugging Face datasets, streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.data.readers import (
    HUB_PREFIX,
    hub_rows,
    is_saved_dataset,
    json_rows,
    parquet_rows,
    read_metadata,
    saved_rows,
    text_and_fields,
    text_parts,
)
from photon.errors import DataError, DataNotFoundError

TEXT_ENDINGS = (".txt", ".text", ".md")
JSONL_ENDINGS = (
    *(ending + packed for ending in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")),
    ".json.gz",
    ".json.zst",
)
PARQUET_ENDINGS = (".parquet",)
ENDINGS = (*TEXT_ENDINGS, *JSONL_ENDINGS, *PARQUET_ENDINGS)


@dataclass(frozen=True)
class Document:
    """A text with the fields that stood beside it.

    Attributes:
        text: never empty.
        fields: other columns, as strings; "file" and "folder" (first level) where there are files.
        source: what it came out of: the JSONL or parquet file, the folder of a text file (both
            relative to the input), or the split of a dataset. Shared by many documents.
        place: for messages, e.g. "wiki.jsonl:12".
        bytes: of the text in UTF-8.
    """

    text: str
    fields: Mapping[str, str]
    source: str
    place: str
    bytes: int


@dataclass
class Tally:
    """What reading left out.

    Attributes:
        empty: documents of white space only.
        unread: files of a folder by their ending, which Photon does not read.
    """

    empty: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def remarks(self) -> list[str]:
        """In words, for the manifest and the reader."""
        lines = []
        if self.empty:
            lines.append(f"{self.empty} empty documents were left out")
        if self.unread:
            kinds = ", ".join(f"{count} x {end}" for end, count in sorted(self.unread.items()))
            lines.append(f"files with endings Photon does not read were left out: {kinds}")
        return lines


@dataclass(frozen=True)
class _Row:
    """A document as it was found: its text may be empty; `stem` is set for text files."""

    place: str
    source: str
    text: str
    fields: Mapping[str, str]
    stem: str | None = None


@dataclass(frozen=True)
class Source:
    """What to read and how.

    Attributes:
        input: a file, a folder, or "hf:OWNER/NAME[/CONFIG][:SPLIT]".
        text_key: column of the text in JSONL, parquet and datasets.
        metadata: a CSV whose rows are joined to text files by file name or stem.
        metadata_key: its column that holds it; the first by default.
        separator: parts the documents of a text file; a file is one document without it.
    """

    input: str
    text_key: str = "text"
    metadata: Path | None = None
    metadata_key: str | None = None
    separator: str | None = None

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Every non-empty document, in an order that depends on file names only.

        Nothing but the document at hand is kept, so this may be called again for a second pass.

        Args:
            tally: counts what is left out.

        Raises:
            DataNotFoundError: the input does not exist, or holds nothing that can be read.
            DataError: broken compression, JSON, encoding or parquet; names file and line.
        """
        tally = tally if tally is not None else Tally()
        extra = read_metadata(self.metadata, self.metadata_key) if self.metadata else {}
        joined = False
        for row in self._rows(tally):
            fields = row.fields
            if extra and row.stem is not None:
                more = extra.get(fields["file"], extra.get(row.stem))
                joined = joined or more is not None
                fields = {**fields, **(more or {})}
            if not row.text.strip():
                tally.empty += 1
                continue
            yield Document(row.text, fields, row.source, row.place, _size(row.text, row.place))
        if self.metadata and not joined:
            example = f": for instance {min(extra)!r} is no file's name or stem" if extra else ""
            raise DataError(
                f"no row of {self.metadata} belongs to a file of {self.input}{example}",
                hint="Name the column that holds file stems with --metadata-key.",
            )

    def _rows(self, tally: Tally) -> Iterator[_Row]:
        if self.input.startswith(HUB_PREFIX):
            name = self.input.removeprefix(HUB_PREFIX)
            for place, row in hub_rows(name):
                text, fields = text_and_fields(row, self.text_key, place)
                yield _Row(place, name, text, fields)
            return
        root = Path(self.input)
        if not root.exists():
            raise DataNotFoundError(
                f"no input at {root}",
                hint=f"Name a file, a folder, or a hub dataset as {HUB_PREFIX}OWNER/NAME.",
            )
        if root.is_dir() and is_saved_dataset(root):
            for split, place, row in saved_rows(root):
                text, fields = text_and_fields(row, self.text_key, place)
                yield _Row(place, split or root.name, text, {"split": split, **fields})
            return
        for path in _files(root, tally):
            yield from self._file_rows(path, root)

    def _file_rows(self, path: Path, root: Path) -> Iterator[_Row]:
        inside = path.relative_to(root).parts if root.is_dir() else (path.name,)
        base = {"file": path.name, "folder": inside[0] if len(inside) > 1 else ""}
        if _ends(path, TEXT_ENDINGS):
            source = "/".join(inside[:-1]) or (root.name if root.is_dir() else path.stem)
            for number, text in enumerate(text_parts(path, self.separator), start=1):
                place = f"{path}, document {number}" if self.separator is not None else str(path)
                yield _Row(place, source, text, base, path.stem)
            return
        rows: Iterator[tuple[str, dict[str, Any]]] = (
            parquet_rows(path, self.text_key) if _ends(path, PARQUET_ENDINGS) else json_rows(path)
        )
        for place, row in rows:
            text, fields = text_and_fields(row, self.text_key, place)
            yield _Row(place, "/".join(inside), text, {**base, **fields})


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _size(text: str, place: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text holds half a character (surrogate {text[error.start]!a}), which "
            "UTF-8 can't write",
            hint="Repair the escape sequence, or leave the document out.",
        ) from error


def _files(root: Path, tally: Tally) -> list[Path]:
    """Readable files, sorted by path; hidden files and folders are passed over."""
    if root.is_file():
        if not _ends(root, ENDINGS):
            raise DataError(
                f"{root} has an ending Photon does not read ({root.suffix or root.name!r})",
                hint=f"It reads {', '.join(ENDINGS)}.",
            )
        return [root]
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(root).parts)
    ]
    readable = [path for path in found if _ends(path, ENDINGS)]
    tally.unread.update(path.suffix or path.name for path in found if not _ends(path, ENDINGS))
    if not readable:
        raise DataNotFoundError(
            f"{root} holds no file that Photon reads ({len(found)} files in all)",
            hint=f"It reads {', '.join(ENDINGS)}.",
        )
    return readable
