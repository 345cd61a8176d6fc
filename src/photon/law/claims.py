"""What federations inside a run are predicted, each under its own law: CARDS/children/NAME.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from photon.errors import CardError, first_fault
from photon.law.prediction import Claim

CHILDREN = "children"
#: Of one file.
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
    for path in sorted((folder / CHILDREN).glob("*.json")):
        try:
            with path.open("rb") as file:
                claims[path.stem] = Claim.model_validate_json(file.read(_MOST_BYTES))
        except ValidationError as error:
            hint = "It is what `photon comply RUN --json` printed for that federation."
            raise CardError(f"{path} is no prediction: {first_fault(error)}", hint=hint) from None
        except OSError as error:
            raise CardError(f"can't read {path}: {error.strerror}") from error
    return claims
