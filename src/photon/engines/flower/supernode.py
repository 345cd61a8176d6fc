"""A silo's connection to the aggregator: `python -m photon.engines.flower.supernode ...`

Flower's supernode, changed in six places, all of them in this process only:

- what comes as a run's bundle is kept unread: nothing of it is unpacked, parsed or imported;
- it asks for tasks sooner than every 3 s while there is something to do (`pace`);
- it and the shim are missed sooner (`pace`);
- started after a crash, it first takes leave in the dead one's name, as the superlink would not let
  it in for as long as the dead one counts as online. The file `--state` remembers the node's id;
- it sends every answer it has. Flower's sends one when it fetched a task, so that one answer to a
  run that has ended makes every later one wait for the task after it;
- after an exchange that broke off half-way it does the same, so that the aggregator, which watches
  for that (`post`), asks again what may have been lost.

No torch, and of Photon nothing but its errors and its way to write a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
from flwr.app import Message
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
)
from flwr.supercore import heartbeat
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.retry import exponential, http_retry
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from photon.engines.flower import pace
from photon.engines.flower.pinned import change, check_flower
from photon.errors import KeyInUseError
from photon.store.disk import write_json

#: Exit code of a supernode that the superlink refuses: not registered (any more), or its key is in
#: use elsewhere. Flower itself ends with 1 for that and for much else.
REFUSED = KeyInUseError.exit_code

#: Somebody who died elsewhere with this key counts as online for so long, s, and a little.
_PATIENCE_S = pace.PATIENCE * pace.NODE_HEARTBEAT_S + 3.0

#: HTTP status with which the superlink refuses to activate a node.
_NOT_ACTIVATED = 412


_Call = TypeVar("_Call", bound=Callable[..., Any])


def _watched(call: _Call) -> _Call:
    """A call of Flower's client, which notes where something may have been lost by it."""

    def watched(client: FleetHttpClient, request: Any) -> Any:
        try:
            return call(client, request)
        except httpx.HTTPStatusError as error:
            # 403: the run is over, and so is the matter. 401: this process is about to end.
            if error.response.status_code >= 500 or error.response.status_code in (404, 408, 429):
                FleetClient.broken = True
            raise
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise  # never sent
        except httpx.TransportError:
            FleetClient.broken = True
            raise

    return cast("_Call", watched)


class FleetClient(FleetHttpClient):
    """Flower's client of the superlink, which remembers, takes leave, and notes what broke off."""

    state_file: Path
    #: Something may have been lost since the last activation.
    broken = False
    #: How often it was asked for a task.
    pulls = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._activation: ActivateNodeRequest | None = None
        self._node = 0

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802
        known = self._take_leave(_orphan(self.state_file))
        patient_until_s = time.monotonic() + (_PATIENCE_S if known else 0.0)
        while True:
            try:
                response = super().ActivateNode(request)
                break
            except httpx.HTTPStatusError as error:
                if error.response.status_code != _NOT_ACTIVATED:
                    raise
                if time.monotonic() > patient_until_s:
                    _refused()
                time.sleep(1.0)
        self._activation, self._node = request, response.node_id
        _remember(self.state_file, response.node_id)
        return response

    @_watched
    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:  # noqa: N802
        FleetClient.pulls += 1
        if FleetClient.broken and self._activation is not None:
            self._take_leave(self._node)
            super().ActivateNode(self._activation)
            FleetClient.broken = False
        return super().PullMessages(request)

    PushMessages = _watched(FleetHttpClient.PushMessages)
    PushObject = _watched(FleetHttpClient.PushObject)
    PullObject = _watched(FleetHttpClient.PullObject)
    ConfirmMessageReceived = _watched(FleetHttpClient.ConfirmMessageReceived)

    def _take_leave(self, node: int) -> bool:
        """Say that a node, if any, has gone; False if the superlink knows no such node of ours."""
        if node:
            try:
                self.DeactivateNode(DeactivateNodeRequest(node_id=node))
            except httpx.HTTPStatusError as error:  # it was not online, or is no node any more
                return error.response.status_code != httpx.codes.UNAUTHORIZED
        return True


class _Pace:
    """Stands for the module `time` in the supernode's loop, which only sleeps."""

    def __init__(self) -> None:
        self._lively_until_s = 0.0

    def sleep(self, seconds: float) -> None:
        now_s = time.monotonic()
        if seconds < 1.0:  # waits for the shim's answer
            self._lively_until_s = now_s + pace.LIVELY_S
            time.sleep(pace.ANSWER_POLL_S)
        else:  # no task
            lively = now_s < self._lively_until_s
            time.sleep(pace.QUICK_POLL_S if lively else pace.IDLE_POLL_S)


class _Loop:
    """Flower's loop fetches a task, waits for an answer, sends it; here it also clears up.

    A run may end between the fetching of a task and its storing, or while it is worked on.
    """

    def __init__(self) -> None:
        self._connect = start_client_internal._init_connection
        self._pull = start_client_internal._pull_and_store_message
        self._push = start_client_internal._push_messages
        self._send: Any = None
        self._push_object: Any = None

    @contextlib.contextmanager
    def connection(self, *args: Any, **options: Any) -> Iterator[tuple[Any, ...]]:
        with self._connect(*args, **options) as connection:
            _, _, self._send, _, _, _, self._push_object, _ = connection
            yield connection

    def pull(
        self,
        *,
        state: InMemoryNodeState,
        object_store: Any,
        receive: Callable[[], Any],
        **options: Any,
    ) -> int | None:
        if _has_answers(state):
            self._push(state, object_store, self._send, self._push_object)
        received: list[Message] = []

        def receive_and_note() -> Any:
            if (found := receive()) is not None:
                received.append(found[0])
            return found

        run = self._pull(
            state=state, object_store=object_store, receive=receive_and_note, **options
        )
        if run is None and received:
            _drop(state, received[0])
        return run


def _has_answers(state: InMemoryNodeState) -> bool:
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(one.message.metadata.reply_to_message_id and not one.is_retrieved for one in entries)


def _drop(state: InMemoryNodeState, message: Message) -> None:
    """Forget a task that was not wholly fetched, most often as its run has just ended."""
    state.delete_messages(message_ids=[message.metadata.message_id])
    for task in state.get_tasks(run_ids=[message.metadata.run_id]):
        state.finish_task(task.task_id, "failed", "its message was not fetched")


def prepare(state_file: Path) -> None:
    """Change Flower's supernode, in this process."""
    FleetClient.state_file = state_file
    change(fleet_http_connection, "FleetHttpClient", FleetClient)
    change(fleet_http_connection, "HEARTBEAT_DEFAULT_INTERVAL", pace.NODE_HEARTBEAT_S)
    change(heartbeat, "HEARTBEAT_DEFAULT_INTERVAL", pace.NODE_HEARTBEAT_S)
    # Heartbeats that failed are tried again this soon, or a superlink that was away for a minute
    # would take its nodes for lost.
    change(heartbeat, "exponential", lambda max_delay: exponential(max_delay=pace.RETRY_S))
    change(in_memory_corestate, "HEARTBEAT_DEFAULT_INTERVAL", pace.TASK_HEARTBEAT_S)
    change(http_retry, "MAX_RETRY_DELAY", pace.RETRY_S)
    change(start_client_internal, "time", _Pace())
    change(start_client_internal, "get_fused_config_from_fab", lambda _bundle, _run: {})
    loop = _Loop()
    change(start_client_internal, "_init_connection", loop.connection)
    change(start_client_internal, "_pull_and_store_message", loop.pull)
    change(start_client_internal, "pull_objects", _bounded(inflatable_utils.pull_objects))
    expired = InMemoryNodeState._on_task_tokens_expired

    def on_expired(self: InMemoryNodeState, tasks: Sequence[Any]) -> None:
        # A shim that died between claiming a task and fetching its message: Flower answers for
        # fetched messages only, and would wait for this one for ever.
        runs = {task.run_id for task in tasks}
        with self.lock_msg_store:
            for entry in self.msg_store.values():
                metadata = entry.message.metadata
                if metadata.run_id in runs and not metadata.reply_to_message_id:
                    entry.is_retrieved = True
        expired(self, list(tasks))
        watch = threading.Timer(pace.HUNG_S, _end_if_hung, args=(FleetClient.pulls,))
        watch.daemon = True
        watch.start()

    InMemoryNodeState._on_task_tokens_expired = on_expired


def _bounded(pull_objects: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Flower's way to a message's parts, which asks sooner, gives up, and notes that it did."""

    def pull(*args: Any, **options: Any) -> dict[str, bytes]:
        try:
            return pull_objects(
                *args,
                initial_backoff=pace.PART_FIRST_S,
                backoff_cap=pace.PART_LAST_S,
                max_time=pace.PARTS_S,
                **options,
            )
        except Exception:
            FleetClient.broken = True
            raise

    return pull


def _end_if_hung(pulls: int) -> None:
    """A shim that died while it handed over an answer leaves Flower's loop waiting for the rest.

    The next supernode takes leave, and so the aggregator asks again.
    """
    if FleetClient.pulls == pulls:
        sys.stderr.write("An answer was left unfinished; starting anew.\n")
        sys.stderr.flush()
        os._exit(1)


def _refused() -> None:
    sys.stderr.write(
        "The aggregator refuses this node: its key is not registered there (any more), or another "
        "process uses it.\nIf `photon members list` on the aggregator shows this member as active, "
        "look for a second `photon join` with the same key.\n"
    )
    sys.stderr.flush()
    os._exit(REFUSED)  # Flower's own exit says 1 and a page of other reasons


def _orphan(path: Path) -> int:
    """Id of the node whose process is known to be dead: it ran here since this machine started.

    Else 0: of a process that may be alive elsewhere no leave is taken. Two would share a key.
    """
    try:
        record = json.loads(path.read_text())
        node, pid, boot = record["node_id"], record["pid"], record["boot"]
    except (OSError, ValueError, LookupError, TypeError):
        return 0
    if not isinstance(node, int) or not isinstance(pid, int) or boot != _boot():
        return 0
    if pid == os.getpid():
        return node
    with contextlib.suppress(PermissionError):  # of another user's, which is alive
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return node
    return 0


def _boot() -> str:
    """Names this start of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _remember(path: Path, node: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path, {"node_id": node, "pid": os.getpid(), "boot": _boot()})


def main() -> None:
    """Run until told to stop. `--state FILE`, and flower-supernode's own arguments.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    parser = argparse.ArgumentParser(prog="supernode", add_help=False, allow_abbrev=False)
    parser.add_argument("--state", type=Path, required=True)
    ours, theirs = parser.parse_known_args()
    prepare(ours.state)
    sys.argv = ["flower-supernode", *theirs]
    flower_supernode()
    # Its loop broke off, refused or hung up on. The thread of its own API would keep a process
    # alive that asks for no task any more; the next one, started anew, takes leave first.
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
