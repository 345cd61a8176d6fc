"""What a run is predicted, and what federations inside it say of themselves: CARDS/children."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from photon.cards.folder import cards_folder, read_cards
from photon.config import load_run_config
from photon.errors import CardError, first_fault
from photon.law.prediction import Claim, Prediction, predict, with_children
from photon.law.rules import load_law

_MOST_BYTES = 1 << 24


def read_claims(folder: Path, awaited: Iterable[str]) -> dict[str, Claim | None]:
    """By child: each that is awaited, or has a file.

    Args:
        folder: of cards.
        awaited: those that must have said something.

    Raises:
        CardError: a file that is none.
    """
    claims: dict[str, Claim | None] = dict.fromkeys(awaited)
    for path in sorted((folder / "children").glob("*.json")):
        try:
            with path.open("rb") as file:
                claims[path.stem] = Claim.model_validate_json(file.read(_MOST_BYTES))
        except ValidationError as error:
            hint = "It is what `photon comply RUN --json` printed for that federation."
            raise CardError(f"{path} is no prediction: {first_fault(error)}", hint=hint) from None
        except OSError as error:
            raise CardError(f"can't read {path}: {error.strerror}") from error
    return claims


def predicted(run: Path, on: datetime.date, law: Path | None = None) -> Prediction:
    """From the cards of a run, or of a planned one.

    Args:
        law: a law file; that of its run file by default.

    Raises:
        CardError, LawError: a card, a child's prediction or the law file is no good.
    """
    cards, awaited = read_cards(run), list[str]()
    if (run / "run.json").exists():  # else it is planned
        config = load_run_config(run / "config.resolved.toml")
        awaited, own = config.own_jurisdictions, config.comply.law
        law = law or (Path(own) if own else None)
    found = predict(cards, load_law(law), on)
    return with_children(found, read_claims(cards_folder(run), awaited))
