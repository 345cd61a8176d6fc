"""The first pass over the input: silo, split and source of every document, before any token."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from photon.data.ingest import Document, Source, Tally
from photon.data.options import PrepareOptions
from photon.data.partition import ByField, DocumentInfo, Partitioner, fold_small, folder_names
from photon.data.splits import GLOBAL, LOCAL, position_of, split_documents
from photon.errors import DataError, DataNotFoundError

#: Told (stage, done, total); total is 0 where it is not known yet.
Reporter = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What happens to each document, in input order.

    Attributes:
        silos: folder name of its silo.
        splits: GLOBAL, LOCAL or TRAIN of `photon.data.splits`.
        sources: folder-safe name of its source.
        sizes: UTF-8 bytes of its text.
        positions: hash of its text, in [0, 1).
        seed: of the hash.
        remarks: what the user should know.
    """

    silos: list[str]
    splits: list[str]
    sources: list[str]
    sizes: list[int]
    positions: list[float]
    seed: int
    remarks: list[str]

    def replay(self, source: Source) -> Iterator[tuple[int, Document]]:
        """Read the input again: (number, document), checked to be what was planned.

        Raises:
            DataError: the input changed in between.
        """
        number = -1
        for number, document in enumerate(source.documents()):
            if (
                number >= len(self.sizes)
                or position_of(document.text, self.seed) != self.positions[number]
            ):
                break
            yield number, document
        else:
            if number + 1 == len(self.sizes):
                return
        raise DataError(
            f"{source.input} changed while it was read: document {number + 1} of "
            f"{len(self.sizes)} is not what it was at first",
            hint="Run again once nothing writes to it.",
        )

    def training(self, number: int) -> bool:
        """Whether a document is trained on."""
        return self.splits[number] not in (GLOBAL, LOCAL)


def make_plan(
    source: Source, options: PrepareOptions, partitioner: Partitioner, report: Reporter
) -> Plan:
    """Read the input once and decide; keeps of each document some bytes, never its text.

    Raises:
        DataNotFoundError: no input, or no text in it.
        DataError, EmptySiloError: it can't be read, or not be parted in this way.
    """
    infos: list[DocumentInfo] = []
    positions: list[float] = []
    tally = Tally()
    wanted = options.fields_read
    for index, document in enumerate(source.documents(tally)):
        fields = _kept(document.fields, wanted)
        infos.append(DocumentInfo(index, fields, document.bytes, sys.intern(document.source)))
        positions.append(position_of(document.text, options.seed))
        if index % 256 == 0:
            report("reading", index, 0)
    report("reading", len(infos), len(infos))
    if not infos:
        raise DataNotFoundError(
            f"{options.input} holds no text ({tally.empty} documents are empty)",
            hint="Name an input with text in it.",
        )
    remarks = tally.remarks()
    silos = _silos(infos, options, partitioner, remarks)
    splits, helped = split_documents(
        positions,
        silos,
        global_fraction=options.global_fraction,
        silo_fraction=options.silo_fraction,
    )
    sources = ["text"] * len(infos)
    if options.source_field is not None:
        by_field = ByField(options.source_field, "--source-field").assign(infos, options.seed)
        sources = folder_names(by_field, "sources")
    sizes = [info.bytes for info in infos]
    return Plan(silos, splits, sources, sizes, positions, options.seed, remarks + helped)


def _kept(fields: Mapping[str, str], wanted: set[str] | None) -> Mapping[str, str]:
    # All of them where one is missing, so that the error can say what there is.
    if wanted is None or not wanted <= fields.keys() | {"folder", "file"}:
        return fields
    return {name: sys.intern(fields[name]) for name in wanted if name in fields}


def _silos(
    infos: list[DocumentInfo],
    options: PrepareOptions,
    partitioner: Partitioner,
    remarks: list[str],
) -> list[str]:
    names = list(partitioner.assign(infos, options.seed))
    if len(names) != len(infos) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"the partitioner {type(partitioner).__name__} named {len(names)} silos for "
            f"{len(infos)} documents; it must give one string for each"
        )
    small = sorted(name for name, count in Counter(names).items() if count < options.min_documents)
    if small:
        shown = ", ".join(small[:8]) + (", ..." if len(small) > 8 else "")
        remarks.append(
            f"{len(small)} silos with fewer than {options.min_documents} documents were folded "
            f"into 'other': {shown}"
        )
    return folder_names(fold_small(names, options.min_documents))
