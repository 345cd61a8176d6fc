"""Which document belongs to which silo."""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from photon.data.ingest import Origin
from photon.data.readers import PROVENANCE, no_field
from photon.errors import DataError, EmptySiloError

_DRAWS = 100
_LONGEST_NAME = 100


@dataclass(frozen=True)
class DocumentInfo:
    """What a partitioner may look at.

    Attributes:
        index: its place in the input, from 0.
        fields: columns that stood beside the text.
        bytes: UTF-8 bytes of the text.
        origin: the file, folder and split that it came out of.
    """

    index: int
    fields: Mapping[str, str]
    bytes: int
    origin: Origin = field(default_factory=Origin)


class Partitioner(ABC):
    """Names a silo for each document. Plugins derive from it; their options are strings."""

    @abstractmethod
    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        """A silo name per document, in their order; the same seed gives the same names."""


class ByField(Partitioner):
    """One silo per value of a field, e.g. source, party, topic or language."""

    def __init__(self, field: str, option: str = "--silo-field") -> None:
        self._field, self._option = field, option

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        return [_field(document, self._field, self._option) for document in documents]


class ByFolder(Partitioner):
    """One silo per first-level folder of the input."""

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        for document in documents:
            if not document.origin.folder:
                raise DataError(
                    f"--silo-folders: {document.origin.file or 'the input'} lies in no "
                    "folder of the input",
                    hint="Put each silo's files into a folder of its own.",
                )
        return [document.origin.folder for document in documents]


class ByTree(Partitioner):
    """One silo per folder with files, named by its way: eu/banks is eu.banks.

    What lies in a folder beside other folders, or in the input itself, is a silo "own" of it.
    """

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        ways = []
        for document in documents:
            *way, last = document.origin.source.split("/")
            deep = document.origin.folder and last != document.origin.file
            ways.append((*way, last) if deep else tuple(way))
        inner = {way[:depth] for way in ways for depth in range(len(way))}
        return [".".join([*way, "own"] if way in inner or not way else way) for way in ways]


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

    For each label k, p_k ~ Dir_N(alpha) says which part of its documents each of the N silos gets.
    Small alpha gives silos of few labels, large alpha approaches equal shares (Yurochkin et al.
    2019, arXiv 1905.12022). A draw that leaves a silo with fewer than two documents is repeated.

    Args:
        count: N.
        alpha: concentration, above 0.
        label_field: the label; the document's source (file or folder) by default.
    """

    def __init__(self, count: int, alpha: float, label_field: str | None = None) -> None:
        self._count, self._label_field = _positive(count, "--dirichlet"), label_field
        if not (alpha > 0 and math.isfinite(alpha)):
            raise DataError(
                f"--dirichlet {count}:{alpha:g}: alpha must be a number above 0",
                hint="0.1 gives very different silos, 100 nearly alike ones.",
            )
        self._alpha = alpha

    def assign(self, documents: Sequence[DocumentInfo], seed: int) -> list[str]:
        _require_enough(documents, self._count)
        labels: dict[str, list[int]] = defaultdict(list)
        for position, document in enumerate(documents):
            labels[self._label(document)].append(position)
        for attempt in range(_DRAWS):
            generator = np.random.default_rng([seed, 2, attempt])
            numbers = np.zeros(len(documents), dtype=int)
            for label in sorted(labels):
                positions = generator.permutation(labels[label])
                shares = generator.dirichlet(np.full(self._count, self._alpha))
                cuts = np.rint(np.cumsum(shares)[:-1] * len(positions)).astype(int)
                # Rounding leaves the first and last parts of a small label empty: in a fixed order
                # of silos these would always be the same two.
                order = generator.permutation(self._count)
                for number, part in zip(order, np.split(positions, cuts), strict=True):
                    numbers[part] = number
            if min(np.bincount(numbers, minlength=self._count)) >= 2:
                return _numbered(numbers, self._count)
        raise EmptySiloError(
            f"--dirichlet {self._count}:{self._alpha:g} left a silo with fewer than 2 documents "
            f"in each of {_DRAWS} draws",
            hint="Use fewer silos or a larger alpha.",
        )

    def _label(self, document: DocumentInfo) -> str:
        if self._label_field is None:
            return document.origin.source
        return _field(document, self._label_field, "--label-field")


def folder_names(names: Sequence[str], kind: str = "silos") -> list[str]:
    """Names of silos or sources as safe folder names.

    Raises DataError if two would share a folder, or a name is too long for one or can't be written.
    """
    safe: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in name.strip().lower())
        plain = safe[name] = plain.strip(".-") or "unnamed"
        if len(plain.encode("utf-8")) > _LONGEST_NAME:
            raise DataError(
                f"{name[:60]!r}... is too long to name one of the {kind} ({len(plain)} characters)",
                hint="Partition by a field with short values.",
            )
        try:
            os.fsencode(plain)
        except UnicodeEncodeError:
            raise DataError(
                f"{name!a} can't name one of the {kind}: file names on this machine are "
                f"{sys.getfilesystemencoding()}",
                hint="Set LC_ALL=C.UTF-8, or rename it in the input.",
            ) from None
        if plain in taken:
            raise DataError(
                f"{kind} {taken[plain]!r} and {name!r} would share the folder {plain!r}",
                hint="Rename one of them in the input.",
            )
        taken[plain] = name
    return [safe[name] for name in names]


def _numbered(numbers: np.ndarray, count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"silo-{number:0{width}d}" for number in numbers.tolist()]


def _field(document: DocumentInfo, field: str, option: str) -> str:
    asked_of_photon = field in PROVENANCE
    value = getattr(document.origin, field[1:]) if asked_of_photon else document.fields.get(field)
    if value is None or not value.strip():
        where = document.origin.file or f"document {document.index + 1}"
        raise no_field(option, field, where, document.fields)
    return value


def _positive(count: int, option: str) -> int:
    if count < 1:
        raise DataError(f"{option} {count}: at least 1 silo is needed")
    return count


def _require_enough(documents: Sequence[DocumentInfo], count: int) -> None:
    most = len(documents) // 2
    if most < count:
        raise EmptySiloError(
            f"{len(documents)} document{'' if len(documents) == 1 else 's'} can't fill {count} "
            f"silo{'' if count == 1 else 's'}: each needs at least 2",
            hint=f"Ask for at most {most} silo{'' if most == 1 else 's'}."
            if most
            else "Give it more documents.",
        )
