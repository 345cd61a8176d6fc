"""`photon release` and `photon verify`: a model that goes out with its history, and its proof."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from photon.cli.options import AsJson, Folder, option
from photon.cli.screen import console, say, show, show_json
from photon.errors import AuditError
from photon.templates import filled

_CARD = option("For the model card, as for `photon export`.")
_KEY = option("Key that signs; the aggregator's, or ~/.config/photon/release.key.")
_SIGNER = typer.Option(metavar="FINGERPRINT", help="Of the key that must have signed: sha256:...")


def release(
    folder: Folder,
    out: Annotated[Path, option("Folder to make.")],
    key: Annotated[Path | None, _KEY] = None,
    license: Annotated[str | None, _CARD] = None,
    language: Annotated[list[str] | None, _CARD] = None,
) -> None:
    """Write the model with its cards, its run file and its log, all signed.

    Whoever has that folder alone can check it: `photon verify`. The log names the silos.
    Example: `photon release runs/together --out our-model`
    """
    with console().status("Loading PyTorch ..."):
        from photon.products import release as write
    from photon.cards.folder import has_cards
    from photon.law.claims import predicted
    from photon.membership.keys import NodeKey
    from photon.release.seal import key_file

    place = key or key_file(folder)
    if not place.exists():
        say(f"note: makes a new key, {place}. Keep it, and to yourself: it says who you are.")
    signer = NodeKey.load_or_create(place)
    write(folder, out, signer, license=license, languages=language or ())
    if has_cards(folder):
        found = predicted(folder, datetime.datetime.now(datetime.UTC).date())
        if found.verdict in ("not_met", "prohibited"):
            told = f"by its cards it is {found.verdict} on {found.law}"
            say(f"note: {told}; `photon comply {folder}` says why.")
    show(f"Release: {out}\nsigned by {signer.fingerprint}; publish that elsewhere, too")


def verify(
    folder: Annotated[Path, typer.Argument(help="The release.", metavar="DIR")],
    key: Annotated[str | None, _SIGNER] = None,
    as_json: AsJson = False,
) -> None:
    """Check a release by itself, offline, and follow it back to each update that is in it.

    Every byte of weights, cards and log counts. Without --key it can't say whose it is. Exit code
    84 if anything was changed, or is not that key's; 42 if there is no release. It also checks a
    file made by `photon audit --prove`. Example: `photon verify our-model --key sha256:5f70...`
    """
    from photon.membership.keys import FINGERPRINT
    from photon.release.check import verify_release

    if folder.is_file():
        return _show_proof(folder, key)
    if key is not None and not FINGERPRINT.fullmatch(key):
        raise typer.BadParameter("write sha256: and 64 digits 0-9a-f", param_hint="--key")
    whole = sum(one.lstat().st_size for one in folder.rglob("*"))
    with Progress(console=console(), transient=True, disable=whole < 1 << 28) as progress:
        bar = progress.add_task("reading", total=whole)
        report = verify_release(folder, key, lambda read: progress.advance(bar, read))
    if as_json:
        show_json({"ok": not report.problems, **asdict(report), "path": str(folder)})
    else:
        for text in report.problems or report.remarks:
            say(f"{'problem' if report.problems else 'note'}: {text}")
        if not report.problems:
            show(filled("photon.cli", "verify.txt.j2", report=report).rstrip())
    return report.require_good()


def _show_proof(file: Path, key: str | None) -> None:
    from photon.membership.proof import check_proof

    line, head, signer = check_proof(file.read_bytes())
    if key not in (None, signer):
        raise AuditError(f"{file}: the log is signed by the key {signer}, not by {key}")
    show(f"line {line['n']} ({line['kind']}) is in the log with the head {head['sha256']}")
    show_json(line["body"])
    show(f"intact, {'' if key else 'signer unknown: '}signed by {signer}")
