"""`photon cards` and `photon comply`: what is said of a project, and what the law says of it."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from photon.cli.options import AsJson, Folder, option
from photon.cli.screen import say, show, show_json, show_table
from photon.errors import CardError, NotCompliantError, UndecidedError, some

_NOTE = "Prediction, not legal advice."

cards_app = typer.Typer(
    name="cards",
    no_args_is_help=True,
    help="Cards of a project, its data and its models: what Photon knows, and what people say.",
)

LawDate = Annotated[
    datetime.datetime | None,
    typer.Option("--law", formats=["%Y-%m-%d"], help="The law as it is, or will be, on that day."),
]


@cards_app.command("init")
def cards_init(
    folder: Annotated[Path, typer.Argument(help="The run folder; a site's: any.", metavar="DIR")],
    data: Annotated[Path | None, option("At a site, its text: writes its card alone.")] = None,
    silo: Annotated[str | None, option("With --data: which silo of it.")] = None,
    examined: Annotated[Path | None, option("Also what `photon data examine` wrote.")] = None,
    run_file: Annotated[Path | None, option("Before a run: its run file.")] = None,
) -> None:
    """Write the cards of a run into DIR/cards, with what Photon knows and with the questions.

    Answers that are there stay. A data card whose data moved becomes SILO.v1.toml, and a new one
    without answers takes its place.

    Example: `photon cards init runs/demo/federated`, at a site
    `photon cards init . --data data/prepared --silo north`,
    before a served run `photon cards init . --run-file run.toml`
    """
    from photon.cards import filling
    from photon.cards import folder as cards

    place, then = cards.cards_folder(folder), f"photon cards check {folder}"
    if (data is None) is not (silo is None) or (data is None and examined is not None):
        hint = "Name the text, and whose card it is."
        raise CardError("--data and --silo go together, and --examined with both", hint=hint)
    if data is not None and silo is not None:
        facts = filling.facts_of_data(data, silo)
        facts |= filling.facts_of_examination(examined, facts) if examined is not None else {}
        place = cards.data_card_of(folder, silo)
        written = cards.write_data_card(place, facts)
        if not cards.has_cards(folder):  # a site's: no project's
            then = f"photon cards sign {place} --key photon-node/node.key"
    elif run_file is not None:
        from photon.config import load_run_config
        from photon.runs.compliance import planned

        written = cards.write_first_cards(place, planned(load_run_config(run_file)))
    else:
        written = cards.write_cards(folder)
    for path in written:
        show(str(path))
    say(f"Answer the questions in {place}, then `{then}`.")


@cards_app.command("check")
def cards_check(folder: Folder) -> None:
    """Read all cards: what is answered, and how far data cards can be relied on.

    Example: `photon cards check runs/demo/federated`
    """
    from photon.cards.folder import read_cards
    from photon.cards.questions import Kind, questions

    cards, rows = read_cards(folder), []
    for kind in get_args(Kind):
        for label, name, card in cards.subjects(kind):
            asked = questions(kind)
            done = sum(getattr(getattr(card, one.section), one.key) is not None for one in asked)
            why = cards.standing(name).why if kind == "data" else ""
            rows.append((label, f"{done} of {len(asked)}", why))
    show_table(("card", "answered", "standing"), rows)
    show(_NOTE)


@cards_app.command("show")
def cards_show(
    folder: Folder,
    out: Annotated[Path | None, option("Where; DIR/cards.html.")] = None,
    law: LawDate = None,
) -> None:
    """Write one page with all cards and the prediction, readable without Photon.

    Example: `photon cards show runs/demo/federated --out cards.html`
    """
    from photon.cards.folder import read_cards
    from photon.cards.text import cards_page
    from photon.law.claims import predicted
    from photon.store.disk import write_whole

    path = out or folder / "cards.html"
    write_whole(path, cards_page(read_cards(folder), predicted(folder, _date(law))), "the page")
    show(f"Cards: {path}")


@cards_app.command("export")
def cards_export(
    folder: Folder,
    form: Annotated[str, option("cyclonedx, spdx, croissant, hf, mdf, summary, annex4, oscal.")],
    out: Annotated[Path, option("The file; of croissant a folder.")],
    law: LawDate = None,
    overwrite: Annotated[bool, option("Replace what is there.", "--overwrite")] = False,
) -> None:
    """Write the cards in a form that others read: a bill of materials, a model card, a legal form.

    What no card answers is "not answered" in a form for people, and left out of one for programs.

    Example: `photon cards export runs/demo/federated --form cyclonedx --out demo.cdx.json`
    """
    from photon.forms.export import export_cards

    for path in export_cards(folder, form, out, on=_date(law), overwrite=overwrite):
        show(f"{form}: {path}")
    say(_NOTE)


@cards_app.command("sign")
def cards_sign(
    card: Annotated[Path, typer.Argument(help="The data card.", metavar="CARD.toml")],
    key: Annotated[Path, option("The site's key: node.key of its home.")],
) -> None:
    """Sign a data card as it is; the signature is CARD.toml.sig.

    Example: `photon cards sign cards/data/north.toml --key photon-node/node.key`
    """
    from photon.cards.folder import read_card
    from photon.membership.keys import NodeKey
    from photon.membership.signing import sign_card

    read_card(card, "data")
    show(f"Signature: {sign_card(card, NodeKey.load(key))}")


@cards_app.command("schema")
def cards_schema(
    kind: Annotated[str, typer.Argument(help="project, data or model.", metavar="KIND")],
) -> None:
    """Print the JSON Schema of a card.

    Example: `photon cards schema data`
    """
    from photon.cards.questions import CARDS

    if kind not in CARDS:
        raise CardError(f"no card is called {kind!r}", hint=f"There are {', '.join(CARDS)}.")
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    show_json(draft | {"$id": f"photon:card:{kind}:1"} | CARDS[kind].model_json_schema())


def comply(
    folder: Folder,
    law: LawDate = None,
    rules: Annotated[Path | None, option("A law file; the EU's AI Act by default.")] = None,
    everything: Annotated[bool, option("All findings, each by itself.", "--all")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict from the cards whether the law is met. Prediction, not legal advice.

    The exit code is 0 where all is met or nothing applies, 102 where something is not met or is
    prohibited, and 103 where the cards leave it open.

    Example: `photon comply runs/demo/federated --law 2027-12-02`
    """
    from photon.law.claims import predicted

    found = predicted(folder, _date(law), rules)
    if as_json:
        show_json(found.as_json())
    else:
        told: dict[tuple[str, str], tuple[Any, list[str]]] = {}
        for one in found.findings:
            if everything or one.status in ("not_met", "unknown"):
                together = one.id, one.subject if everything else one.status
                told.setdefault(together, (one, []))[1].append(one.subject)
        rows = [(one.id, some(of), one.status, one.evidence, one.todo) for one, of in told.values()]
        if rows:
            show_table(("requirement", "of", "status", "evidence", "what to do"), rows)
        counts = Counter(one.status for one in found.findings)
        show(", ".join(f"{number} {status}" for status, number in sorted(counts.items())))
        show(f"Verdict on {found.law}, by {found.rules}: {found.verdict}. {_NOTE}")
    if found.verdict in ("met", "out_of_scope"):
        return
    kind, worst = NotCompliantError, "not_met"
    if found.verdict == "unknown":
        kind, worst = UndecidedError, "unknown"
    names = [f"{one.id} ({one.subject})" for one in found.findings if one.status == worst]
    hint = f"{_NOTE} Each finding says what to do."
    raise kind(f"{found.verdict} on {found.law}: {some(names, 5)}", hint=hint)


def _date(law: datetime.datetime | None) -> datetime.date:
    return (law or datetime.datetime.now(datetime.UTC)).date()
