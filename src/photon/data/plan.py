"""The first pass over the input: silo, split and source of every document, before any token."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from photon.data.ingest import Document, Origin, Source, Tally
from photon.data.options import PrepareOptions
from photon.data.partition import (
    ByField,
    DocumentInfo,
    Everything,
    Partitioner,
    folder_names,
)
from photon.data.splits import GLOBAL, LOCAL, position_of, split_documents
from photon.errors import DataError, DataNotFoundError, EmptySiloError, some

#: Told (stage, done, total); total is 0 where it is not known yet.
Reporter = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What happens to each document, in input order.

    Attributes:
        silos: folder name of its silo; "" where the input itself holds it out.
        splits: GLOBAL, LOCAL or TRAIN of `photon.data.splits`.
        sources: folder-safe name of its source.
        origins: where it came from.
        sizes: UTF-8 bytes of its text.
        positions: hash of its text, in [0, 1).
        seed: of the hash.
        remarks: what the user should know.
    """

    silos: list[str]
    splits: list[str]
    sources: list[str]
    origins: list[Origin]
    sizes: list[int]
    positions: list[float]
    seed: int
    remarks: list[str]

    def replay(self, source: Source, silo: str = "") -> Iterator[tuple[int, Document]]:
        """The input again, or what is a silo's alone: (number, document); DataError if changed."""
        number = -1
        for number, document in enumerate(source.documents()):
            if (
                number >= len(self.sizes)
                or position_of(document.text, self.seed) != self.positions[number]
            ):
                break
            if not silo or (self.silos[number] == silo and self.splits[number] != GLOBAL):
                yield number, document
        else:
            if number + 1 == len(self.sizes):
                return
        raise DataError(
            f"{', '.join(source.inputs)} changed while it was read: document {number + 1} of "
            f"{len(self.sizes)} is not what it was at first",
            hint="Run again once nothing writes to it.",
        )

    def training(self, number: int, silo: str = "") -> bool:
        """Whether a document is trained on, by that silo if one is named."""
        return self.splits[number] not in (GLOBAL, LOCAL) and silo in ("", self.silos[number])


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
    for index, document in enumerate(source.documents(tally)):
        fields = {sys.intern(name): sys.intern(value) for name, value in document.fields.items()}
        infos.append(DocumentInfo(index, fields, document.bytes, document.origin))
        positions.append(position_of(document.text, options.seed))
        if index % 256 == 0:
            report("reading", index, 0)
    report("reading", len(infos), len(infos))
    if not infos:
        raise DataNotFoundError(
            f"{', '.join(options.inputs)} holds no text ({tally.empty} documents are empty)",
            hint="Name an input with text in it.",
        )
    if len(infos) == 1 and not options.held_out_only:
        raise EmptySiloError(
            f"{', '.join(options.inputs)} holds a single document, and it takes three to train on "
            "one and hold out one for the silo and one for all",
            hint="A text file is one document, unless --separator says what parts its documents, "
            r"for example --separator '\n\n'.",
        )
    remarks = tally.remarks()
    silos, splits = _parted(infos, positions, options, partitioner, remarks)
    sources = ["text"] * len(infos)
    if options.source_field is not None:
        by_field = ByField(options.source_field, "--source-field").assign(infos, options.seed)
        sources = folder_names(by_field, "sources")
    sizes = [info.bytes for info in infos]
    origins = [info.origin for info in infos]
    return Plan(silos, splits, sources, origins, sizes, positions, options.seed, remarks)


def _parted(
    infos: list[DocumentInfo],
    positions: list[float],
    options: PrepareOptions,
    partitioner: Partitioner,
    remarks: list[str],
) -> tuple[list[str], list[str]]:
    """(silos, splits) of all documents; what the input itself holds out is in no silo."""
    silos, splits = [""] * len(infos), [GLOBAL] * len(infos)
    if options.held_out_only:
        return silos, splits
    held = [info.origin.held_out and not options.ignore_splits for info in infos]
    rest = [n for n, own in enumerate(held) if not own]
    own = {position for position, own in zip(positions, held, strict=True) if own}
    if not rest:
        raise EmptySiloError(
            f"all {len(infos)} documents are in splits that the input itself holds out",
            hint="Train on them with --ignore-splits, or only score with --held-out-only.",
        )
    named = _silos([infos[n] for n in rest], options, partitioner, remarks)
    # Nothing of how silos were made: the set must not depend on it.
    strata = [[infos[n].origin.source for n in rest], [infos[n].origin.folder for n in rest]]
    if options.stratify_field is not None:
        by_field = ByField(options.stratify_field, "--stratify-field")
        strata.append(by_field.assign([infos[n] for n in rest], options.seed))
    found, helped = split_documents(
        [positions[n] for n in rest],
        named,
        global_fraction=options.global_fraction,
        silo_fraction=options.silo_fraction,
        own=own,
        strata=strata,
    )
    for n, silo, split in zip(rest, named, found, strict=True):
        silos[n], splits[n] = silo, split
    # Silos are of a kind of text each: not drawn at random, or cut by size.
    if options.iid is None and options.dirichlet is None and options.contiguous is None:
        remarks += _unheard(silos, splits, [info.bytes for info in infos])
    if own:
        names = sorted({infos[n].origin.split for n, is_own in enumerate(held) if is_own})
        copies = found.count(GLOBAL)
        remarks.append(
            f"the input's own splits ({', '.join(names)}: {sum(held)} documents"
            + (f", and {copies} copies of them among the rest" if copies else "")
            + ") are the global held-out set, and --global-fraction is not used; to train on them "
            "like on the rest: --ignore-splits"
        )
    remarks += helped
    return silos, splits


def _unheard(silos: list[str], splits: list[str], sizes: list[int]) -> list[str]:
    """A remark on silos that the global set holds nothing of."""
    heard = {silo for silo, split in zip(silos, splits, strict=True) if split == GLOBAL}
    unheard = sorted(set(silos) - heard)
    if not unheard or "" in heard:
        return []
    own = sum(size for silo, size in zip(silos, sizes, strict=True) if silo in unheard)
    return [
        f"the global held-out set holds nothing of {len(unheard)} silos ({some(unheard, 8)}; "
        f"{own / sum(sizes):.0%} of all text): --stratify-field NAME takes some of each value of a "
        "field, a larger --global-fraction more of everything"
    ]


def _silos(
    infos: list[DocumentInfo],
    options: PrepareOptions,
    partitioner: Partitioner,
    remarks: list[str],
) -> list[str]:
    if isinstance(partitioner, Everything):
        remarks.append("nothing says how to make silos, so all text is one silo, 'all'")
    names = list(partitioner.assign(infos, options.seed))
    if len(names) != len(infos) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"the partitioner {type(partitioner).__name__} named {len(names)} silos for "
            f"{len(infos)} documents; it must give one string for each"
        )
    small = {name for name, count in Counter(names).items() if count < options.min_documents}
    if small:
        remarks.append(
            f"{len(small)} silos with fewer than {options.min_documents} documents were folded "
            f"into 'other': {some(sorted(small), 8)}"
        )
    return folder_names(["other" if name in small else name for name in names])
