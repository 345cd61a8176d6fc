"""The desk of `photon serve`: invitations, presence, questions and answers, leave for the store.

It listens on loopback, and the front door forwards /photon/v2/* to it. What an operator may ask is
on a unix socket that only the user who runs serve can open, and never behind the door.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from starlette.concurrency import run_in_threadpool

from photon.deploy.attendance import Attendance
from photon.deploy.certificates import member_certificate
from photon.deploy.desk_requests import (
    ADMISSION_PATH,
    CERTIFICATE_HEADER,
    Counters,
    DeskLimits,
    Granting,
    require_same_key,
)
from photon.deploy.desk_server import (
    Caller,
    RefusedError,
    Routes,
    ServerThread,
    ask_operator,
    loopback_socket,
    private_socket,
)
from photon.deploy.polls import Polls
from photon.errors import (
    AccessRefusedError,
    DeployError,
    PhotonError,
    ProtocolError,
    SignatureError,
    UnreachableError,
)
from photon.membership.bulletin import told
from photon.membership.desk_documents import (
    DESK_PATH,
    MOST_GRANTS_BYTES,
    MOST_JOIN_BYTES,
    MOST_REPLY_BYTES,
    MOST_SMALL_BYTES,
    CheckBody,
    DrainBody,
    GrantsBody,
    JoinBody,
    ReplyBody,
    TaskBody,
    error_record,
    parse_body,
)
from photon.membership.keys import canonical_pem, fingerprint_of
from photon.membership.records import OpenTask, printable
from photon.membership.roster import Member, Presence, Roster
from photon.membership.signing import KEY_HEADER, RequestVerifier
from photon.store.presign import Presigner
from photon.telemetry.events import finite
from photon.version import photon_version

__all__ = ["Desk", "DeskLimits", "ask_operator"]

logger = logging.getLogger("photon.desk")

#: Told what happened: "joined", "refused", "drain" or "stop", and about it.
OnEvent = Callable[[str, dict[str, Any]], None]

#: Of an open task, for the operator.
_TASK_SHOWN = ("id", "run", "round", "silo", "kind", "opened_at", "until", "most_bytes")
_EVENTS_SHOWN = 20

#: The more members, the less often each idle one speaks.
LEAST_PRESENCE_S, PRESENCES_PER_S = 5.0, 4.0
#: Two polls, and what a node says besides.
CONNECTIONS_EACH = 4


class Desk:
    """Answers silos and the operator, in a thread of its own.

    Args:
        roster: members, tasks, settings; other processes change it at the same time.
        presigner: makes grants, with URLs as silos see the store.
        limits: see there.
        about: what `photon status` shows besides: of the "run", and of its "services".
        on_event: told of what happens, from several threads; it must not block.
        store_origin: scheme, host and port that grants name, where the store is not behind the
            door: silos hold every grant against it.
        audience: fingerprint of the authority by which silos know this aggregator; their requests
            are signed for it.
        authority: folder of the authority that signs members' certificates; None where no door
            asks for them.
    """

    def __init__(
        self,
        roster: Roster,
        presigner: Presigner,
        *,
        limits: DeskLimits | None = None,
        about: Callable[[], Mapping[str, Any]] = dict,
        on_event: OnEvent | None = None,
        store_origin: str | None = None,
        audience: str = "",
        authority: Path | None = None,
    ) -> None:
        self._roster = roster
        self._authority = authority
        self._store_origin = store_origin
        self._operator_socket: Path | None = None
        self._limits = limits or DeskLimits()
        self._about, self._on_event = about, on_event
        self._granting = Granting(roster, presigner, self._limits)
        self._counters = Counters(self._limits)
        self._verifier = RequestVerifier(roster.by_fingerprint, audience=audience)
        self._server: ServerThread | None = None
        self.polls = Polls(roster, self._limits.polls_each)
        self._attendance = Attendance(roster)
        self._started_at, self.port = 0.0, 0

    # --- running ---

    def start(
        self, port: int = 0, operator_socket: Path | None = None, *, control: str = "desk"
    ) -> None:
        """Listen on loopback; when this returns, requests are answered.

        Args:
            port: any free one if 0; the attribute `port` says which.
            operator_socket: where to listen for the operator; None for nowhere.
            control: "desk" hands questions out here; with another, somebody else does.

        Raises:
            PortInUseError: somebody else listens there, or on the operator's socket.
            DeployError: the operator's socket can't be made, or the server does not come up.
        """
        if self._server is not None:
            raise DeployError("this desk was started already")
        self._started_at = time.time()
        self.polls = Polls(self._roster, self._limits.polls_each, given=control == "desk")
        listener = loopback_socket(port)
        self.port = listener.getsockname()[1]
        served = [(self._for_silos().application(), listener)]
        if operator_socket is not None:
            try:
                private = private_socket(operator_socket)
            except BaseException:
                listener.close()
                raise
            self._operator_socket = operator_socket
            served.append((self._for_operator().application(), private))
        self._server = ServerThread(served)
        self._make_room()
        self._attendance.start(self.polls.idle)
        self._server.start()

    def stop(self) -> None:
        """Answer what was asked, then listen no more. Again changes nothing."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._operator_socket is not None:
            with contextlib.suppress(OSError):
                self._operator_socket.unlink()
        self.polls.close()
        server.stop()
        self._attendance.close()

    def _make_room(self) -> None:
        """For as many connections as there are members, and others besides."""
        if self._server is not None:
            members = len(self._roster.active_keys())
            self._server.allow(self._limits.most_connections + CONNECTIONS_EACH * members)

    @property
    def polls_held(self) -> int:
        """How many silos wait for a question."""
        return self.polls.count()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._server is not None and self._server.alive

    def _for_silos(self) -> Routes:
        routes = Routes(self._note_caller, body_s=self._limits.body_s)
        routes.add("POST", f"{DESK_PATH}/join", self._join, MOST_JOIN_BYTES)
        routes.add("POST", f"{DESK_PATH}/presence", self._presence, MOST_SMALL_BYTES)
        routes.add("POST", f"{DESK_PATH}/grants", self._grants, MOST_GRANTS_BYTES)
        routes.add("POST", f"{DESK_PATH}/check", self._check, 1024)
        routes.add("POST", f"{DESK_PATH}/task", self._task, MOST_SMALL_BYTES)
        routes.add("POST", f"{DESK_PATH}/reply", self._reply, MOST_REPLY_BYTES)
        routes.add("GET", f"{DESK_PATH}/health", self._health, 0)
        routes.add("GET", ADMISSION_PATH, self._admit, 0)
        return routes

    def _for_operator(self) -> Routes:
        routes = Routes(self._note_caller, body_s=self._limits.body_s)
        routes.add("GET", "/operator/status", lambda _: self.status(), 0)
        routes.add("POST", "/operator/drain", self._drain, 1024)
        routes.add("POST", "/operator/stop", self._stop, 1024)
        return routes

    # --- what is noted ---

    def _note_caller(self, caller: Caller, error: PhotonError) -> None:
        self._note(caller.name or caller.address, caller.path, error)

    def _note(self, actor: str, path: str, error: PhotonError) -> None:
        """In the roster's events, but not without end: a flood must not fill the disk."""
        left_out = self._counters.noting(actor)
        if left_out is None:
            return
        what = path.removeprefix(DESK_PATH + "/")
        detail = printable(error.message)[:500]
        if left_out:
            detail += f" (and {left_out} refusals before it that were not noted)"
        try:
            self._roster.journal.note(actor, f"refused {what}", detail, refusal=True)
        except Exception as trouble:
            logger.error("can't note a refusal: %s", type(trouble).__name__)
        self._tell(
            "refused", {"actor": actor, "what": what, "code": error.exit_code, "why": detail}
        )

    def _tell(self, kind: str, detail: dict[str, Any]) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(kind, detail)
        except Exception as trouble:
            logger.error("on_event %s: %s", kind, type(trouble).__name__, exc_info=trouble)

    # --- who asks ---

    def _member(self, caller: Caller) -> Member:
        """Whose request this is; an active member's, or it is refused."""
        # It takes a millisecond: nobody gets many for a key it lacks, or spends a certificate's.
        given = caller.headers
        key, shown = given.get(KEY_HEADER.lower(), "")[:80], given.get(CERTIFICATE_HEADER)
        claimed = f"{caller.address} {key} {shown}"
        if not self._counters.forged.take(claimed, spend=False):
            raise _too_many("refused requests", noted=False)
        try:
            require_same_key(key, shown)
            member = self._verifier.verify(
                "POST", caller.path, caller.body, caller.headers, now=time.time()
            )
            if member.status != "active":
                # Raises, in words that only who holds the key gets to read.
                member = self._roster.active(member.fingerprint)
        except PhotonError:
            self._counters.forged.take(claimed)
            if not self._counters.strangers.take(caller.address):
                raise _too_many("refused requests", noted=False) from None
            raise
        caller.name = member.name
        if not self._counters.requests.take(member.name):
            raise _too_many(f"requests of {member.name}")
        return member

    def _require_own_key(self, caller: Caller, body: JoinBody, pem: str) -> None:
        """Refuse to register a key that the caller does not hold: it may be another node's."""
        claimed = Member(body.name, pem, fingerprint_of(pem), "active", body.facts, 0.0)

        def joiner(fingerprint: str) -> Member:
            if fingerprint != claimed.fingerprint:
                raise SignatureError(
                    "the request to join is signed with another key than the one it registers"
                )
            return claimed

        self._verifier.verify(
            "POST", caller.path, caller.body, caller.headers, now=time.time(), find=joiner
        )

    # --- what silos ask ---

    def _admit(self, caller: Caller) -> dict[str, Any]:
        """For the door: whether the holder of a certificate, which it checked, is let in."""
        shown = caller.headers.get(CERTIFICATE_HEADER, "")
        self._roster.active(shown.replace("CN=", "sha256:", 1))
        return {"ok": True}

    def _join(self, caller: Caller) -> dict[str, Any]:
        if caller.body == b"{}":
            # A member that has its key and no certificate, or one that ends soon.
            return self._certificate(self._member(caller))
        body = parse_body(JoinBody, caller.body)
        # Cheap, and first: whoever has no invitation spends nothing of those who have one.
        invitation = self._roster.invitation(body.token)
        counted = f"{caller.address} {invitation or ''}"
        if not self._counters.failed_joins.take(counted, spend=False):
            raise _too_many("attempts to join that failed", noted=False)
        try:
            member = self._redeemed(caller, body)
        except PhotonError:
            self._counters.failed_joins.take(counted)
            raise
        return {
            "name": member.name,
            "fingerprint": member.fingerprint,
            "status": member.status,
            "joined_at": member.joined_at,
            "server_time": time.time(),
            "store": self._store_origin,
        }

    def _certificate(self, member: Member) -> dict[str, Any]:
        if self._authority is None:
            raise ProtocolError("no door is before this desk, and none asks for a certificate")
        pem, until = member_certificate(self._authority, member.public_key, member.fingerprint)
        return {"certificate": pem, "left_s": until.timestamp() - time.time()}

    def _redeemed(self, caller: Caller, body: JoinBody) -> Member:
        """The member that an invitation makes of the caller, or made of it before."""
        pem = canonical_pem(body.public_key)
        self._require_own_key(caller, body, pem)
        known = [
            one
            for one in self._roster.members()
            if (one.name, one.public_key, one.facts) == (body.name, pem, body.facts)
            and one.status == "active"
        ]
        # The same node again, whose answer was lost or whose registration failed: it is in.
        if known:
            return known[0]
        member = self._roster.redeem(body.token, body.name, pem, body.facts)
        self._attendance.forget(member.name)
        self._make_room()
        self._tell("joined", {"name": member.name, "fingerprint": member.fingerprint})
        return member

    def _presence(self, caller: Caller) -> dict[str, Any]:
        member = self._member(caller)
        presence = parse_body(Presence, caller.body)
        now = time.time()
        self._attendance.seen(member.name, presence, now=now)
        return {
            "ok": True,
            "server_time": now,
            "member_status": member.status,
            "draining": bool(self._roster.setting("draining", False)),
            "told": told(self._roster, member.name),
            "next_s": max(LEAST_PRESENCE_S, self._attendance.count() / PRESENCES_PER_S),
        }

    def _grants(self, caller: Caller) -> dict[str, Any]:
        member = self._member(caller)
        body = parse_body(GrantsBody, caller.body)
        now = time.time()
        answers, errors = self._granting.answers(member, body, now=now)
        if errors:
            more = f"; and {len(errors) - 1} more in this request" if len(errors) > 1 else ""
            self._note(member.name, caller.path, type(errors[0])(errors[0].message + more))
        return {"server_time": now, "grants": answers}

    def _check(self, caller: Caller) -> dict[str, Any]:
        """For `photon join --check`: how a member stands. It does not count as being here."""
        member = self._member(caller)
        parse_body(CheckBody, caller.body)
        try:
            store = self._granting.probe()
        except PhotonError as error:
            store = {"error": error_record(error)}
        return {
            "server_time": time.time(),
            "name": member.name,
            "member_status": member.status,
            "store": store,
        }

    async def _task(self, caller: Caller) -> dict[str, Any]:
        """A question for a member, once there is one."""
        polls = self.polls

        def asks() -> tuple[Member, TaskBody]:
            member = self._member(caller)
            body = parse_body(TaskBody, caller.body)
            self._attendance.require_alone(member.name, body.boot)
            return member, body

        member, body = await run_in_threadpool(asks)
        hold_s, patience_s = polls.holding(self._limits.poll_s, caller.headers)
        letter = await polls.next(member, body, hold_s)
        if letter is None:
            return {"letter": None, "patience_s": patience_s}
        # By how long and not until when: a node's clock is another.
        left_s = letter.until - time.time()
        message = base64.b64encode(letter.message).decode()
        given = {"id": letter.id, "left_s": left_s, "message": message}
        return {"letter": given, "patience_s": patience_s}

    def _reply(self, caller: Caller) -> dict[str, Any]:
        """What a member says to a letter; that it is its answer the federation's loop finds."""
        member = self._member(caller)
        body = parse_body(ReplyBody, caller.body)
        self._attendance.require_alone(member.name, body.boot)
        if not self._roster.letters.answer(member.name, body.letter, body.reply()):
            raise AccessRefusedError(
                f"{member.name} is not asked {body.letter} (any more)",
                hint="It was answered, or asked anew, or its round is over.",
            )
        return {"ok": True}

    def _health(self, _: Caller) -> dict[str, Any]:
        return {"ok": True, "version": photon_version(), "server_time": time.time()}

    # --- what the operator asks ---

    def status(self) -> dict[str, Any]:
        """Who is here and what each is doing, since when, until when; open tasks, services, run.

        Times are seconds since the epoch.
        """
        now = time.time()
        presences = self._attendance.now()
        members, tasks = [], []
        for member in self._roster.members():
            own = self._roster.tasks.open_for(member.name)
            tasks += own
            members.append(
                {
                    "name": member.name,
                    "status": member.status,
                    "fingerprint": member.fingerprint,
                    "joined_at": member.joined_at,
                    "photon_version": member.facts.photon_version,
                    "train_tokens": member.facts.train_tokens,
                    **self._shown(presences.get(member.name), own, now),
                }
            )
        return {
            "server_time": now,
            "started_at": self._started_at,
            "version": photon_version(),
            "draining": bool(self._roster.setting("draining", False)),
            "stopping": bool(self._roster.setting("stopping", False)),
            **finite(
                to_jsonable_python({"run": {}, "services": (), **self._about()}, fallback=str)
            ),
            "members": members,
            "open_tasks": [
                {name: getattr(task, name) for name in _TASK_SHOWN}
                | {"granted_bytes": self._granting.written_bytes(task)}
                for task in tasks
            ],
            "events": [asdict(event) for event in self._roster.journal.events(_EVENTS_SHOWN)],
        }

    def _shown(
        self, seen: tuple[Presence, float, float] | None, own: list[OpenTask], now: float
    ) -> dict[str, Any]:
        """Whether a member is here, and what it does; presence None if it never was here."""
        if seen is None:
            return {"here": False, "presence": None}
        presence, seen_at, since = seen
        task = next((task for task in own if task.id == presence.task), None)
        return {
            "here": now - seen_at <= self._limits.here_s,
            "presence": {
                **{key: value for key, value in vars(presence).items() if key != "boot"},
                "seen_at": seen_at,
                "since": since,
                "until": task.until if task is not None else None,
            },
        }

    def _drain(self, caller: Caller) -> dict[str, Any]:
        """Finish the round, begin no other; {"draining": false} takes it back."""
        wanted = not caller.body or parse_body(DrainBody, caller.body).draining
        self._roster.set_setting("draining", wanted)
        self._roster.journal.note("operator", "drain" if wanted else "drain taken back", "")
        self._tell("drain", {"draining": wanted})
        return {"ok": True, "draining": wanted}

    def _stop(self, _: Caller) -> dict[str, Any]:
        self._roster.set_setting("stopping", True)
        self._roster.journal.note("operator", "stop", "")
        self._tell("stop", {})
        return {"ok": True, "stopping": True}


def _too_many(what: str, *, noted: bool = True) -> RefusedError:
    error = UnreachableError(
        f"too many {what} in the last minute", hint="Wait a minute and try again."
    )
    return RefusedError(429, error, noted=noted)
