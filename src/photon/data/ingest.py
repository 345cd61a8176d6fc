"""Documents from text, JSONL (also .gz, .zst), parquet and Hugging Face datasets, streamed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from photon.data import readers
from photon.data.splits import own_splits, splits_of_files
from photon.errors import DataError, DataNotFoundError

TEXT_ENDINGS = (".txt", ".text", ".md")
JSONL_ENDINGS = tuple(
    ending + packed for ending in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst")
)
PARQUET_ENDINGS = (".parquet",)
ENDINGS = (*TEXT_ENDINGS, *JSONL_ENDINGS, *PARQUET_ENDINGS)


@dataclass(frozen=True)
class Origin:
    """Where a document came from, as Photon saw it: nothing in a row can change it.

    Attributes:
        source: the JSONL or parquet file, or the folder of a text file (both relative to the
            input), or the split of a dataset. Shared by many documents.
        file: name of the file; "" where there is none.
        folder: first-level folder of the input that it lies in; "" for none.
        split: of a dataset, or as its files are named ("train", "test"); "" where nothing says.
        held_out: the input's own split is one to validate or test with.
    """

    source: str = ""
    file: str = ""
    folder: str = ""
    split: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Document:
    """A text with the fields that stood beside it.

    Attributes:
        text: never empty.
        fields: other columns of its row, and those of --metadata, as strings.
        origin: where it came from.
        place: for messages, e.g. "wiki.jsonl:12".
        bytes: of the text in UTF-8.
    """

    text: str
    fields: Mapping[str, str]
    origin: Origin
    place: str
    bytes: int


@dataclass
class Tally:
    """What reading left out.

    Attributes:
        empty: documents of white space only.
        hidden: files and folders whose names begin with a dot.
        unread: files of a folder by their ending, which Photon does not read.
    """

    empty: int = 0
    hidden: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    def remarks(self) -> list[str]:
        """In words, for the manifest and the reader."""
        lines = []
        if self.empty:
            lines.append(f"{self.empty} empty documents were left out")
        if self.hidden:
            lines.append(f"{self.hidden} hidden files and folders (.NAME) were left out")
        if self.unread:
            kinds = ", ".join(f"{count} x {end}" for end, count in sorted(self.unread.items()))
            lines.append(f"files with endings Photon does not read were left out: {kinds}")
        return lines


@dataclass(frozen=True)
class Source:
    """What to read and how.

    Attributes:
        inputs, text_key, metadata, metadata_key, separator: as of PrepareOptions.
        fields: as of readers.Columns.
    """

    inputs: Sequence[str]
    text_key: str = "text"
    metadata: Path | None = None
    metadata_key: str | None = None
    separator: str | None = None
    fields: Mapping[str, str] | None = None

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Every non-empty document, in an order that depends on file names only.

        Nothing but the document at hand is kept, so this may be called again for a second pass.

        Args:
            tally: counts what is left out.

        Raises:
            DataNotFoundError: the input does not exist, or holds nothing that can be read.
            DataError: broken compression, JSON, encoding or parquet; names file and line. A link
                to nowhere, or what may not be read.
        """
        tally = tally if tally is not None else Tally()
        extra: dict[str, dict[str, str]] = {}
        if self.metadata is not None:
            with _told(self.metadata):
                extra = readers.read_metadata(self.metadata, self.metadata_key)
        joined = False
        for origin, place, row in self._rows(tally):
            where = place
            if isinstance(row, str):
                more = extra.get(origin.file, extra.get(Path(origin.file).stem))
                joined = joined or more is not None
                where, row = origin.file, {**(more or {}), self.text_key: row}
            text, fields = self._columns.split(row, place)
            if not text or text.isspace():
                tally.empty += 1
                continue
            for name, option in (self.fields or {}).items():
                if not fields.get(name, "").strip():
                    raise readers.no_field(option, name, where, row.keys() - {self.text_key})
            yield Document(text, fields, origin, place, _size(text, place))
        if self.metadata is not None and not joined:
            example = f": for instance {min(extra)!r} is no file's name or stem" if extra else ""
            raise DataError(
                f"no row of {self.metadata} belongs to a file of {', '.join(self.inputs)}{example}",
                hint="Name the column that holds file stems with --metadata-key.",
            )

    @property
    def _columns(self) -> readers.Columns:
        return readers.Columns(self.text_key, self.fields)

    def _rows(self, tally: Tally) -> Iterator[tuple[Origin, str, readers.Row | str]]:
        """(origin, place, row), or the text itself of a text file."""
        local: list[tuple[Path, tuple[str, ...]]] = []
        for given in self.inputs:
            name = given.removeprefix(readers.HUB_PREFIX)
            if name != given:
                origin = Origin(name, split=name.partition(":")[2])
                for place, row in readers.hub_rows(name, self._columns):
                    yield origin, place, row
                continue
            root = Path(given)
            with _told(root):
                above = (
                    (os.path.basename(os.path.realpath(root)),)
                    if len(self.inputs) > 1 and root.is_dir()
                    else ()
                )
                local += [(path, above + inside) for path, inside in _files(root, tally)]
        splits = splits_of_files([inside for _, inside in local])
        for path, inside in local:
            with _told(path):
                yield from self._file_rows(path, inside, *splits.get(inside, ("", False)))

    def _file_rows(
        self, path: Path, inside: tuple[str, ...], split: str, held_out: bool
    ) -> Iterator[tuple[Origin, str, readers.Row | str]]:
        folder = inside[0] if len(inside) > 1 else ""
        where = "/".join(inside) or path.name
        if path.is_dir():
            parts = readers.saved_splits(path)
            held = own_splits(parts)
            for name, dataset in parts.items():
                source = "/".join([*inside, name]) if name else where
                origin = Origin(source, "", inside[0] if inside else "", name, name in held)
                said = f"{path}, {name}" if name else f"{path},"
                for place, row in readers.saved_rows(dataset, said, self._columns):
                    yield origin, place, row
        elif _ends(path, TEXT_ENDINGS):
            alone = any(path == Path(given) for given in self.inputs)
            source = "/".join(inside[:-1]) or (path.stem if alone else path.parent.name)
            origin = Origin(source, path.name, folder, split, held_out)
            for number, text in enumerate(readers.text_parts(path, self.separator), start=1):
                place = f"{path}, document {number}" if self.separator is not None else str(path)
                yield origin, place, text
        else:
            origin = Origin(where, path.name, folder, split, held_out)
            parquet = _ends(path, PARQUET_ENDINGS)
            rows = readers.parquet_rows(path, self._columns) if parquet else readers.json_rows(path)
            for place, row in rows:
                yield origin, place, row


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


def _files(root: Path, tally: Tally) -> list[tuple[Path, tuple[str, ...]]]:
    """Files and saved datasets under `root` and their parts below it, sorted; links are followed.

    Whatever is left out is in `tally`, or raises: never a folder less without a word.
    """
    if not root.exists():
        raise DataNotFoundError(
            f"no input at {root}" + (" (a link to nowhere)" if root.is_symlink() else ""),
            hint=f"Name a file, a folder, or a hub dataset as {readers.HUB_PREFIX}OWNER/NAME.",
        )
    if root.is_dir() and readers.is_saved_dataset(root):
        return [(root, ())]
    if root.is_file():
        if not _ends(root, ENDINGS):
            raise DataError(
                f"{root} has an ending Photon does not read ({root.suffix or root.name!r})",
                hint=f"It reads {', '.join(ENDINGS)}.",
            )
        return [(root, (root.name,))]
    found = sorted(_walk(root, (), tally))
    readable = [path for path in found if path.is_dir() or _ends(path, ENDINGS)]
    unread = [path for path in found if not (path.is_dir() or _ends(path, ENDINGS))]
    tally.unread.update(path.suffix or path.name for path in unread)
    if not readable:
        raise DataNotFoundError(
            f"{root} holds no file that Photon reads ({len(found)} files in all)",
            hint=f"It reads {', '.join(ENDINGS)}.",
        )
    return [(path, path.relative_to(root).parts) for path in readable]


def _walk(folder: Path, above: tuple[str, ...], tally: Tally) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(
            f"{folder} is a link to a folder that it lies in, so reading would never end",
            hint="Remove the link.",
        )
    for path in folder.iterdir():
        with _told(path):
            if path.name.startswith("."):
                tally.hidden += 1
            elif path.is_dir() and not readers.is_saved_dataset(path):
                yield from _walk(path, (*above, real), tally)
            elif path.is_file() or path.is_dir():
                yield path
            elif path.exists():
                tally.unread["no regular file"] += 1
            else:
                raise DataError(
                    f"{path} is a link to nowhere ({os.readlink(path)})",
                    hint="Mend or remove it: it may stand for text that is missing.",
                )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system says of an input that it won't read, as an error of Photon's."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"can't read {path}: {error.strerror or error}",
            hint="Make it readable, or move it out of the input.",
        ) from error
