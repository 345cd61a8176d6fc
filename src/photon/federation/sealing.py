"""An Ask under the aggregator's signature: what travels to a silo, the same bytes all the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from photon.federation.envelopes import PROTOCOL, Ask, encoded, parse_ask, parsed
from photon.membership.keys import NodeKey
from photon.membership.signing import ASK, sign_document, verify_document


class SealedAsk(BaseModel):
    """Exactly the text that was signed, and the signature over it (base64)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    protocol: Literal[3] = PROTOCOL
    ask: str
    signature: Annotated[str, Field(max_length=200)]


def sealed(ask: Ask, key: NodeKey) -> bytes:
    """An Ask as it travels.

    Args:
        key: the aggregator's.
    """
    text = encoded(ask)
    signature = sign_document(key, ASK, text)
    return encoded(SealedAsk(ask=text.decode(), signature=signature))


def open_ask(data: bytes, public_pem: str) -> Ask:
    """An Ask from outside, once it is sure that the aggregator asks it.

    Args:
        public_pem: the aggregator's key, as it was pinned at joining.

    Raises:
        SignatureError: another key signed it, or it was changed on its way.
        ProtocolError: it is none, or of another protocol; says the first thing that is wrong.
    """
    found: SealedAsk = parsed(data, SealedAsk)
    text = text_of(found)
    verify_document(public_pem, ASK, text, found.signature)
    return parse_ask(text)


def text_of(found: SealedAsk) -> bytes:
    """What was signed; lone surrogates among it are no UTF-8 later, and refused as such."""
    return found.ask.encode("utf-8", "surrogatepass")
