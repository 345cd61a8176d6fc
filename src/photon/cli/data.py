"""`photon data`: text in, tokenised silos out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from photon.cli.options import AsJson, option, taking
from photon.cli.screen import console, say, show, show_json, show_table
from photon.errors import InvalidValueError

if TYPE_CHECKING:
    from photon.data import PreparedData, SiloData

data_app = typer.Typer(
    help="Prepare text for training, and look at what is prepared.", no_args_is_help=True
)

#: Between lines about the work at hand, where no terminal shows a bar.
_LINE_EVERY_S = 20.0

_PROBES = "With --model: prepared text that all sites have, a silo a group."
_HELD_OUT = "Prepared folder whose global held-out set to look for; DATA by default."


def _shown_in(panel: str) -> Callable[..., Any]:
    """Options under a heading of their own: their help, their names, and what else they take."""
    return lambda words, *names, **more: typer.Option(
        *names, help=words, rich_help_panel=panel, **more
    )


_how = _shown_in("How to make silos (one of these)")
_text = _shown_in("What to read")
_tokens = _shown_in("Tokenizer")
_split = _shown_in("Held-out text")


@dataclass
class _Prepare:
    """What PrepareOptions has, as it is typed."""

    input: Annotated[
        list[str],
        _text(
            "Text file, JSONL (.gz, .zst), parquet, a folder of these, a saved Hugging Face "
            "dataset, or hf:OWNER/NAME or hf:OWNER/NAME/CONFIG:SPLIT for one on the hub. "
            "Repeatable: all are read, as if they lay in one folder.",
            "--input",
            metavar="PATH_OR_NAME",
        ),
    ]
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")]
    silo_field: Annotated[
        str | None,
        _how(
            "One silo per value of this field; what Photon knows of a document is called "
            "@file, @folder, @split, @source."
        ),
    ] = None
    iid: Annotated[int | None, _how("N silos, documents at random.")] = None
    dirichlet: Annotated[
        str | None,
        _how(
            "N silos with unlike mixes of labels, the less alike the smaller ALPHA is; see "
            "--label-field.",
            metavar="N:ALPHA",
        ),
    ] = None
    contiguous: Annotated[int | None, _how("N consecutive slices.")] = None
    silo_folders: Annotated[bool, _how("One silo per first-level folder.", "--silo-folders")] = (
        False
    )
    silo_tree: Annotated[
        bool, _how("One silo per folder at any depth: eu/banks is eu.banks.", "--silo-tree")
    ] = False
    partitioner: Annotated[str | None, _how("One that a plugin registered.")] = None
    partitioner_options: Annotated[
        list[str] | None,
        _how("For --partitioner. Repeatable.", "--partitioner-option", metavar="KEY=VALUE"),
    ] = None
    label_field: Annotated[
        str | None,
        _how("Field whose values --dirichlet skews; the document's file or folder by default."),
    ] = None
    min_documents: Annotated[int, _how("Fold silos with fewer documents into 'other'.")] = 1
    text_key: Annotated[str, _text("Key of the text in JSONL, parquet, datasets.")] = "text"
    metadata: Annotated[
        Path | None,
        _text("CSV with a row for each text file, found by its name without the ending."),
    ] = None
    metadata_key: Annotated[
        str | None, _text("Its column with those names; the first by default.")
    ] = None
    separator: Annotated[
        str | None,
        _text(r"Parts text files into documents, e.g. '\n\n\n'; else a file is one document."),
    ] = None
    source_field: Annotated[
        str | None, _text("Field that names a document's source inside its silo, for data.mixture.")
    ] = None
    tokenizer: Annotated[
        Path | None,
        _tokens("tokenizer.json, its folder, or a federation's invitation; else one is trained."),
    ] = None
    vocab_size: Annotated[int, _tokens("Of the tokenizer that is trained.")] = 4096
    own_vocabulary: Annotated[
        bool, _tokens("Train one for each silo, on its own text.", "--own-vocabulary")
    ] = False
    train_bytes: Annotated[int, _tokens("Most text it is trained on.")] = 50_000_000
    max_document_bytes: Annotated[
        int, _tokens("Longest stretch of a document without a place to cut it at.")
    ] = 16_000_000
    eos: Annotated[str | None, _tokens("Its end-of-text token.")] = None
    global_fraction: Annotated[float, _split("Of documents, for the global set.")] = 0.03
    silo_fraction: Annotated[float, _split("Of documents, for each silo's own.")] = 0.03
    stratify_field: Annotated[
        str | None,
        _split("The global set takes some of each of its values, as of each file and folder."),
    ] = None
    ignore_splits: Annotated[
        bool,
        _split(
            "Train on the input's own validation and test splits too. By default they are "
            "the global set.",
            "--ignore-splits",
        ),
    ] = False
    held_out_only: Annotated[
        bool,
        _split("Hold out everything: text for `photon eval`, of any amount.", "--held-out-only"),
    ] = False
    seed: Annotated[int, typer.Option(help="The same seed makes the same silos.")] = 0
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a shard file.")] = 2**26
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False


@data_app.command("prepare")
@taking(_Prepare)
def prepare_command(typed: _Prepare, as_json: AsJson = False) -> None:
    """Turn text into tokenised, hashed shards: DIR/silos/NAME, DIR/held_out, DIR/manifest.json.

    Example: `photon data prepare --input speeches/ --metadata speeches.csv --silo-field party
    --out data/speeches`

    The held-out documents are chosen by a hash of their text, so they are the same however the
    documents are cut into silos. Nothing is fetched unless --input says hf:NAME.
    """
    from photon.data import PrepareOptions, prepare

    meant = {
        "separator": _unescaped(typed.separator) if typed.separator is not None else None,
        "dirichlet": _count_and_alpha(typed.dirichlet) if typed.dirichlet is not None else None,
        "partitioner_options": dict(_pair(option) for option in typed.partitioner_options or []),
    }
    options = PrepareOptions(**(vars(typed) | meant))
    with progress_bar(console()) as report:
        data = prepare(options, report)
    _show(data, as_json)


@data_app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(help="Folder made by `photon data prepare`.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every hash and token.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a prepared folder holds. Example: `photon data show data/speeches --verify`"""
    from photon.data import open_data

    data = open_data(folder, only_to_score=True, own_vocabularies=True)
    if verify:
        with progress_bar(console()) as report:
            data.verify(lambda done, total: report("verifying", done, total))
    _show(data, as_json)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for (stage, done, total), or lines of a log; total 0 only counts."""
    if not console.is_terminal:
        yield _log_lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, amount="")

        def report(stage: str, done: int, total: int) -> None:
            amount = _amount(done, total)
            progress.update(
                task, description=stage, completed=done, total=total or None, amount=amount
            )

        yield report


def _log_lines() -> Callable[[str, int, int], None]:
    """A line now and then, so that a log shows that work goes on; none for what is soon done."""
    said = monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal said
        if monotonic() - said >= _LINE_EVERY_S:
            said = monotonic()
            say(f"{stage}: {_amount(done, total)}")

    return report


def _amount(done: int, total: int) -> str:
    return f"{done:,}" + (f" of {total:,}" if total else "")


def _count_and_alpha(text: str) -> tuple[int, float]:
    count, colon, alpha = text.partition(":")
    try:
        return int(count), float(alpha if colon else 0.5)
    except ValueError:
        raise InvalidValueError(f"--dirichlet {text!r} is not N:ALPHA, for example 4:0.5") from None


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InvalidValueError(f"--partitioner-option {text!r} is not KEY=VALUE")
    return key, value


def _unescaped(text: str) -> str:
    # What a shell can't easily pass.
    for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t"), ("\\0", "\0")):
        text = text.replace(written, meant)
    return text


def _show(data: PreparedData, as_json: bool) -> None:
    if as_json:
        record = {
            "path": str(data.path),
            "sha256": data.sha256,
            "vocab_size": data.vocab_size,
            "eos_id": data.eos_id,
            "silos": {name: _counts(silo) for name, silo in data.silos.items()},
            "held_out": _counts(data.held_out),
            "remarks": list(data.remarks),
        }
        show_json(record)
        return
    rows = []
    for name, part in {**data.silos, "(global held-out)": data.held_out}.items():
        *counts, size = _counts(part).values()
        rows.append((name, *(f"{count:,}" for count in counts), f"{size / 1e6:.2f}"))
    show(str(data.path))
    show_table(
        ("silo", "documents", "tokens", "held-out documents", "held-out tokens", "text MB"),
        rows,
        right=range(1, 6),
    )
    for remark in data.remarks:
        say(f"note: {remark}")


def _counts(part: SiloData) -> dict[str, int]:
    return {
        "documents": part.train_documents,
        "tokens": part.train_tokens,
        "held_out_documents": part.held_out_documents,
        "held_out_tokens": part.held_out_tokens,
        "bytes": part.bytes,
    }


@data_app.command()
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


@data_app.command()
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
