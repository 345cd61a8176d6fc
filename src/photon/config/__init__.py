"""run.toml: what the federation may dictate. Unknown keys are errors; no torch in here."""

from photon.config.compute import ComputeConfig
from photon.config.link import LinkConfig
from photon.config.load import (
    load_run_config,
    parse_run_config,
    resolved_toml,
    write_resolved,
)
from photon.config.run import (
    DataConfig,
    EvalConfig,
    FederationConfig,
    LocalConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "ComputeConfig",
    "DataConfig",
    "EvalConfig",
    "FederationConfig",
    "LinkConfig",
    "LocalConfig",
    "ModelConfig",
    "OuterConfig",
    "RunConfig",
    "TrainConfig",
    "load_run_config",
    "parse_run_config",
    "resolved_toml",
    "write_resolved",
]
