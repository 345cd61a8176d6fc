"""An answer that came while nobody waited for it, as after a run that ended: is it ever sent?

python stray_answer.py ours|flowers     prints how many answers were sent by an idle supernode
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Error
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

from photon.engines.flower import supernode

SENT: list[str] = []


@contextlib.contextmanager
def no_superlink() -> Iterator[tuple]:
    def send(message, tree, seconds) -> tuple[set[str], str]:
        SENT.append(message.metadata.message_id)
        return set(), ""

    nothing = None
    yield 7, nothing, send, nothing, nothing, nothing, nothing, nothing


def main() -> None:
    start_client_internal._init_connection = no_superlink
    if sys.argv[1] == "ours":
        supernode.prepare(Path("unused"))
    state = NodeStateFactory(ObjectStoreFactory()).state()
    state.set_node_id(7)
    metadata = Metadata(
        run_id=5,
        message_id="",
        src_node_id=7,
        dst_node_id=1,
        reply_to_message_id="asked",
        group_id="",
        created_at=time.time(),
        ttl=60.0,
        message_type="train",
    )
    answer = make_message(metadata=metadata, error=Error(2, "whatever"))
    start_client_internal._insert_message(answer, state, state.object_store)
    with start_client_internal._init_connection():
        for _ in range(2):
            start_client_internal._pull_and_store_message(
                state=state,
                object_store=state.object_store,
                node_config={},
                receive=lambda: None,
                get_run=None,
                get_fab=None,
                pull_object=None,
                confirm_message_received=None,
                trusted_entities=None,
            )
    print(len(SENT))


main()
