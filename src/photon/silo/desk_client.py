"""The aggregator's desk as a node sees it: joining, presence, questions and answers, grants.

Every request is signed with the node's key, anew at each attempt. Certificates are checked against
the authority that came with the invitation and no other; nothing is sent in the clear.
"""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import time
import weakref
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from photon.errors import (
    CertificateError,
    MembershipError,
    PhotonError,
    ProtocolError,
    UnreachableError,
)
from photon.membership.desk_documents import (
    DESK_PATH,
    MOST_WORDS,
    PATIENCE_HEADER,
    POLL_PATIENCE_S,
    AnswerKind,
    CertificateAnswer,
    CheckAnswer,
    Delivery,
    Failure,
    GrantsAnswer,
    TaskAnswer,
)
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply, printable
from photon.membership.roster import Facts, Presence
from photon.membership.signing import sign_request
from photon.silo.door_client import DoorClient, distrusted
from photon.silo.grant_book import GrantBook, Leave, Want
from photon.store.dialling import distrust, http_client, is_loopback, proxy_to
from photon.store.presign import Grant

#: No answer of a desk is longer: 256 grants take some 300 KB.
_MOST_BYTES = 4 << 20

#: Characters of a presence's words.
_MOST_DETAIL = 2000

#: Statuses of a desk, or of the door before it, that go away by themselves.
_LATER = {408, 425, 429, 500, 502, 503, 504}


class DeskClient:
    """Speaks to one aggregator's desk. Safe to share between threads.

    Where the environment names a proxy, it is used (photon.store.dialling). Redirects are not
    followed.

    Args:
        address: "host:port" of the aggregator's door. "http://127.0.0.1:port", on this machine
            only, is a desk without a door.
        ca_file: trust this certificate authority and no other; the system's if None.
        key: signs requests; only `health` does without.
        timeout_s: for a connection, for each write and read.

    Raises:
        CertificateError: ca_file can't be read.
        UnreachableError: the address is none, or there is a proxy that can't be used.
    """

    def __init__(
        self, address: str, ca_file: Path | None, key: NodeKey | None, *, timeout_s: float = 20.0
    ) -> None:
        self._origin = _origin(address)
        self._address = address
        self._key = key
        self._timeout_s = timeout_s
        self._patience_s = POLL_PATIENCE_S
        try:
            trust = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
            self._audience = certificate_fingerprint(ca_file.read_text("ascii")) if ca_file else ""
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise CertificateError(
                f"{ca_file} can't be read as a certificate authority: {error}",
                hint="It came with the invitation: join again, or copy it from a backup.",
            ) from error
        timeout = httpx2.Timeout(timeout_s)
        ends = contextlib.ExitStack()
        self._stranger = http_client(self._origin, trust, timeout)
        ends.callback(self._stranger.close)
        #: None: a desk without a door asks for no certificate, nor does health.
        self._member: DoorClient | None = None
        if key is not None and self._origin.startswith("https:"):
            self._member = DoorClient(key, self._origin, ca_file, timeout)
            ends.callback(self._member.close)
        #: Closes connections; called by itself when nobody holds this any more.
        self.close = weakref.finalize(self, ends.close)

    def join(self, token: str, name: str, public_pem: str, facts: Facts) -> dict[str, Any]:
        """Redeem an invitation. Asked again by the same node, the desk says yes again.

        Args:
            public_pem: of the key that this client signs with.

        Returns:
            name, fingerprint, status, joined_at and server_time, as the desk has them; and store,
            scheme, host and port that grants will name, None if that is the aggregator's door.

        Raises:
            InvitationError: used, expired, or none.
            MembershipError: the key is not this client's, or is another member's.
            CertificateError: see `health`.
            UnreachableError: see `health`; also when the desk asks to try again later.
        """
        if self._key is None or public_pem.strip() != self._key.public_pem.strip():
            raise MembershipError(
                "a node joins with the key that it holds",
                hint="Give DeskClient the key whose public half is registered.",
            )
        body = {"token": token, "name": name, "public_key": public_pem, "facts": asdict(facts)}
        answer = self._asked("join", body)
        store = answer.get("store")
        if store is not None and not (isinstance(store, str) and 0 < len(store) <= 300):
            raise ProtocolError(f"the desk of {self} names a store that is no address")
        return answer

    def presence(self, presence: Presence) -> dict[str, Any]:
        """Say what this node is doing.

        Returns:
            ok, server_time, member_status and draining.

        Raises:
            UnknownMemberError: suspended, expelled, or never a member.
            KeyInUseError: another node runs with this key.
            SignatureError, ClockSkewError: the desk does not accept the signature.
            CertificateError, UnreachableError: see `health`.
        """
        # The desk takes no longer ones, and no presence is to fail for its words.
        detail = printable(presence.detail)[:_MOST_DETAIL]
        return self._asked("presence", asdict(presence) | {"detail": detail})

    def task(self, boot: str, have: Collection[str]) -> Delivery | None:
        """Wait for a question; None where none came for a while.

        Args:
            boot: as in `presence`.
            have: ids of letters that this node holds: they are not given again.

        Raises:
            PhotonError: as `presence`.
        """
        body = {"boot": boot, "have": sorted(have)}
        trouble = "sends no question"
        patience_s, self._patience_s = self._patience_s, POLL_PATIENCE_S  # should this one be cut
        found = self._parsed("task", body, TaskAnswer, trouble, patience_s=patience_s)
        self._patience_s = found.patience_s
        return found.letter

    def reply(self, boot: str, letter: str, answer: SignedReply | str) -> None:
        """Send the answer to a letter, or words why there is none. Sent twice it counts once.

        Raises:
            AccessRefusedError: it is not waited for any more.
            PhotonError: as `presence`.
        """
        body: dict[str, Any] = {"boot": boot, "letter": letter}
        if isinstance(answer, str):
            body["words"] = printable(answer)[:MOST_WORDS]
        else:
            text = base64.b64encode(answer.text).decode()
            own = {"signature": answer.signature, "fingerprint": answer.fingerprint}
            body["answer"] = {"text": text, **own}
        self._asked("reply", body)

    def trust(self) -> ssl.SSLContext:
        """What connections to the aggregator's door are made with: also those to the store there.

        Raises:
            PhotonError: as `presence`.
        """
        assert self._member is not None  # grants are asked for with a key, and name https
        return self._member.client(self._given_certificate)[1]

    def grants(self, task_id: str) -> GrantBook:
        """Leave for the objects of one task: photon.store.granted_store.Grants."""
        return GrantBook(self, task_id)

    def standing(self) -> CheckAnswer:
        """How this node stands with the aggregator; changes nothing there. Its `store` is leave to
        ask for an object that is in none (HEAD), or why there is no leave.

        Raises:
            PhotonError: as `presence`.
        """
        answer = self._parsed("check", {}, CheckAnswer, "does not say how we stand")
        part = answer.store
        probe = part.leave()
        if probe is None or (isinstance(probe, Grant) and (probe.verb != "HEAD" or not part.key)):
            raise ProtocolError(f"the desk of {self} gives no leave to look at the store")
        return answer

    def health(self) -> dict[str, Any]:
        """Whether the desk is there: ok, version, server_time (not of Photon 0.1's first desks).

        Raises:
            CertificateError: the other side can't prove that it is the aggregator.
            UnreachableError: nothing answers, or what answers is busy or starting.
            ProtocolError: what answers is no desk.
        """
        return self._asked("health", None)

    def ask_grants(self, task_id: str, wants: list[Want]) -> list[Leave | PhotonError]:
        """Leave for each want, in order, or why not.

        Raises:
            PhotonError: the request as a whole is refused, or did not arrive.
        """
        body = {"task_id": task_id, "wants": wants}
        answer = self._parsed("grants", body, GrantsAnswer, "sends no grants")
        if len(answer.grants) != len(wants):
            raise ProtocolError(
                f"the desk of {self} answers {len(wants)} questions with {len(answer.grants)}"
            )
        found: list[Leave | PhotonError] = []
        for want, part in zip(wants, answer.grants, strict=True):
            grant = part.leave()
            if isinstance(grant, PhotonError):
                found.append(grant)
            elif grant is None or (grant.verb, part.key) != (want["verb"], want["key"]):
                raise ProtocolError(f"the desk of {self} answers another question than was asked")
            else:
                # By the desk's clock on both sides: this machine's may be minutes off.
                left_s = grant.expires_at - answer.server_time
                found.append(Leave(grant, time.monotonic() + left_s))
        return found

    def _given_certificate(self) -> tuple[str, float]:
        answer = self._parsed("join", {}, CertificateAnswer, "gives no certificate")
        return answer.certificate, answer.left_s

    def _parsed(
        self,
        what: str,
        body: dict[str, Any],
        kind: type[AnswerKind],
        trouble: str,
        *,
        patience_s: float | None = None,
    ) -> AnswerKind:
        try:
            return kind.model_validate(self._asked(what, body, patience_s=patience_s))
        except ValidationError as error:
            # Its text would quote URLs.
            where = ".".join(str(part)[:40] for part in error.errors()[0]["loc"])
            raise ProtocolError(f"the desk of {self} {trouble}: {where}") from None

    def _asked(
        self, what: str, body: dict[str, Any] | None, *, patience_s: float | None = None
    ) -> dict[str, Any]:
        path = f"{DESK_PATH}/{what}"
        content = json.dumps(body).encode() if body is not None else None
        method = "POST" if content is not None else "GET"
        headers, client = {}, self._stranger
        member = self._member if what not in ("join", "health") else None
        if content is not None:
            if self._key is None:
                raise MembershipError(f"asking the desk for {what} needs the node's key")
            if member is not None:
                client, _ = member.client(self._given_certificate)
            headers = sign_request(
                self._key, method, path, content, now=time.time(), audience=self._audience
            )
            headers["content-type"] = "application/json"
            if patience_s is not None:
                headers[PATIENCE_HEADER] = f"{patience_s:.0f}"
        try:
            url = self._origin + path
            patience = httpx2.Timeout(self._timeout_s, read=patience_s or self._timeout_s)
            with client.stream(
                method, url, content=content, headers=headers, timeout=patience
            ) as answer:
                text = _read(answer)
        except httpx2.RequestError as error:
            if member is not None and not isinstance(error, httpx2.TimeoutException):
                member.doubt()
            raise self._trouble(error) from error
        return self._document(answer, text, what)

    def _document(self, answer: httpx2.Response, text: bytes, what: str) -> dict[str, Any]:
        status = answer.status_code
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        if status == 200 and isinstance(document, dict):
            return document
        try:
            told = Failure.model_validate(document).error.raised()
        except ValidationError:
            told = None
        if status in _LATER:
            message = told.message if told else f"its door answers {status}"
            raise UnreachableError(
                f"the desk of {self} can't answer just now: {message}",
                hint=(told.hint if told else None) or "It is starting or busy: try again soon.",
            ) from told
        if told is not None and status >= 400:
            raise told
        raise ProtocolError(
            f"{self} is there but is no desk of Photon's: status {status} to {what}",
            hint="Is the address right, and does `photon serve` run there with this version?",
        )

    def _trouble(self, error: httpx2.RequestError) -> PhotonError:
        """Our error for one of httpx's."""
        refused, proxy = distrust(error), proxy_to(self._origin)
        if refused is not None:
            words, hint = distrusted(refused, proxy)
            return CertificateError(
                f"{self} can't prove that it is the aggregator: {words}", hint=hint
            )
        if isinstance(error, httpx2.TimeoutException):
            words = f"no answer within {self._timeout_s:g} s"
        else:
            words = printable(str(error))[:300] or type(error).__name__
        if proxy is not None:
            return UnreachableError(
                f"{self} can't be reached through the proxy {proxy}: {words}",
                hint="Is the proxy right, does it want a password, and does it let this machine "
                "connect to that host and port? NO_PROXY names hosts that need none.",
            )
        return UnreachableError(
            f"{self} can't be reached: {words}",
            hint="Is the address right, is `photon serve` up, and does a firewall let this machine "
            "connect to that port?",
        )

    def __str__(self) -> str:
        return self._address


def _origin(address: str) -> str:
    """Scheme, host and port."""
    plain = address.startswith("http://")
    parts = urlsplit(address if plain else f"https://{address.removeprefix('https://')}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or not port or parts.path not in ("", "/") or parts.username is not None:
        raise UnreachableError(
            f"{address[:200]!r} is no address of an aggregator",
            hint="HOST:PORT, for instance photon.example:8443.",
        )
    if plain and not is_loopback(parts.hostname):
        raise UnreachableError(
            f"{address[:200]!r} is not encrypted", hint="HOST:PORT, without http://."
        )
    return f"{parts.scheme}://{parts.netloc}"


def _read(answer: httpx2.Response) -> bytes:
    """The body, if it is not too long."""
    pieces, size = [], 0
    for piece in answer.iter_raw():
        size += len(piece)
        if size > _MOST_BYTES:
            raise ProtocolError(f"an answer of more than {_MOST_BYTES} bytes; no desk sends that")
        pieces.append(piece)
    return b"".join(pieces)
