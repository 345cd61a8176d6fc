"""A shim for tests: takes one task, announces an answer, and dies before it sends it.

python half_an_answer.py HOST:PORT SECRET
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_tree, no_object_id_recompute
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor

from photon.engines.flower import shim


def main() -> None:
    half = shim.Shim(sys.argv[1], Path(sys.argv[2]), Path("unused"))
    auth = SuperExecAuthHttpInterceptor(
        master_secret=half._secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
    )
    with half._client(auth) as client:
        while True:
            taken = client.AcquireTask(AcquireTaskRequest(supported_task_types={"flwr-clientapp"}))
            if taken.token:
                break
            time.sleep(0.1)
    client = half._client(RuntimeTokenHttpInterceptor(taken.token))
    task = shim._Task(client, Path("unused"), lambda _: None)
    message = task._fetch()
    reply = Message(RecordDict({"photon": ConfigRecord({"reply": b"never"})}), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
        )
    print("announced")


main()
