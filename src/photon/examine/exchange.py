"""Examinations on disk, written whole and read as a stranger's; and several side by side."""

import io
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import ValidationError

from photon.errors import DataError, DataNotFoundError, first_fault
from photon.examine.cells import publish
from photon.examine.examination import Examination
from photon.examine.signatures import BANDS, alike
from photon.store.disk import file_sha256, write_whole
from photon.telemetry.events import Evaluated
from photon.telemetry.history import RunHistory

_MOST_BYTES = 1_000_000
#: A language or domain that so many of all documents are in, and hardly any of a silo's, is a gap.
_GAP = 0.01
#: (of, what): silo -> share of its documents, or nats a token from its mean. Absent: not told.
Figures = dict[tuple[str, str], dict[str, float]]


def write_examination(path: Path, record: Examination, signatures: np.ndarray | None) -> None:
    """Write an examination; and, before it, its signatures beside it, as .signatures.npy."""
    if signatures is not None:
        content, beside = io.BytesIO(), path.with_suffix(".signatures.npy")
        np.save(content, signatures)
        write_whole(beside, content.getvalue(), "signatures")
        record = record.model_copy(update={"signatures_sha256": file_sha256(beside)})
    write_whole(path, record.model_dump_json(indent=1, exclude_none=True) + "\n", "an examination")


def read_examination(path: Path) -> Examination:
    """A site's; raises DataNotFoundError, or DataError where it is none."""
    hint = "A site makes it: `photon data examine DATA --silo NAME --out FILE.json`."
    if not path.is_file():
        raise DataNotFoundError(f"no examination at {path}", hint=hint)
    try:
        with path.open("rb") as file:
            return Examination.model_validate_json(file.read(_MOST_BYTES))
    except ValidationError as error:
        raise DataError(f"{path} is no examination: {first_fault(error)}", hint=hint) from None


def _read_signatures(path: Path, record: Examination) -> np.ndarray | None:
    beside = path.with_suffix(".signatures.npy")
    if record.signatures_sha256 is None or not beside.is_file():
        return None
    same = file_sha256(beside) == record.signatures_sha256
    try:
        found = np.load(beside, mmap_mode="r", allow_pickle=False)
    except ValueError:
        found = np.empty(0)
    if not same or found.dtype != "<u8" or found.shape != (record.documents, BANDS):
        what = f"of {path}: {BANDS} numbers for each of {record.documents} documents"
        raise DataError(f"{beside} does not hold the signatures {what}", hint="Ask for both files.")
    return found


def compare(paths: list[Path]) -> tuple[Figures, list[tuple[str, str]]]:
    """Figures of all silos; and what stands out, as (of, what) in words.

    Raises:
        DataNotFoundError, DataError: one can't be read, two are of one silo, or they can't be
            compared: made with other detectors, held-out sets or keys.
    """
    records = {path: read_examination(path) for path in paths}
    silos = {one.silo: one for one in records.values()}
    for what in ("method", "held_out_sha256", "key"):
        values = {path: getattr(one, what) for path, one in records.items()}
        if len({*values.values()}) > 1:
            told = ", ".join(f"{path} has {value}" for path, value in values.items())
            hint = "Sites use one version of Photon, one --held-out set, and one --key or none."
            raise DataError(f"these can't be compared by {what}: {told}", hint=hint)
    if len(silos) < len(records) or len(records) < len(paths):
        raise DataError(f"{len(paths)} examinations are of {len(silos)} silos: {', '.join(silos)}")
    figures: Figures = {}
    for silo, one in silos.items():
        for name, table in one.tables.items():
            total = sum(table.cells.values()) + table.joined_documents
            # One that only cells too small to be told are with is told as it is.
            more = {table.joined[0]: table.joined_documents} if len(table.joined) == 1 else {}
            for cell, count in (table.cells | more).items():
                figures.setdefault((name, cell), {})[silo] = count / total
        for group, loss in one.losses.items():
            away = loss - fmean(one.losses.values())
            figures.setdefault(("loss less mean", group), {})[silo] = away
    return figures, [*_gaps(figures, silos), *_shared(records)]


def _gaps(figures: Figures, silos: dict[str, Examination]) -> Iterator[tuple[str, str]]:
    total = sum(one.documents for one in silos.values())
    for (name, cell), shares in figures.items():
        tables = {silo: one.tables[name] for silo, one in silos.items() if name in one.tables}
        few = [silo for silo, one in tables.items() if cell not in [*one.cells, *one.joined]]
        many = sum(share * silos[silo].documents for silo, share in shares.items())
        if name in ("languages", "domains") and few and many >= _GAP * total:
            yield f"{name}: {cell}", f"hardly any in {', '.join(few)}"


def _shared(records: dict[Path, Examination]) -> Iterator[tuple[str, str]]:
    read = ((one, _read_signatures(path, one)) for path, one in records.items())
    signed = [(one, signatures) for one, signatures in read if signatures is not None]
    for (one, mine), (other, others) in permutations(signed, 2):
        count = int(alike(mine, others).sum())
        counts = {"alone": len(mine) - count, "there": count}
        table = publish(counts, [*counts], max(one.min_cell, other.min_cell))
        if table is None or "there" in table.joined:
            told = "nearly all"
        else:
            told = f"{count:,}" if "there" in table.cells else "hardly any"
        yield f"copies: {one.silo}", f"{told} of {one.documents:,} are in {other.silo} too"


def behind(history: RunHistory) -> Iterator[tuple[str, str]]:
    """(silo, in words): how its held-out loss stands to the silos' mean, round by round."""
    rounds: dict[int, dict[str, float]] = {}
    for one in history.of(Evaluated):
        if one.silo is not None and one.loss is not None:
            rounds.setdefault(one.round, {})[one.silo] = one.loss
    every = [rounds[number] for number in sorted(rounds)]
    means = [fmean(losses.values()) for losses in every]
    for silo in sorted(set.intersection(*map(set, every)) if every else ()):
        own = [losses[silo] for losses in every]
        away = [loss - mean for loss, mean in zip(own, means, strict=True)]
        lost = sum(own[n] > own[n - 1] and means[n] < means[n - 1] for n in range(1, len(own)))
        above = sum(one > 0 for one in away)
        told = f"{away[0]:+.3f} nats from the silos' mean at first, {away[-1]:+.3f} at last; above "
        told += f"it in {above} of {len(own)} scores; rose {lost} times while the mean fell"
        yield f"loss: {silo}", told
