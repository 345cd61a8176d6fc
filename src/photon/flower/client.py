"""The ClientApp: hands a question to the site's own trainer, and its signed answer back.

Flower starts a process for each message, which waits for as long as the trainer takes. Nothing of a
question is read here, and where Photon's node is only the site itself says, to its SuperNode:
`--node-config 'photon-home="photon-node"'`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from photon.errors import MembershipError, PhotonError
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.membership.signing import SEAT, sign_document
from photon.silo.socket import SOCKET_FILE, answer_of, ask_trainer, frame, refusal_of

#: The record of a message that is ours.
RECORD = "photon"

app = ClientApp()


def seat(challenge: bytes, node_id: int) -> bytes:
    """What a member signs who is to be found at a Flower node: this once, and at no other."""
    return b"%d " % node_id + challenge


@app.query("seat")
def take_seat(message: Message, context: Context) -> Message:
    """Say whose node this is."""
    key = NodeKey.load(_home(context) / "node.key")
    signed = seat(message.content[RECORD]["challenge"], context.node_id)
    said = SignedReply("", signed, sign_document(key, SEAT, signed), key.fingerprint)
    return _framed(message, answer_of(said))


@app.query("ask")
def answer(message: Message, context: Context) -> Message:
    """What the trainer says, or why it says nothing."""
    asked = message.content[RECORD]
    try:
        trainer = _home(context) / SOCKET_FILE
        said = answer_of(ask_trainer(trainer, asked["ask"], within_s=asked["within_s"]))
    except PhotonError as error:
        said = refusal_of(error)
    return _framed(message, said)


def _home(context: Context) -> Path:
    home = context.node_config.get("photon-home")
    if not isinstance(home, str):
        raise MembershipError(
            f"this SuperNode does not know where Photon's node is: photon-home is {home!r}",
            hint="`flower-supernode --node-config 'photon-home=\"FOLDER\"'`; `photon join` has it.",
        )
    return Path(home)


def _framed(message: Message, said: dict[str, object]) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({"frame": frame(said)})}), reply_to=message)
