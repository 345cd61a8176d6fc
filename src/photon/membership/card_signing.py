"""A site signs its data card with its node's key; the signature lies beside the card."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.errors import PhotonError
from photon.membership.keys import NodeKey, fingerprint_of
from photon.membership.signing import CARD, sign_document, verify_document
from photon.store.disk import write_json


class _Signature(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    public_key: str
    signature: str


def signature_file(card: Path) -> Path:
    """Where the signature of a card lies."""
    return card.with_name(card.name + ".sig")


def sign_card(card: Path, key: NodeKey) -> Path:
    """Sign a card's bytes as they are; returns the signature's file."""
    signature = sign_document(key, CARD, card.read_bytes())
    record = {"public_key": key.public_pem, "signature": signature}
    write_json(signature_file(card), record, "a signature")
    return signature_file(card)


def signer_of(card: Path) -> tuple[str | None, str]:
    """(fingerprint of the key that signed exactly these bytes, or None; what is wrong, or "")."""
    file = signature_file(card)
    if not file.exists():
        return None, ""
    try:
        found = _Signature.model_validate_json(file.read_bytes()[:10_000])
        verify_document(found.public_key, CARD, card.read_bytes(), found.signature)
        return fingerprint_of(found.public_key), ""
    except ValidationError:
        return None, f"{file.name} is no signature"
    except PhotonError as error:
        return None, f"the signature does not hold: {error.message}"
