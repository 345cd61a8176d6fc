"""`photon data examine` and `photon data compare`: what text is, without showing it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from photon.cli.data import progress_bar
from photon.cli.options import option
from photon.cli.screen import console, say, show, show_table
from photon.errors import InvalidValueError

_PROBES = "With --model: prepared text that all sites have, a silo a group."
_HELD_OUT = "Prepared folder whose global held-out set to look for; DATA by default."


def examine(
    folder: Annotated[Path, typer.Argument(help="Prepared text.", metavar="DATA")],
    silo: Annotated[str, option("Which silo of it.")],
    out: Annotated[Path | None, option("Where to write what is shown: SILO.json.")] = None,
    key: Annotated[Path | None, option("The sites' key, to find copies across sites.")] = None,
    held_out: Annotated[Path | None, option(_HELD_OUT)] = None,
    probes: Annotated[Path | None, option(_PROBES)] = None,
    model: Annotated[Path | None, option("Run or Hugging Face folder, for --probes.")] = None,
    min_cell: Annotated[int, option("No count of fewer documents leaves.")] = 10,
    yes: Annotated[bool, option("Write without asking.", "--yes", "-y")] = False,
) -> None:
    """Count what a silo's text holds: languages, domains, copies, personal data, licences.

    All that would leave is shown first. No text does, and no count below `--min-cell` documents.

    Example: `photon data examine data/prepared --silo north --key sites.key --out north.json`
    """
    from photon.data import open_data
    from photon.examine import examination
    from photon.examine.exchange import write_examination
    from photon.examine.signatures import read_key

    if (probes is None) != (model is None):
        raise InvalidValueError("--probes and --model go together", hint="Give both, or neither.")
    if out is not None and out.suffix != ".json":
        raise InvalidValueError(f"--out {out} does not end in .json", hint="Name it SILO.json.")
    given: dict[str, Any] = {"key": key and read_key(key), "min_cell": min_cell}
    data = open_data(folder, own_vocabularies=True)
    given["held_out"] = held_out and open_data(held_out, only_to_score=True)
    if probes is not None and model is not None:
        from photon.products import evaluate  # torch

        scores = evaluate(model, probes).per_silo
        given["losses"] = {group: one.loss for group, one in scores.items()}
    with progress_bar(console()) as report:
        workers = len(os.sched_getaffinity(0))
        found = examination.examine(data, silo, **given, workers=workers, progress=report)
    figures = found[0].figures().items()
    rows = ((name, f"{number:,g}") for name, number in figures if "not found" not in name)
    show_table(("figure", silo), rows)
    few = [name for name, table in found[0].tables.items() if table.joined == ["not found"]]
    show(f"In fewer than {min_cell} documents, or none: {', '.join(few) or 'nothing'}.")
    if out is None:
        say("Nothing is written without --out.")
    elif yes or typer.confirm(f"Write this to {out}?", err=True):
        write_examination(out, *found)
        say(f"Written: {out}" + (", and its signatures beside it" if key else ""))


def compare(
    files: Annotated[list[Path], typer.Argument(help="Examinations.", metavar="A.json B.json")],
    run: Annotated[Path | None, option("Also whose loss stayed behind in this run.")] = None,
) -> None:
    """Hold silos' examinations side by side: gaps, copies, held-out text that was trained on.

    Signatures are those beside an examination (A.signatures.npy), if it has any.

    Example: `photon data compare north.json south.json --run runs/demo`
    """
    from photon.examine import exchange
    from photon.telemetry import read_history

    figures, told = exchange.compare(files)
    told += exchange.behind(read_history(run)) if run is not None else []
    silos = sorted({silo for by_silo in figures.values() for silo in by_silo})
    rows = [
        (of, what, *(f"{by[one]:.3f}" if one in by else "-" for one in silos))
        for (of, what), by in sorted(figures.items())
        if what != "not found"
    ]
    show_table(("of", "what", *silos), rows)
    show_table(("of", "finding"), told)
