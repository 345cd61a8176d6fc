"""This Photon drives one version of Flower, inner parts included, and refuses any other.

Flower's wire protocol and its inner names change from release to release. Whatever this folder
uses beyond the documented API is named here, so that another version is refused at the start, and
tests/engines/flower/test_parts.py says which of it an upgrade moved.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from photon.errors import DeployError

FLWR_VERSION = "1.41.0"

#: Module and attribute of everything that is not Flower's documented API.
INNER_PARTS = (
    # supernode
    ("flwr.supernode.cli.flower_supernode", "flower_supernode"),
    ("flwr.supernode.start_client_internal", "_init_connection"),
    ("flwr.supernode.start_client_internal", "_pull_and_store_message"),
    ("flwr.supernode.start_client_internal", "_push_messages"),
    ("flwr.supernode.start_client_internal", "get_fused_config_from_fab"),
    ("flwr.supernode.start_client_internal", "pull_objects"),
    ("flwr.supernode.start_client_internal", "time"),
    ("flwr.supernode.fleet_http_connection", "FleetHttpClient"),
    ("flwr.supernode.fleet_http_connection", "HEARTBEAT_DEFAULT_INTERVAL"),
    ("flwr.supernode.nodestate.in_memory_nodestate", "InMemoryNodeState._on_task_tokens_expired"),
    ("flwr.supercore.corestate.in_memory_corestate", "HEARTBEAT_DEFAULT_INTERVAL"),
    ("flwr.supercore.heartbeat", "HEARTBEAT_DEFAULT_INTERVAL"),
    ("flwr.supercore.heartbeat", "exponential"),
    ("flwr.supercore.retry.http_retry", "MAX_RETRY_DELAY"),
    # shim
    ("flwr.supernode.runtime.run_clientapp", "pull_and_inflate_object_from_tree"),
    ("flwr.supernode.runtime.run_clientapp", "pull_task_input"),
    ("flwr.supernode.runtime.run_clientapp", "push_message"),
    ("flwr.supernode.runtime.run_clientapp", "push_task_output"),
    ("flwr.supercore.auth", "load_superexec_auth_secret"),
    ("flwr.supercore.interceptors", "RuntimeTokenHttpInterceptor"),
    ("flwr.supercore.interceptors", "RuntimeVersionHttpInterceptor"),
    ("flwr.supercore.interceptors", "SuperExecAuthHttpInterceptor"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.AcquireTask"),
    # aggregator
    ("flwr.superlink.cli.flower_superlink", "flower_superlink"),
    ("flwr.supercore.cli.flower_superexec", "flower_superexec"),
    ("flwr.supercore.superexec.run_superexec", "get_executor"),
    ("flwr.supercore.superexec.plugin", "AutoExecPlugin.supported_task_types"),
    ("flwr.supercore.superexec.executor", "LaunchResult.accepted"),
    ("flwr.superlink.runtime.run_serverapp", "run_serverapp"),
    ("flwr.superlink.runtime.run_serverapp", "start_log_uploader"),
    ("flwr.superlink.grid", "HttpGrid.pull_messages"),
    ("flwr.superlink.grid.http_grid", "pull_objects"),
    ("flwr.supercore.control", "ControlHttpClient.StartRun"),
    ("flwr.cli.build", "build_fab_from_files"),
)


def check_flower() -> None:
    """Refuse another Flower than the one this folder was written for.

    Raises:
        DeployError: flwr is missing, or of another version.
    """
    hint = f"Install the version that Photon pins: pip install flwr=={FLWR_VERSION}"
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise DeployError("Flower (flwr) is not installed", hint=hint) from None
    if found != FLWR_VERSION:
        raise DeployError(
            f"flwr {found} is installed; this Photon drives flwr {FLWR_VERSION} only", hint=hint
        )


def change(module: ModuleType, name: str, value: Any) -> None:
    """Put something else in the place of one of a module's names, in this process.

    Raises:
        DeployError: the module has no such name, or it is not listed in INNER_PARTS.
    """
    if not hasattr(module, name) or (module.__name__, name) not in INNER_PARTS:
        raise DeployError(
            f"{module.__name__}.{name} is no known part of Flower {FLWR_VERSION}",
            hint="Photon and the flwr that is installed do not belong together.",
        )
    setattr(module, name, value)
