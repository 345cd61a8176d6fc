"""The ServerApp: takes letters from the aggregator's mailbox to Flower's nodes, and answers back.

A courier of another kind: what a letter is, and what an answer means, is known elsewhere. It may
end at any time, and Flower with it: letters that nothing came back for are there still, for the
next. A message that is under way to a node is not sent there twice.

Whose node is whose Flower does not know: each that appears is asked, and signs with the member's
key. A member's letters go to the node that did so last.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from photon.errors import PhotonError, ProtocolError, RunNotFoundError
from photon.flower.client import RECORD, seat
from photon.membership.keys import FINGERPRINT
from photon.membership.letters import Letter
from photon.membership.records import SignedReply, printable
from photon.membership.roster import RUN_SETTING, Roster, roster_at
from photon.membership.signing import SEAT, verify_document
from photon.silo.socket import reply_of, unframe

log = logging.getLogger("photon.flower")

#: Between two looks: at the mailbox, at what came back, at which nodes there are.
_LOOK_S, _PULL_S, _NODES_S = 0.05, 0.25, 3.0
#: Before a node that is not known to be a member's is asked again; its proof may take so long.
_AGAIN_S, _PROOF_S = 15.0, 600.0
#: As many characters of words are kept as at the desk.
_MOST_WORDS = 1000

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry until the run is over that is served from the home in the run's configuration."""
    logging.basicConfig(level=logging.INFO)  # for `flwr log`
    home = Path(str(context.run_config["home"]))
    with roster_at(home) as roster:
        if (run := roster.setting(RUN_SETTING)) is None:
            hint = "Start `photon serve` first."
            raise RunNotFoundError(f"nothing is served from {home}", hint=hint)
        bridge = Bridge(grid, roster)
        while not (Path(run) / "summary.json").exists():
            bridge.turn()
            time.sleep(_LOOK_S)


@dataclass
class _Sent:
    """A message under way to a node.

    Attributes:
        challenge: that its member is to sign; empty with a letter.
        letter: the newest with this message; the loop may have sent it again meanwhile.
    """

    node: int
    challenge: bytes = b""
    silo: str = ""
    letter: Letter | None = None


class Bridge:
    """Carries between a mailbox and Flower's nodes, as often as `turn` is called."""

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self._grid = grid
        self._roster = roster
        self._sent: dict[str, _Sent] = {}  # by Flower's id of the message
        self._holders: dict[int, str] = {}  # by node, whose key it holds; the newest last
        self._due_s: dict[int, float] = {}  # when a node is asked for that
        self._seen: tuple[int, ...] | None = None
        self._nodes_s = self._pull_s = 0.0

    def turn(self) -> None:
        """Look once at everything that it is time to look at."""
        now_s = time.monotonic()
        if self._sent and now_s >= self._pull_s:
            self._pull_s = now_s + _PULL_S
            for message in self._grid.pull_messages(list(self._sent)):
                self._take(message)
        if now_s >= self._nodes_s:
            self._nodes_s = now_s + _NODES_S
            self._look_at_nodes(now_s)
        if (version := self._roster.version()) != self._seen:
            self._seen = version
            self._look_at_letters()

    def _look_at_nodes(self, now_s: float) -> None:
        here = set(self._grid.get_node_ids())
        keys = {member.fingerprint for member in self._roster.members()}
        self._holders = {
            node: key for node, key in self._holders.items() if node in here and key in keys
        }
        self._due_s = {node: self._due_s.get(node, now_s) for node in here}
        for node in here - self._holders.keys():
            if now_s >= self._due_s[node]:
                self._due_s[node] = now_s + _PROOF_S
                sent = _Sent(node, challenge=secrets.token_bytes(32))
                self._push(sent, "query.seat", {"challenge": sent.challenge}, _PROOF_S)

    def _look_at_letters(self) -> None:
        nodes = {fingerprint: node for node, fingerprint in self._holders.items()}
        members = {one.name: one for one in self._roster.members() if one.status == "active"}
        for silo, ids in self._roster.letters.unanswered().items():
            member = members.get(silo)
            if member is not None and (node := nodes.get(member.fingerprint)) is not None:
                for letter in self._roster.letters.fetch(ids).values():
                    self._send(node, silo, letter)

    def _send(self, node: int, silo: str, letter: Letter) -> None:
        for sent in self._sent.values():
            asked = sent.letter.message if sent.letter is not None else None
            if (sent.node, sent.silo, asked) == (node, silo, letter.message):
                sent.letter = letter
                return
        within_s = max(1.0, letter.until - time.time())
        body = {"ask": letter.message, "within_s": within_s}
        if not self._push(_Sent(node, silo=silo, letter=letter), "query.ask", body, within_s):
            refused = "Flower's SuperLink did not take the question"
            self._roster.letters.answer(silo, letter.id, refused)

    def _push(self, sent: _Sent, kind: str, body: dict[str, bytes | float], ttl_s: float) -> bool:
        content = RecordDict({RECORD: ConfigRecord(body)})
        message = Message(content, dst_node_id=sent.node, message_type=kind, ttl=ttl_s)
        ids = [one for one in self._grid.push_messages([message]) if one]
        self._sent.update(dict.fromkeys(ids, sent))
        return bool(ids)

    def _take(self, message: Message) -> None:
        """What came back. Flower's own errors name the message, too, if not the node."""
        sent = self._sent.pop(message.metadata.reply_to_message_id, None)
        if sent is None:
            return
        self._due_s[sent.node] = time.monotonic() + _AGAIN_S
        try:
            said = _said(message)
            if sent.letter is None:
                self._take_proof(sent, said)
        except PhotonError as error:
            said = printable(error.message)[:_MOST_WORDS]
            if sent.letter is None:
                log.warning("Flower's node %d is no member's: %s", sent.node, said)
        if sent.letter is not None:
            self._roster.letters.answer(sent.silo, sent.letter.id, said)

    def _take_proof(self, sent: _Sent, said: SignedReply) -> None:
        member = self._roster.by_fingerprint(said.fingerprint)
        signed = seat(sent.challenge, sent.node)
        verify_document(member.public_key, SEAT, signed, said.signature)
        self._holders.pop(sent.node, None)
        self._holders[sent.node] = member.fingerprint
        self._seen = None  # letters may wait for it
        log.info("Flower's node %d is %s's", sent.node, member.name)


def _said(message: Message) -> SignedReply:
    """An answer within bounds; what it means is not known here.

    Raises:
        PhotonError: there is none, and why.
    """
    if message.has_error():
        raise ProtocolError(f"Flower says: {message.error.reason}")
    data = dict(message.content.get(RECORD) or {}).get("frame")
    record = unframe(data) if isinstance(data, bytes) else None
    if record is None:
        raise ProtocolError("an answer over Flower that is not Photon's")
    said = reply_of(record)
    if not (FINGERPRINT.fullmatch(said.fingerprint) and said.signature.isascii()):
        raise ProtocolError("an answer over Flower whose signature is none")
    return said
