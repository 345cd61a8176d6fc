"""A shim takes a task and dies before it fetches the message: does the supernode ever answer?

python lost_message.py ours|flowers     prints the words of the answer, or "nothing"
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory

from photon.engines.flower import pace, supernode


def main() -> None:
    pace.TASK_HEARTBEAT_S = 0.2  # type: ignore[assignment]
    if sys.argv[1] == "ours":
        supernode.prepare(Path("unused"))
    in_memory_corestate.HEARTBEAT_DEFAULT_INTERVAL = 0.2  # type: ignore[attr-defined]
    state = NodeStateFactory(ObjectStoreFactory()).state()
    state.set_node_id(7)
    message = the_message()
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=5, fab_hash="0" * 64)
    assert task is not None
    state.object_store.preregister(5, get_object_tree(message))
    state.store_message(message)
    assert state.claim_task(task)
    assert state.activate_task(task)
    time.sleep(0.6)
    answers = state.get_messages_legacy(is_reply=True)
    print(answers[0].error.reason if answers else "nothing")


def the_message() -> Message:
    metadata = Metadata(
        run_id=5,
        message_id="",
        src_node_id=1,
        dst_node_id=7,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=60.0,
        message_type="train",
    )
    content = RecordDict({"photon": ConfigRecord({"ask": b"{}"})})
    message = make_message(metadata=metadata, content=content)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


main()
