"""run.toml, what the federation may dictate, and node.toml, what only the site decides.

Unknown keys are errors; no torch in here.
"""

from photon.config.compute import ComputeConfig
from photon.config.link import LinkConfig
from photon.config.load import (
    load_node_config,
    load_run_config,
    load_served,
    parse_run_config,
    resolved_toml,
    write_resolved,
)
from photon.config.node import NetworkConfig, NodeConfig, PolicyConfig
from photon.config.outer import OuterConfig
from photon.config.privacy import PrivacyConfig
from photon.config.run import FederationConfig, LocalConfig, ModelConfig, RunConfig
from photon.config.serve import ServeConfig

__all__ = [
    "ComputeConfig",
    "FederationConfig",
    "LinkConfig",
    "LocalConfig",
    "ModelConfig",
    "NetworkConfig",
    "NodeConfig",
    "OuterConfig",
    "PolicyConfig",
    "PrivacyConfig",
    "RunConfig",
    "ServeConfig",
    "load_node_config",
    "load_run_config",
    "load_served",
    "parse_run_config",
    "resolved_toml",
    "write_resolved",
]
