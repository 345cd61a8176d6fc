"""Several runs side by side: the federated one against its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from photon.dashboard import wording
from photon.dashboard.digest import SAME_TOKENIZER, RunDigest, cut_alike, read_digest


@dataclass(frozen=True)
class ComparisonRow:
    """One run of a comparison.

    Attributes:
        label: what the run is called in the table, e.g. "federated", "alone: democratic".
        tokens: tokens it trained on.
        perplexity: on the global held-out text; None where it was not evaluated.
        bits_per_byte: on the same text; None where it was not evaluated, or has no sense.
        seconds: wall-clock time; None where it is not known.
        federated: the row that the gap of the others is measured against.
    """

    label: str
    tokens: int
    perplexity: float | None
    bits_per_byte: float | None
    seconds: float | None
    federated: bool = False

    @classmethod
    def of(cls, label: str, digest: RunDigest, *, federated: bool = False) -> ComparisonRow:
        """The row of a run that was read already."""
        last = digest.last
        scores = last.score if last else (None, None)
        return cls(label, digest.tokens, *scores, digest.wall_s, federated)

    @classmethod
    def read(cls, label: str, run_folder: Path, *, federated: bool = False) -> ComparisonRow:
        """The row of a run folder; raises RunNotFoundError where there is no run."""
        return cls.of(label, read_digest(Path(run_folder)), federated=federated)


def compared_by(rows: Sequence[ComparisonRow]) -> Literal["perplexity", "bits_per_byte"]:
    """Perplexity, or bits per byte where the runs' tokenizers cut the same text differently."""
    alike = cut_alike([(row.perplexity, row.bits_per_byte) for row in rows], SAME_TOKENIZER)
    return "perplexity" if alike else "bits_per_byte"


def gap(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> float | None:
    """`compared_by` over the federated run's, less one: + is worse. None for that run itself."""
    federated = next((other for other in rows if other.federated), None)
    if federated is None or row.federated:
        return None
    measure = compared_by(rows)
    ours, theirs = getattr(federated, measure), getattr(row, measure)
    return theirs / ours - 1 if ours and theirs else None


def gap_in_words(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> str:
    """Its gap as tables and sentences give it: `+4.2%`."""
    difference = gap(row, rows)
    return "–" if difference is None else wording.signed_percent(difference)


def in_words(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """A row as tables show it."""
    return {
        "label": wording.one_line(row.label),
        "tokens": wording.count(row.tokens),
        "perplexity": wording.perplexity(row.perplexity),
        "bits": wording.decimal(row.bits_per_byte),
        "gap": gap_in_words(row, rows),
        "time": "–" if row.seconds is None else wording.duration(row.seconds),
    }


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """A table for the terminal; the gap is to the federated row, + is worse."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold")  # Alone in giving way: no number is ever cut.
    for title in ("tokens", "perplexity", "bits/byte", "vs federated", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        difference = gap(row, rows)
        style = "" if difference is None else "green" if difference < 0 else "yellow"
        bold = "bold" if row.federated else ""
        styles = {"label": bold, "perplexity": "bold", "gap": style}
        cells = in_words(row, rows).items()
        table.add_row(*(Text(text, style=styles.get(name, "")) for name, text in cells))
    return table
