"""Which document belongs to which silo."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from photon.errors import DataError, EmptySiloError


@dataclass(frozen=True)
class DocumentInfo:
    """What a partitioner may look at.

    Attributes:
        fields: columns that stood beside the text.
        bytes: UTF-8 bytes of the text.
    """

    index: int
    fields: Mapping[str, str]
    bytes: int


class Partitioner(ABC):
    """Names a silo for each document. Plugins derive from it; their options are strings."""

    @abstractmethod
    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        """A silo name per document, in their order; the same seed gives the same names."""


class ByField(Partitioner):
    """One silo per value of a field, e.g. source, party, topic or language."""

    def __init__(self, field: str) -> None:
        self._field = field

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        return [_field(document, self._field, "--silo-field") for document in documents]


class ByFolder(Partitioner):
    """One silo per first-level folder of the input."""

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        for document in documents:
            if not document.fields.get("folder"):
                raise DataError(
                    f"--silo-folders: {document.fields.get('file', 'the input')} lies in no "
                    "folder of the input",
                    hint="Put each silo's files into a folder of its own.",
                )
        return [document.fields["folder"] for document in documents]


class Everything(Partitioner):
    """A single silo."""

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        return ["all"] * len(documents)


class Iid(Partitioner):
    """N silos of nearly equal document counts, drawn at random."""

    def __init__(self, count: int) -> None:
        self._count = _positive(count, "--iid")

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        _require_enough(documents, self._count)
        numbers = np.arange(len(documents)) % self._count
        np.random.default_rng([seed, 1]).shuffle(numbers)
        return _numbered(numbers, self._count)


class Contiguous(Partitioner):
    """N consecutive slices of nearly equal bytes, in document order."""

    def __init__(self, count: int) -> None:
        self._count = _positive(count, "--contiguous")

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        _require_enough(documents, self._count)
        sizes = np.array([document.bytes for document in documents], dtype=np.float64)
        middles = np.cumsum(sizes) - sizes / 2
        numbers = np.minimum((middles / sizes.sum() * self._count).astype(int), self._count - 1)
        if len(set(numbers.tolist())) < self._count:  # a few giants: fall back to counts
            numbers = np.arange(len(documents)) * self._count // len(documents)
        return _numbered(numbers, self._count)


class Dirichlet(Partitioner):
    """N silos with label skew: each label's documents are shared out by Dirichlet(alpha).

    Small alpha gives silos of few labels, large alpha approaches IID (Hsu et al. 2019,
    arXiv 1909.06335).
    """

    def __init__(self, count: int, alpha: float, label_field: str) -> None:
        self._count, self._label_field = _positive(count, "--dirichlet"), label_field
        if not alpha > 0:
            raise DataError(f"--dirichlet: alpha = {alpha} must be above 0")
        self._alpha = alpha

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        _require_enough(documents, self._count)
        labels: dict[str, list[int]] = defaultdict(list)
        for position, document in enumerate(documents):
            labels[_field(document, self._label_field, "--label-field")].append(position)
        for attempt in range(100):
            generator = np.random.default_rng([seed, 2, attempt])
            numbers = np.zeros(len(documents), dtype=int)
            for label in sorted(labels):
                positions = generator.permutation(labels[label])
                shares = generator.dirichlet(np.full(self._count, self._alpha))
                cuts = np.rint(np.cumsum(shares)[:-1] * len(positions)).astype(int)
                for number, part in enumerate(np.split(positions, cuts)):
                    numbers[part] = number
            if min(np.bincount(numbers, minlength=self._count)) >= 2:
                return _numbered(numbers, self._count)
        raise EmptySiloError(
            f"--dirichlet {self._count}:{self._alpha:g} left a silo with fewer than 2 documents "
            "in each of 100 draws",
            hint="Use fewer silos or a larger alpha.",
        )


def fold_small(names: Sequence[str], least: int, into: str = "other") -> list[str]:
    """Silos with fewer than `least` documents become one."""
    counts = Counter(names)
    return [name if counts[name] >= least else into for name in names]


def folder_names(names: Sequence[str]) -> list[str]:
    """Silo names as safe folder names.

    Raises:
        DataError: two silos would share a folder.
    """
    safe: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in name.strip().lower())
        safe[name] = plain.strip(".-") or "unnamed"
    taken: dict[str, str] = {}
    for name, plain in safe.items():
        if plain in taken:
            raise DataError(
                f"silos {taken[plain]!r} and {name!r} would share the folder {plain!r}",
                hint="Rename one of them in the input.",
            )
        taken[plain] = name
    return [safe[name] for name in names]


def _numbered(numbers: np.ndarray, count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"silo-{number:0{width}d}" for number in numbers.tolist()]


def _field(document: DocumentInfo, field: str, option: str) -> str:
    value = document.fields.get(field)
    if value is None or not value.strip():
        where = document.fields.get("file", f"document {document.index + 1}")
        raise DataError(
            f"{option} {field}: {where} has no such field; it has "
            f"{', '.join(sorted(document.fields)) or 'none'}",
            hint="Name a field that every document has (--metadata joins a CSV to text files).",
        )
    return value


def _positive(count: int, option: str) -> int:
    if count < 1:
        raise DataError(f"{option}: {count} silos; at least 1 is needed")
    return count


def _require_enough(documents: Sequence[DocumentInfo], count: int) -> None:
    if len(documents) < 2 * count:
        raise EmptySiloError(
            f"{len(documents)} documents can't fill {count} silos: each needs at least 2",
            hint=f"Ask for at most {len(documents) // 2} silos.",
        )
