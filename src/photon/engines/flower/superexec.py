"""Starts ServerApps: `python -m photon.engines.flower.superexec --bundle SHA256 ...`

Flower's own superexec leaves a ServerApp that died to be found by its silence, 57 s later; runs
whatever bundle anyone on the machine submits; shows a run's token in the list of processes; and
drops what a ServerApp prints. This one reports a death at once, runs one bundle, hands the token
over a pipe, and lets the ServerApp print.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import httpx
from flwr.proto.runtime_pb2 import PushTaskOutputRequest
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import http_retry
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.plugin import AutoExecPlugin

from photon.engines.flower import pace
from photon.engines.flower.pinned import change, check_flower

#: A ServerApp that is told to stop gets so long, s; a superexec that is told to ends after 5.
_STOP_S = 4.0

#: Flower's word for a task that did not end well.
_FAILED = "failed"


class Launcher:
    """Starts ServerApps as processes of its own and watches them. Flower's executor interface.

    Args:
        bundle: sha256 of the only bundle that is run.
    """

    def __init__(self, bundle: str) -> None:
        self._bundle = bundle
        self._running: list[tuple[ExecutionSpec, subprocess.Popen[bytes]]] = []

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **_: object
    ) -> tuple[set[TaskType], set[str]]:
        return supported_task_types, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        if spec.fab_hash != self._bundle:
            words = f"bundle {str(spec.fab_hash)[:16]} is not the one that is served here"
            _report(spec, words)
            return LaunchResult.failed(words)
        # One run folder, one loop: a ServerApp whose run was stopped may not have noticed yet.
        self.close()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "photon.engines.flower.server_app"),
                *("--runtime-api-address", spec.runtime_api_address),
                *("--root-certificates", str(spec.root_certificates_path)),
                *("--parent-pid", str(spec.parent_pid)),
            ],
            stdin=subprocess.PIPE,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead already: seen in `reconcile`
            process.stdin.write(f"{spec.token}\n".encode())
            process.stdin.close()
        self._running.append((spec, process))
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Called every `pace.SUPEREXEC_POLL_S`: report those that died without a word."""
        for spec, process in list(self._running):
            code = process.poll()
            if code is None:
                continue
            self._running.remove((spec, process))
            if code != 0:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                _report(spec, f"the ServerApp's process ended by {how}")

    def close(self) -> None:
        """End those that run; in order, if they manage to in `_STOP_S`."""
        for _, process in self._running:
            process.terminate()
        for _, process in self._running:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _report(spec: ExecutionSpec, words: str) -> None:
    """Tell the superlink that a task failed. One that ended in order has no token any more."""
    assert spec.root_certificates_path is not None  # `commands.superexec` names them
    client = RuntimeHttpClient.from_server_address(
        spec.runtime_api_address,
        insecure=spec.insecure,
        root_certificates=Path(spec.root_certificates_path).read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            RuntimeTokenHttpInterceptor(spec.token),
        ],
    )
    with client, contextlib.suppress(httpx.HTTPError):
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=_FAILED, details=words))


def main() -> None:
    """Run until told to stop. `--bundle SHA256`, and flower-superexec's own arguments.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    parser = argparse.ArgumentParser(prog="superexec", add_help=False, allow_abbrev=False)
    parser.add_argument("--bundle", required=True)
    ours, theirs = parser.parse_known_args()
    launcher = Launcher(ours.bundle)
    change(run_superexec, "get_executor", lambda *_, **__: launcher)
    AutoExecPlugin.supported_task_types = frozenset({TaskType.SERVER_APP})
    change(http_retry, "MAX_RETRY_DELAY", pace.RETRY_S)
    sys.argv = ["flower-superexec", *theirs]
    flower_superexec()


if __name__ == "__main__":
    main()
