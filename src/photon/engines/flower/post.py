"""The engine's post (photon.engines.remote.Post) over Flower's Grid.

Flower loses a message without a word in three cases, each seen in its code and closed here or in
`supernode`: an answer on its way to us when the connection breaks (it counts as delivered), a task
on its way to a supernode likewise, and a task in the memory of a supernode that dies and is back
before anyone missed it. A message that may be lost gets words for an answer, so that the engine
asks again; a trainer answers what it has answered before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from photon.errors import DeployError, UnknownMemberError, UnreachableError
from photon.membership.records import SignedReply
from photon.membership.roster import Roster

#: Name of the one record of a message, both ways.
RECORD = "photon"

#: A node's state is looked up anew so often, s, while something is on its way to it.
_LOOK_S = 1.0

#: A superlink whose answers are errors is borne for so long, s. (One that is away is waited for.)
_PATIENCE_S = 120.0

#: Of another's words, so many characters are kept.
_MOST_WORDS = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sent:
    """A message on its way: to which node, since when (this machine's clock, s)."""

    silo: str
    node: int
    at: float


class FlowerPost:
    """Carries Asks to nodes and their signed replies back. For one thread.

    Args:
        grid: of a running ServerApp.
        roster: knows each member's node.
    """

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self._grid = grid
        self._roster = roster
        self._sent: dict[str, _Sent] = {}
        self._online: dict[int, float] = {}
        self._looked_s = -_LOOK_S
        self._failing_since_s: float | None = None
        self._doubt = _Doubt(getattr(grid, "_retry_invoker", None))

    def push(self, silo: str, ask: bytes, *, ttl_s: float) -> str:
        """Send an Ask: Post.push.

        Raises:
            UnknownMemberError: no such member, or its node is not connected just now.
            DeployError: this run is over.
            UnreachableError: the superlink answers nothing but errors.
        """
        node = self._roster.member(silo).flower_node_id
        if node is None:
            raise UnknownMemberError(
                f"{silo} has no node registered with Flower",
                hint="It joins with `photon join`; see `photon members list`.",
            )
        self._look()
        if node not in self._online:
            raise UnknownMemberError(f"{silo}'s node is not connected")
        content = RecordDict({RECORD: ConfigRecord({"ask": ask})})
        message = Message(content, dst_node_id=node, message_type="train", ttl=ttl_s)
        names = self._asked(lambda: list(self._grid.push_messages([message])))
        if not names or not names[0]:
            raise UnknownMemberError(f"Flower does not take a message to {silo}'s node {node}")
        self._sent[names[0]] = _Sent(silo, node, message.metadata.created_at)
        return names[0]

    def pull(self, ids: Collection[str]) -> dict[str, SignedReply | str]:
        """What has arrived for these since the last call: Post.pull. No reply has a task_id.

        Raises:
            DeployError: this run is over.
            UnreachableError: the superlink answers nothing but errors.
        """
        found: dict[str, SignedReply | str] = {
            one: "it is not known here; it was asked by another process"
            for one in ids
            if one not in self._sent
        }
        asked = {one: self._sent[one] for one in ids if one in self._sent}
        if asked:
            # Nodes first: what a node answered before it was seen anew is then among the replies.
            self._look()
            self._doubt.clear()
            for message in self._asked(lambda: list(self._grid.pull_messages(set(asked)))):
                found[message.metadata.reply_to_message_id] = _answer(message)
            for one, sent in asked.items():
                if one not in found and (words := self._lost(sent)):
                    found[one] = words
        for one in found:
            self._sent.pop(one, None)
        return found

    def present(self) -> set[str]:
        """Active members whose nodes are connected.

        Raises:
            DeployError: this run is over.
            UnreachableError: the superlink answers nothing but errors.
        """
        self._look()
        return {
            member.name
            for member in self._roster.members()
            if member.status == "active" and member.flower_node_id in self._online
        }

    def _lost(self, sent: _Sent) -> str | None:
        """Words, where a message may never be answered although Flower says nothing."""
        if self._doubt.raised:
            return "the connection to the superlink broke while answers were under way"
        if self._online.get(sent.node, 0.0) > sent.at:
            return f"{sent.silo}'s node was started anew after it was asked"
        return None

    def _look(self) -> None:
        """Which nodes are connected, and since when."""
        if time.monotonic() - self._looked_s < _LOOK_S:
            return
        nodes: Any = self._asked(lambda: list(self._grid.get_nodes()))
        if nodes is not None:
            self._online = {int(one.node_id): _seconds(one.last_activated_at) for one in nodes}
            self._looked_s = time.monotonic()

    def _asked(self, call: Callable[[], Any]) -> Any:
        """Call the grid, which waits for a superlink that is away; [] where it fails for now."""
        try:
            answer = call()
        except RunNotRunningException:
            raise DeployError(
                "Flower has ended this run; nobody answers to it any more",
                hint="`photon serve` submits it again and goes on from the last checkpoint.",
            ) from None
        except httpx.HTTPError as error:
            now_s = time.monotonic()
            self._failing_since_s = self._failing_since_s or now_s
            if now_s - self._failing_since_s > _PATIENCE_S:
                raise UnreachableError(
                    f"Flower's superlink has answered nothing but errors for {_PATIENCE_S:g} s: "
                    f"{str(error)[:300]}",
                    hint="Its log, logs/superlink.log in serve's home, says why.",
                ) from error
            _log.warning("the superlink: %s", str(error)[:300])
            self._doubt.raised = True
            return []
        self._failing_since_s = None
        return answer


class _Doubt:
    """Raised where a request may have been answered without the answer reaching us.

    Flower's grid retries by itself; a request that was sent and broke off has no other trace.
    """

    def __init__(self, invoker: Any) -> None:
        self.raised = False
        if invoker is None:
            return
        thread, told = threading.get_ident(), invoker.on_backoff

        def on_backoff(state: Any) -> None:
            never_sent = isinstance(state.exception, httpx.ConnectError | httpx.ConnectTimeout)
            if threading.get_ident() == thread and not never_sent:
                self.raised = True
            if told is not None:
                told(state)

        invoker.on_backoff = on_backoff

    def clear(self) -> None:
        self.raised = False


def _answer(message: Message) -> SignedReply | str:
    if message.has_error():
        reason = str(message.error.reason)[:_MOST_WORDS]
        return f"{reason} (Flower's code {message.error.code})"
    try:
        record = message.content[RECORD]
        text, signature, by = record["reply"], record["signature"], record["fingerprint"]  # type: ignore[index]
    except (KeyError, TypeError):
        return "an answer that is none: without a reply, a signature or a fingerprint"
    if not (isinstance(text, bytes) and isinstance(signature, str) and isinstance(by, str)):
        return "an answer that is none: its parts are of other types"
    return SignedReply("", text, signature, by)


def _seconds(moment: str) -> float:
    """ISO 8601, with a time zone, in seconds since the epoch; 0 for none."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0
