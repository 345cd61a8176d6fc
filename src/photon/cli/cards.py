"""`photon cards` and `photon comply`: what is said of a project, and what the law says of it."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from photon.cli.options import AsJson, Folder
from photon.cli.screen import say, show, show_json, show_table
from photon.errors import CardError, NotCompliantError, UndecidedError, some

if TYPE_CHECKING:
    from photon.law.prediction import Prediction

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
    data: Annotated[
        Path | None,
        typer.Option(help="At a site: the prepared text. Writes the data card alone."),
    ] = None,
    silo: Annotated[str | None, typer.Option(help="With --data: which silo of it.")] = None,
    examined: Annotated[
        Path | None, typer.Option(help="With --data: what `photon data examine` wrote of it.")
    ] = None,
    run_file: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN.toml",
            help="Before the run: the cards of the project and of the planned model.",
        ),
    ] = None,
) -> None:
    """Write the cards of a run into DIR/cards, with what Photon knows and with the questions.

    Answers that are there stay. A data card whose data moved becomes SILO.v1.toml, and a new one
    without answers takes its place.

    Example: `photon cards init runs/demo/federated`, at a site
    `photon cards init . --data data/prepared --silo north`,
    before a served run `photon cards init . --run-file run.toml`
    """
    from photon.cards.filling import Known, facts_of_data, facts_of_examination
    from photon.cards.folder import (
        CARDS_FOLDER,
        cards_folder,
        data_card_of,
        has_cards,
        write_cards,
        write_data_card,
        write_first_cards,
    )

    place = folder / CARDS_FOLDER
    if data is None and examined is not None:
        raise CardError("--examined needs --data", hint="Name the text that was examined.")
    if run_file is not None:
        from photon.config import load_run_config
        from photon.runs.compliance import planned_facts

        config = load_run_config(run_file)
        facts = {"run": config.run.name, "how": "serve", "silos": sorted(config.serve.silos)}
        written = write_first_cards(place, Known(facts, planned_facts(config)))
    elif data is None:
        written, place = write_cards(folder), cards_folder(folder)
    elif silo is None:
        raise CardError("--data needs --silo", hint="Name the silo whose card it is.")
    else:
        facts = facts_of_data(data, silo)
        facts |= facts_of_examination(examined, facts) if examined is not None else {}
        written = write_data_card(data_card_of(folder, silo), facts)
    for path in written:
        show(str(path))
    then = f"photon cards check {folder}"
    if data is not None and silo is not None and not has_cards(folder):  # a site's: no project's
        place = data_card_of(folder, silo)
        then = f"photon cards sign {place} --key photon-node/node.key"
    say(f"Answer the questions in {place}, then `{then}`.")


@cards_app.command("check")
def cards_check(folder: Folder, as_json: AsJson = False) -> None:
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
            rows.append({"card": label, "answered": done, "asked": len(asked), "standing": why})
    if as_json:
        show_json(rows)
        return
    done = ((one["card"], f"{one['answered']} of {one['asked']}", one["standing"]) for one in rows)
    show_table(("card", "answered", "standing"), done)
    show(_NOTE)


@cards_app.command("show")
def cards_show(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", help="Where; DIR/cards.html.")] = None,
    law: LawDate = None,
) -> None:
    """Write one page with all cards and the prediction, readable without Photon.

    Example: `photon cards show runs/demo/federated --out cards.html`
    """
    from photon.cards.folder import read_cards
    from photon.cards.text import cards_page
    from photon.store.disk import write_whole

    path = out or folder / "cards.html"
    write_whole(path, cards_page(read_cards(folder), _predicted(folder, law)), "the page")
    show(f"Cards: {path}")


@cards_app.command("export")
def cards_export(
    folder: Folder,
    form: Annotated[
        str, typer.Option(help="cyclonedx, spdx, croissant, hf, mdf, summary, annex4, oscal.")
    ],
    out: Annotated[Path, typer.Option(help="The file; of croissant a folder.")],
    law: LawDate = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
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
    key: Annotated[Path, typer.Option("--key", help="The site's key: node.key of its home.")],
) -> None:
    """Sign a data card as it is; the signature is CARD.toml.sig.

    Example: `photon cards sign cards/data/north.toml --key photon-node/node.key`
    """
    from photon.cards.folder import read_card
    from photon.membership.card_signing import sign_card
    from photon.membership.keys import NodeKey

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
    rules: Annotated[
        Path | None, typer.Option(help="A law file of your own; the EU's AI Act by default.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what is met, and what does not apply.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict from the cards whether the law is met. Prediction, not legal advice.

    The exit code is 0 where all is met or nothing applies, 102 where something is not met or is
    prohibited, and 103 where the cards leave it open.

    Example: `photon comply runs/demo/federated --law 2027-12-02`
    """
    found = _predicted(folder, law, rules)
    if as_json:
        show_json(found.as_json())
    else:
        quiet = () if everything else ("met", "not_applicable")
        shown = [one for one in found.findings if one.status not in quiet]
        rows = [(one.id, one.subject, one.status, one.evidence, one.todo) for one in shown]
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


def _predicted(
    folder: Path, law: datetime.datetime | None, rules: Path | None = None
) -> Prediction:
    from photon.cards.folder import cards_folder, read_cards
    from photon.config import load_run_config
    from photon.law.claims import read_claims
    from photon.law.prediction import predict, with_children
    from photon.law.rules import load_law

    cards, law_file, awaited = read_cards(folder), rules, list[str]()
    if (folder / "run.json").exists():  # else it is planned
        config = load_run_config(folder / "config.resolved.toml")
        law_file = rules or (Path(config.comply.law) if config.comply.law else None)
        awaited = config.own_jurisdictions
    found = predict(cards, load_law(law_file), _date(law))
    return with_children(found, read_claims(cards_folder(folder), awaited))


def _date(law: datetime.datetime | None) -> datetime.date:
    return (law or datetime.datetime.now(datetime.UTC)).date()
