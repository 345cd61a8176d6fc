"""Hands tasks from the supernode to the trainer: `python -m photon.engines.flower.shim ...`

It stands where Flower has a superexec and a process per task that would install and run what the
server sent. This one process reads one record of a message, passes its bytes to the trainer's
socket, and sends back what the trainer signed. The run's bundle is fetched, because that is how a
task is taken, and dropped. No torch.

A task ends in exactly one of three ways: with the trainer's answer; with an error that says why
there is none; or, where this process dies, with the error that the supernode gives after
2 x `pace.TASK_HEARTBEAT_S`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp

from photon.engines.flower import pace
from photon.engines.flower.pinned import change, check_flower
from photon.errors import DeployError, PhotonError
from photon.silo.socket import ask_trainer

#: Name of the one record of a message, both ways; `post` has the same.
RECORD = "photon"

#: A supernode that refuses the shim's secret this long, s, has another one.
_REFUSED_S = 20.0

#: Of a reason, so many characters are sent.
_MOST_WORDS = 1000

#: Flower's code for "the ClientApp raised an exception".
_RAISED = 2

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"

_log = logging.getLogger("photon.shim")


class Shim:
    """One supernode's tasks.

    Args:
        runtime_api: host:port of the supernode's Runtime API, on this machine.
        secret: file of `commands.write_secret`.
        trainer: the trainer's unix socket.
    """

    def __init__(self, runtime_api: str, secret: Path, trainer: Path) -> None:
        self._runtime_api = runtime_api
        self._trainer = trainer
        self._stopping = threading.Event()
        #: A task has ended, or all are to: no more waiting before the next look.
        self._woken = threading.Event()
        self._tasks: set[_Task] = set()
        try:
            loaded = load_superexec_auth_secret(secret_file=str(secret))
        except ValueError as error:
            raise DeployError(f"no secret in {secret}: {error}") from error
        if not loaded:
            raise DeployError(f"no secret in {secret}")
        self._secret = loaded
        bounded = partial(
            inflatable_utils.pull_and_inflate_object_from_tree,
            initial_backoff=pace.PART_FIRST_S,
            backoff_cap=pace.PART_LAST_S,
            max_time=pace.PARTS_S,
        )
        change(run_clientapp, "pull_and_inflate_object_from_tree", bounded)

    def run(self) -> None:
        """Take tasks until `stop`.

        Raises:
            DeployError: the supernode does not accept the secret.
        """
        refused_since_s: float | None = None
        auth = SuperExecAuthHttpInterceptor(
            master_secret=self._secret, protected_methods={_ACQUIRE}
        )
        request = AcquireTaskRequest(supported_task_types={TaskType.CLIENT_APP})
        with self._client(auth) as client:
            while not self._stopping.is_set():
                try:
                    taken = client.AcquireTask(request)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code not in (401, 403):
                        _log.warning("the supernode: %s", str(error)[:300])
                    else:
                        refused_since_s = refused_since_s or time.monotonic()
                        if time.monotonic() - refused_since_s > _REFUSED_S:
                            raise DeployError(
                                f"the supernode at {self._runtime_api} refuses the shim's secret",
                                hint="Another node's supernode has this port? Start `photon join` "
                                "anew.",
                            ) from error
                    self._stopping.wait(1.0)
                    continue
                except httpx.HTTPError:  # it is starting, or gone
                    self._stopping.wait(pace.SHIM_POLL_S)
                    continue
                refused_since_s = None
                if taken.HasField("task") and taken.token:
                    self._begin(taken.token)
                self._woken.wait(pace.BUSY_SHIM_POLL_S if self._tasks else pace.SHIM_POLL_S)
                self._woken.clear()
        for task in list(self._tasks):
            task.give_up("the silo's shim was stopped; ask again")

    def stop(self) -> None:
        """Take no more tasks, and answer those that are under way with an error."""
        self._stopping.set()
        self._woken.set()

    def _begin(self, token: str) -> None:
        client = self._client(RuntimeTokenHttpInterceptor(token))
        task = _Task(client, self._trainer, self._end)
        self._tasks.add(task)
        threading.Thread(target=task.run, name="photon-task", daemon=True).start()

    def _end(self, task: _Task) -> None:
        self._tasks.discard(task)
        self._woken.set()

    def _client(self, interceptor: Any) -> RuntimeHttpClient:
        """Without Flower's retries: they end the process when a token is no longer valid."""
        return _Client.from_server_address(
            self._runtime_api,
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                interceptor,
            ],
        )


class _Client(RuntimeHttpClient):
    """Flower's, but patient: the supernode announces a task a moment before it has the message."""

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        patient_until_s = time.monotonic() + pace.PARTS_S
        while True:
            found = super().PullMessages(request)
            if found.messages_list or time.monotonic() > patient_until_s:
                return found
            time.sleep(pace.PART_FIRST_S)


class _Task:
    """One task, from its message to its answer. It is answered once, by whoever comes first."""

    def __init__(
        self, client: RuntimeHttpClient, trainer: Path, on_end: Callable[[_Task], None]
    ) -> None:
        self._client = client
        self._trainer = trainer
        self._on_end = on_end
        self._input: tuple[Message, Context] | None = None
        self._answering = threading.Lock()
        self._over = threading.Event()

    def run(self) -> None:
        try:
            beat = threading.Thread(target=self._beat, name="photon-heartbeat", daemon=True)
            beat.start()
            message = self._fetch()
            self._answer(self._content(message))
        except Exception as error:
            # Not taken, not readable or not delivered: the supernode says so once the claim ends.
            _log.warning("a task was lost: %s", str(error)[:300] or type(error).__name__)
        finally:
            self._over.set()
            self._on_end(self)
            self._client.close()

    def _fetch(self) -> Message:
        """Take the task, fetch its message, drop its bundle.

        Raises:
            Exception: of httpx's or Flower's; there is none.
        """
        message, context, _run, _bundle = run_clientapp.pull_task_input(self._client)
        self._input = (message, context)
        return message

    def give_up(self, why: str) -> None:
        """Answer with an error, if there is time."""
        if self._input is not None:
            with contextlib.suppress(Exception):
                self._answer(Error(code=_RAISED, reason=why))

    def _content(self, message: Message) -> RecordDict | Error:
        """What the trainer says; an error where it says nothing."""
        try:
            ask = message.content[RECORD]["ask"]  # type: ignore[index]
            if not isinstance(ask, bytes):
                raise TypeError(f"'ask' is {type(ask).__name__}")
        except (KeyError, TypeError, ValueError) as error:
            return Error(code=_RAISED, reason=f"no Ask in the message: {str(error)[:200]}")
        try:
            # What is in the Ask is the trainer's to read, who knows the aggregator's key. By how
            # long and not until when: the time of a message is by the aggregator's clock.
            answer = ask_trainer(self._trainer, ask, within_s=message.metadata.ttl)
        except PhotonError as error:
            return Error(code=_RAISED, reason=error.message[:_MOST_WORDS])
        except Exception as error:  # whatever it is, the aggregator must hear of it
            _log.exception("a task failed")
            return Error(code=_RAISED, reason=f"{type(error).__name__}: {error}"[:_MOST_WORDS])
        record = {
            "reply": answer.text,
            "signature": answer.signature,
            "fingerprint": answer.fingerprint,
        }
        return RecordDict({RECORD: ConfigRecord(record)})

    def _answer(self, content: RecordDict | Error) -> None:
        assert self._input is not None
        message, context = self._input
        with self._answering:
            if self._over.is_set():
                return
            reply = Message(content, reply_to=message)
            # The message first: a finished task without one is never answered.
            run_clientapp.push_message(self._client, reply, context)
            ended = "failed" if isinstance(content, Error) else "completed"
            run_clientapp.push_task_output(self._client, None, ended, "")
            self._over.set()

    def _beat(self) -> None:
        request = SendTaskHeartbeatRequest()
        while not self._over.wait(pace.SHIM_BEAT_S):
            try:
                alive = self._client.SendTaskHeartbeat(request).success
            except httpx.HTTPStatusError:
                alive = False
            except (httpx.HTTPError, RuntimeError):
                continue  # late, or the client is closed; a supernode that is gone answers no more
            if not alive:
                _log.warning("the supernode has given this task up; what the trainer says is kept")
                return


def main() -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        DeployError: another version of Flower is installed, or the supernode refuses the secret.
    """
    parser = argparse.ArgumentParser(prog="shim", allow_abbrev=False)
    parser.add_argument("--runtime-api", required=True, help="host:port of the supernode's API")
    parser.add_argument("--secret", type=Path, required=True, help="file with the shared secret")
    parser.add_argument("--socket", type=Path, required=True, help="the trainer's unix socket")
    options = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        check_flower()
        shim = Shim(options.runtime_api, options.secret, options.socket)

        def stop(_signal: int, _frame: FrameType | None) -> None:
            # Not here: what the handler interrupts may hold the locks that this takes.
            threading.Thread(target=shim.stop, name="photon-stop").start()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        shim.run()
    except PhotonError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
