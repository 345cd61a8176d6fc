"""`photon bench`: methods beside each other at equal budgets, and what became of each claim."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon.cli.options import AsJson, Quiet
from photon.cli.screen import console, say, show, show_json, show_table
from photon.errors import ConfigError, some
from photon.fork_server import start_fork_server

if TYPE_CHECKING:
    from photon.bench.bench import Bench
    from photon.bench.case import Case
    from photon.bench.suite import Cutting

#: Of a run's time, beside what its training takes: starting, scoring, writing.
_BESIDE = 1.25
#: A process that trains a small model, its libraries in it.
_PROCESS_BYTES = 1.5e9


def bench(
    suite: Annotated[str, typer.Argument(help="A suite by name, or a file.", metavar="SUITE")],
    scale: Annotated[str, typer.Option(help="How large its runs are; the suite says which.")] = (
        "cpu-quick"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method's best point.")] = 3,
    out: Annotated[Path, typer.Option("--out", help="Folder for data, runs and results.")] = Path(
        "runs/bench"
    ),
    text: Annotated[
        Path | None,
        typer.Option(help="Text to train on, as for `photon data prepare`; the demo's if none."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Write the results of OUT as this page, too: docs/results.md."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: the results that are there.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of a suite, several runs at a time, and say which claims stand.

    Each method is searched with as many tries as every other, with the first seed; its best point
    is run with each seed. Runs are cached by all that decides them: begun again, after Ctrl-C or a
    change of a suite, only what is missing is run. It says beforehand how long that takes.

    Example: `photon bench quality --scale cpu-quick --seeds 1`
    """
    start_fork_server()
    work = _bench(suite, scale, seeds, out, text)
    if not report:
        _run(work, quiet=quiet)
    if page is not None:
        from photon.bench.page import write_page

        write_page((out / "results").glob("*.json"), page)
        say(f"Page: {page}")
    _show(work, as_json=as_json)


def _bench(suite: str, scale: str, seeds: int, out: Path, text: Path | None) -> Bench:
    from photon.bench.bench import Bench
    from photon.bench.suite import load_suite, scale_of
    from photon.data import open_data

    told = load_suite(suite)
    size, name = scale_of(told, scale), Path(suite).stem
    cuts = told.cuts_of(scale)
    data = {cut: out / "-".join(filter(None, ("data", name, scale, cut))) for cut in cuts}
    for cut, how in cuts.items():
        if not (data[cut] / "manifest.json").exists():
            _prepare(data[cut], out, text, how, size.vocab_size, next(iter(data.values())))
    file = out / "results" / f"{name}-{scale}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = {cut: open_data(folder) for cut, folder in data.items()}
    return Bench(suite, scale, seeds, opened, out / "work", file)


def _run(work: Bench, *, quiet: bool) -> None:
    from photon.cli.side_by_side import Training, at_once, train_missing
    from photon.main_memory import main_memory

    first = work.wave()
    if not first:
        return
    processes = at_once(first[0].config, work.runs_at_most())
    processes = max(1, min(processes, int(main_memory()[1] / _PROCESS_BYTES)))
    one_s = _seconds_of(first[0])
    hours = one_s * work.runs_at_most() / processes / 3600
    say(
        f"At most {work.runs_at_most()} runs of about {one_s:.0f} s, {processes} at a time: "
        f"{hours:.2g} h."
    )
    started = time.monotonic()
    while cases := work.wave():
        # Some for each process, as one may take twice another's time; not all, so that results
        # are seen as they come. Runs of a batch that is cut short are found done by the next.
        for case in (batch := cases[: 3 * processes]):
            say(f"{case.method}, {dict(case.point)}, seed {case.seed}")
        trainings = {
            f"{case.method} {folder.name}": Training(folder, case.config, silos)
            for case in batch
            for folder, silos in case.runs(work.work)
        }
        train_missing(trainings, processes, quiet=quiet)
        for case in batch:
            work.take(case)
    say(f"Done after {(time.monotonic() - started) / 60:.1f} min. Results: {work.file}")


def _seconds_of(case: Case) -> float:
    """About what one run takes on one process, by some steps of it."""
    from photon.runs.profile import profile

    told = profile(case.config, steps=4)
    config = case.config
    tokens = config.total_steps * config.local.batch_size * config.data.sequence_length
    return _BESIDE * tokens * len(case.silos) / told["tokens_per_s"]


def _show(work: Bench, *, as_json: bool) -> None:
    results = work.results
    if as_json:
        claims = [
            {**claim.model_dump(), "verdict": vars(verdict) if verdict else None}
            for claim in results.suite.claims
            for verdict in [results.judged(claim)]
        ]
        show_json({"file": str(work.file), "claims": claims, "not_run": list(results.missing())})
        return
    rows = []
    for claim in results.suite.claims:
        verdict = results.judged(claim)
        ratio = "not run" if verdict is None else f"{verdict.ratio:.4g}"
        rows.append((claim.says, f"{claim.most:g}", ratio, str(verdict or "-")))
    show_table(("claim", "at most", "here", "so it is"), rows)
    for line in results.missing():
        show(f"not run: {line}")


def _prepare(
    data: Path,
    out: Path,
    text: Path | None,
    how: Mapping[Cutting, Any],
    vocab_size: int,
    first: Path,
) -> None:
    """Cut the text; all cuts of a suite have the tokenizer of the first."""
    from photon.bench.bench import TEXT_FILE
    from photon.cli.data import progress_bar
    from photon.cli.demo import demo_text
    from photon.data import PrepareOptions, prepare

    out.mkdir(parents=True, exist_ok=True)
    if text is not None and not text.exists():
        raise ConfigError(f"no text at {text}", hint="Name a file or a folder of text.")
    if text is None and "silo_field" in how:
        raise ConfigError(
            f"this suite cuts text by {how['silo_field']}, which the demo's does not have",
            hint="Name a folder with a file for each silo: --text DIR.",
        )
    source = text or demo_text(out)[0]
    options = PrepareOptions(
        input=str(source),
        out=data,
        vocab_size=vocab_size,
        tokenizer=None if data == first else first / "tokenizer",
        **how,
    )
    with progress_bar(console()) as progress:
        prepare(options, progress=progress)
    (data / TEXT_FILE).write_text(_in_words(text) if text else "the demo's", "utf-8")
    shutil.rmtree(out / "work", ignore_errors=True)


def _in_words(text: Path) -> str:
    """Names of its files; bytes and sha256 of all of them, one after another."""
    files = {one.relative_to(text).as_posix(): one for one in text.rglob("*") if one.is_file()}
    files, whole = files or {text.name: text}, hashlib.sha256()
    for _, path in sorted(files.items()):
        whole.update(path.read_bytes())
    size = sum(path.stat().st_size for path in files.values())
    return f"{some(sorted(files), 20)}: {size:,} bytes, sha256 {whole.hexdigest()}"
