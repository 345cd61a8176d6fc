"""The superlink's Control API, from Python: nodes' keys, and runs. Milliseconds a call.

The superlink asks no one who he is on this API: it must be reachable from its own machine only,
which the door sees to, and superexec runs no bundle but ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from photon.engines.flower.bundle import digest
from photon.engines.flower.pinned import check_flower
from photon.errors import DeployError, MembershipError, UnreachableError

#: How a ServerApp's last words carry Photon's exit code (`server_app`).
FAILED = re.compile(r"photon-exit-(\d{1,3}): ")


@dataclass(frozen=True)
class RunState:
    """A run, as the superlink has it.

    Attributes:
        status: "pending" (not yet taken by the superexec), "starting", "running" or "finished".
        outcome: of a finished one: "completed", "failed" or "stopped"; else "".
        details: why it failed.
    """

    run_id: int
    status: str
    outcome: str
    details: str

    @property
    def over(self) -> bool:
        return self.status == "finished"

    @property
    def exit_code(self) -> int | None:
        """Of the PhotonError that ended it; None if it ended otherwise: by being killed, say."""
        found = FAILED.search(self.details)
        return int(found[1]) if found else None


class Control:
    """Control API of the superlink at `address`, host:port on this machine.

    Args:
        ca: PEM file of the authority that signed its certificate.
        timeout_s: of one call.

    Raises:
        DeployError: another version of Flower is installed, or `ca` can't be read.
    """

    def __init__(self, address: str, ca: Path, *, timeout_s: float = 10.0) -> None:
        check_flower()
        self._address = address
        try:
            authority = ca.read_bytes()
        except OSError as error:
            raise DeployError(f"can't read the authority's certificate {ca}: {error}") from error
        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        self._client._client.timeout = httpx.Timeout(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def healthy(self) -> bool:
        """Whether the superlink answers, its database included."""
        try:
            self._client.ListRuns(ListRunsRequest(limit=1))
        except (httpx.HTTPError, ValueError):
            return False
        return True

    def register(self, public_pem: str, name: str = "") -> int:
        """Let the node with this key in. Registered already: its id again.

        Args:
            public_pem: public key, PEM text.

        Returns:
            Flower's id of the node, 64 bits.

        Raises:
            MembershipError: it is no key that Flower takes, or was unregistered before.
            UnreachableError, DeployError: the superlink is away, or refuses.
        """
        try:
            key = public_key_to_bytes(bytes_to_public_key(public_pem.encode()))
        except (ValueError, TypeError, AttributeError) as error:
            raise MembershipError(f"no public key in PEM: {str(error)[:200]}") from error
        request = RegisterNodeRequest(public_key=key, name=name or None)
        known = (ApiErrorCode.PUBLIC_KEY_NOT_VALID, ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE)
        answer = self._asked("register a node", self._client.RegisterNode, request, known)
        if not isinstance(answer, _Refusal):
            return int(answer.node_id)
        if answer.code == ApiErrorCode.PUBLIC_KEY_NOT_VALID:
            raise MembershipError(
                f"Flower refuses {name or 'the node'}'s public key: {answer.words}"
            )
        for node in self.nodes():
            if node.public_key == key:
                return int(node.node_id)
        raise MembershipError(
            f"{name or 'a node'}'s key was unregistered at Flower once, which takes none twice",
            hint="Invite the member to another key: `photon members rotate`, or a new invitation.",
        )

    def unregister(self, node_id: int) -> bool:
        """Let a node in no longer, for good: Flower never takes that key again.

        Connected, it leaves within seconds. Not for a member that is suspended for a while.

        Returns:
            Whether there was such a node.
        """
        request, none = UnregisterNodeRequest(node_id=node_id), (ApiErrorCode.NODE_NOT_FOUND,)
        answer = self._asked("unregister a node", self._client.UnregisterNode, request, none)
        return not isinstance(answer, _Refusal)

    def nodes(self) -> list[Any]:
        """All registered nodes, as the superlink has them: node_id, name, public_key (PEM, bytes).

        Not those that were unregistered lately.
        """
        response = self._asked("list nodes", self._client.ListNodes, ListNodesRequest())
        return [one for one in response.nodes_info if one.status != "unregistered"]

    def start_run(self, bundle: bytes) -> int:
        """Submit a run; the superexec takes it within `pace.SUPEREXEC_POLL_S`.

        Args:
            bundle: of `build_bundle`.

        Returns:
            Flower's id of the run, which has nothing to do with Photon's.
        """
        request = StartRunRequest(fab=fab_to_proto(Fab(digest(bundle), bundle, {})))
        response = self._asked("start a run", self._client.StartRun, request)
        if not response.HasField("run_id"):
            raise DeployError("Flower did not start the run and does not say why; see its log")
        return int(response.run_id)

    def stop_run(self, run_id: int) -> bool:
        """Stop a run: its ServerApp ends, what silos still answer is dropped.

        Returns:
            False if it was over already.
        """
        request, over = StopRunRequest(run_id=run_id), (ApiErrorCode.RUN_ALREADY_FINISHED,)
        answer = self._asked(f"stop run {run_id}", self._client.StopRun, request, over)
        return not isinstance(answer, _Refusal) and bool(answer.success)

    def run(self, run_id: int) -> RunState:
        """One run.

        Raises:
            DeployError: there is none of this id.
        """
        request = ListRunsRequest(run_id=run_id)
        response = self._asked(f"look at run {run_id}", self._client.ListRuns, request)
        return _run_state(response.run_dict[run_id])

    def runs(self, most: int = 20) -> list[RunState]:
        """The latest runs, newest first. Those that were going when the machine went down are
        listed as running until their claims expire (`stop_run` them before starting another)."""
        response = self._asked("list runs", self._client.ListRuns, ListRunsRequest(limit=most))
        newest = sorted(response.run_dict.values(), key=lambda one: one.pending_at, reverse=True)
        return [_run_state(one) for one in newest]

    def _asked(
        self, what: str, call: Any, request: Any, known: Collection[ApiErrorCode] = ()
    ) -> Any:
        """What the superlink answers; a _Refusal, if it refuses for a reason that is `known`."""
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            found, status = FlowerError.from_json(error.response.text), error.response.status_code
            refusal = _Refusal(0, error.response.text[:300])
            if found is not None:
                details = f" {found.public_details}" if found.public_details else ""
                refusal = _Refusal(int(found.code), f"{found.message}{details}")
            if refusal.code in known:
                return refusal
            raise DeployError(
                f"Flower refuses to {what}: {refusal.words} (code {refusal.code}, HTTP {status})",
                hint="Its log, logs/superlink.log in serve's home, may say more.",
            ) from error
        except (httpx.HTTPError, ValueError) as error:
            raise UnreachableError(
                f"Flower's superlink at {self._address} does not answer: "
                f"{str(error)[:300] or type(error).__name__}",
                hint="It is starting, or its log (logs/superlink.log in serve's home) says why "
                "not.",
            ) from error


@dataclass(frozen=True)
class _Refusal:
    """An answer that is an error: Flower's code for it, 0 where it has none."""

    code: int
    words: str


def _run_state(run: Any) -> RunState:
    return RunState(
        int(run.run_id), run.status.status, run.status.sub_status, run.status.details[:4000]
    )
