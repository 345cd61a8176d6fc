"""What the aggregator does with updates: pure maths on named tensors, no I/O."""

from photon.aggregation.check import check_update
from photon.aggregation.mean import BUILTIN_RULES, MergingRule, WeightedMean, build_merging_rule
from photon.aggregation.outer import (
    BUILTIN_OUTER,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Nesterov,
    OuterOptimizer,
    build_outer_optimizer,
)

__all__ = [
    "BUILTIN_OUTER",
    "BUILTIN_RULES",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedYogi",
    "MergingRule",
    "Nesterov",
    "OuterOptimizer",
    "WeightedMean",
    "build_merging_rule",
    "build_outer_optimizer",
    "check_update",
]
