"""What a signature covers: a document and what it is for, or one request at one time.

Every signed text begins with its purpose, so that a signature made for one thing is never valid for
another. A request names its time and a number used once: it holds for two minutes, once.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from photon.errors import ClockSkewError, PhotonError, SignatureError
from photon.membership.keys import FINGERPRINT, NodeKey, fingerprint_of, verify
from photon.membership.roster import Member
from photon.store.disk import write_json

#: Purposes of signatures: the aggregator's over an Ask and over a line of its log, a silo's over
#: its Reply, over which of Flower's nodes is its own, and over its data card.
ASK, LOG, RECEIPT, SEAT = "photon-ask-v1", "photon-log-v1", "photon-receipt-v1", "photon-seat-v1"
CARD = "photon-card-v1"

_REQUEST = "photon-request-v2"
_PURPOSE = re.compile(r"[a-z0-9-]{1,64}")

KEY_HEADER = "Photon-Key"
TIME_HEADER = "Photon-Time"
NONCE_HEADER = "Photon-Nonce"
SIGNATURE_HEADER = "Photon-Signature"

_SHAPES = {
    KEY_HEADER: FINGERPRINT,
    TIME_HEADER: re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?"),
    NONCE_HEADER: re.compile(r"[0-9a-f]{32}"),
    SIGNATURE_HEADER: re.compile(r"[A-Za-z0-9+/=]{1,200}"),
}

#: How far apart the two clocks may be.
_WINDOW_S = 120.0

#: Requests of one key that are remembered at a time; a node that works needs a few a second.
_MOST_REQUESTS = 20_000


def sign_document(key: NodeKey, purpose: str, data: bytes) -> str:
    """Sign bytes for one purpose; base64.

    Args:
        purpose: lower-case words and a version, joined by dashes, for instance RECEIPT.
    """
    return key.sign(_covered(purpose, data))


def verify_document(public_pem: str, purpose: str, data: bytes, signature: str) -> None:
    """Check a signature of `sign_document`.

    Raises:
        SignatureError: it is another key's, over other bytes, or for another purpose.
        MembershipError: the key is no P-384 public key.
    """
    verify(public_pem, _covered(purpose, data), signature)


def sign_request(
    key: NodeKey, method: str, path: str, body: bytes, *, now: float, audience: str = ""
) -> dict[str, str]:
    """Headers that say who asks whom, when, and that nobody changed it on the way.

    Args:
        path: as the other side gets it, with the query.
        audience: fingerprint of the aggregator's authority: at another one the request is worth
            nothing. Empty for a desk without a door.
        now: seconds since the epoch.
    """
    at, nonce = f"{now:.3f}", secrets.token_hex(16)
    return {
        KEY_HEADER: key.fingerprint,
        TIME_HEADER: at,
        NONCE_HEADER: nonce,
        SIGNATURE_HEADER: sign_document(
            key, _REQUEST, _request(audience, method, path, at, nonce, body)
        ),
    }


class RequestVerifier:
    """Checks signed requests, and remembers those it saw. Safe to share between threads.

    What it remembers is gone with it: after a restart, a request that somebody recorded inside TLS
    in the last two minutes could be asked once more. Nothing of the desk's does harm twice.

    Args:
        find: the member with a fingerprint, or UnknownMemberError; asked at each request, as
            `Roster.active`.
        audience: fingerprint of this aggregator's authority.
    """

    def __init__(self, find: Callable[[str], Member], *, audience: str = "") -> None:
        self._find = find
        self._audience = audience
        self._lock = threading.Lock()
        self._seen: dict[str, set[str]] = {}  # by fingerprint
        self._order: deque[tuple[float, str, str]] = deque()  # (forgotten at, fingerprint, nonce)

    def verify(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        now: float,
        find: Callable[[str], Member] | None = None,
    ) -> Member:
        """Who asks.

        Args:
            headers: in whatever case.
            now: seconds since the epoch.
            find: instead of the one that this was made with.

        Raises:
            SignatureError: headers missing or malformed, a signature that does not hold, or a
                request that was here before.
            ClockSkewError: it was signed more than two minutes before or after now.
            UnknownMemberError: as `find` raises it.
        """
        fingerprint, at, nonce, signature = _fields(headers)
        signed_at = float(at)
        if abs(now - signed_at) > _WINDOW_S:
            raise ClockSkewError(
                f"the request was signed at {_clock(signed_at)}, this clock says {_clock(now)} "
                f"(UTC); at most {_WINDOW_S:.0f} s may lie between",
                hint="Switch time synchronisation on, on the machine whose clock is wrong "
                "(`timedatectl set-ntp true`).",
            )
        member = (find or self._find)(fingerprint)
        try:
            covered = _request(self._audience, method, path, at, nonce, body)
            verify_document(member.public_key, _REQUEST, covered, signature)
        except SignatureError:
            raise SignatureError(
                f"the signature of {method} {path[:200]} is not {member.name}'s over this request",
                hint="The request was changed on its way, is meant for another aggregator, or was "
                "made by another program.",
            ) from None
        # Only now: strangers can't make it remember anything.
        self._remember(fingerprint, nonce, member.name, now)
        return member

    def _remember(self, fingerprint: str, nonce: str, name: str, now: float) -> None:
        with self._lock:
            while self._order and self._order[0][0] < now:
                _, old_key, old_nonce = self._order.popleft()
                nonces = self._seen[old_key]
                nonces.discard(old_nonce)
                if not nonces:
                    del self._seen[old_key]
            nonces = self._seen.setdefault(fingerprint, set())
            if nonce in nonces:
                raise SignatureError(
                    f"a request of {name} was here before",
                    hint="A request is valid once; a node signs each attempt anew.",
                )
            if len(nonces) >= _MOST_REQUESTS:
                # Forgetting one early would let it be used again.
                raise SignatureError(
                    f"{name} sent {len(nonces)} requests within {2 * _WINDOW_S:.0f} s",
                    hint="Wait some minutes. No node needs so many; is its key used by something "
                    "else?",
                )
            nonces.add(nonce)
            # Until then its time is near enough. In order of arrival: none is forgotten too early.
            self._order.append((now + 2 * _WINDOW_S, fingerprint, nonce))


def _covered(purpose: str, data: bytes) -> bytes:
    if not _PURPOSE.fullmatch(purpose):
        raise ValueError(f"{purpose!r} is no purpose: lower-case letters, digits and dashes")
    return purpose.encode() + b"\0" + data


def _request(audience: str, method: str, path: str, at: str, nonce: str, body: bytes) -> bytes:
    # No part but the path can hold a line break, and the hash stands at a fixed place at the end.
    lines = (audience, method, at, nonce, path, hashlib.sha256(body).hexdigest())
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _fields(headers: Mapping[str, str]) -> list[str]:
    given = {name.lower(): value for name, value in headers.items()}
    fields = []
    for name, shape in _SHAPES.items():
        value = given.get(name.lower())
        if value is None or not shape.fullmatch(value):
            found = "is missing" if value is None else f"is {value[:80]!r}"
            raise SignatureError(
                f"the request is not signed as it must be: header {name} {found}",
                hint="Only a node of Photon's own can ask for this.",
            )
        fields.append(value)
    return fields


def _clock(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{at:.0f} s"


class _CardSignature(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    public_key: str
    signature: str


def signature_file(card: Path) -> Path:
    """Where the signature of a site's data card lies: beside it."""
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
        found = _CardSignature.model_validate_json(file.read_bytes()[:10_000])
        verify_document(found.public_key, CARD, card.read_bytes(), found.signature)
        return fingerprint_of(found.public_key), ""
    except ValidationError:
        return None, f"{file.name} is no signature"
    except PhotonError as error:
        return None, f"the signature does not hold: {error.message}"
