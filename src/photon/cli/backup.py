"""`photon backup` and `photon restore`: an aggregator in one file, and out of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from photon.cli.screen import say


def backup(
    home: Annotated[Path, typer.Argument(help="The aggregator's home.", metavar="HOME")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="To be made, mode 0600.")],
    with_store: Annotated[
        bool,
        typer.Option("--with-store", help="The embedded store's objects too; serve must be down."),
    ] = False,
) -> None:
    """Write all that another machine needs to go on as this aggregator to one file.

    Keys, authority, certificates, members and invitations, and of the run that was served last its
    run file, newest checkpoint, audit log and events. `photon serve` may run meanwhile. Data and
    the store's objects are named, not copied: states are published again from the checkpoint.

    The file holds private keys: whoever has it can act as this aggregator. Encrypt it.

    Example: `photon backup photon-server --out med-2026-01-01.tar`
    """
    from photon.deploy.backup import back_up

    made = back_up(home, out, with_store=with_store)
    size = out.stat().st_size / 1e6
    of_run = f"{made.run}, round {made.round}" if made.run else "no run yet"
    say(f"{out}: {len(made.files)} files, {size:,.1f} MB, each with its sha256; {of_run}")
    say("warning: it holds private keys; encrypt it, and keep it where others can't read it")


def restore(
    file: Annotated[Path, typer.Argument(help="Of `photon backup`.", metavar="FILE")],
    home: Annotated[Path, typer.Option("--home", help="The aggregator's new home, to be made.")],
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="The run's folder; runs/NAME by default.")
    ] = None,
) -> None:
    """Bring an aggregator back from a backup, on this machine or another, under any path.

    Every file is compared with its sha256 before anything is written. A home or run folder that is
    in use, or not empty, is refused. Only one aggregator may run with these keys: the old one must
    be off, and stay off.

    Example: `photon restore med-2026-01-01.tar --home photon-server`
    """
    from photon.deploy.backup import restore as bring_back

    made, run = bring_back(file, home, run_dir)
    say(f"{home}: {len(made.files)} files, as they were backed up")
    for what, where in made.references.items():
        say(f"not in it: {what}, {where}")
    if run is not None:
        say(f"round {made.round} is the last that counts; the old aggregator must stay off. Then:")
        say(f"photon serve --resume {run}")
