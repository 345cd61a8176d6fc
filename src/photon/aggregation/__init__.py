"""What the aggregator does with updates: maths on named tensors, no network.

The one I/O: rules that must see all updates together keep them in a temporary file.
"""

from photon.aggregation.check import check_update, square_sum
from photon.aggregation.coordinatewise import Median, TrimmedMean
from photon.aggregation.edit import EditMean
from photon.aggregation.mean import ClippedMean, WeightedMean
from photon.aggregation.outer import BUILTIN_OUTER, OuterOptimizer, build_outer_optimizer
from photon.aggregation.rule import MergingRule
from photon.aggregation.rules import BUILTIN_RULES, build_key_rule, build_merging_rule

__all__ = [
    "BUILTIN_OUTER",
    "BUILTIN_RULES",
    "ClippedMean",
    "EditMean",
    "Median",
    "MergingRule",
    "OuterOptimizer",
    "TrimmedMean",
    "WeightedMean",
    "build_key_rule",
    "build_merging_rule",
    "build_outer_optimizer",
    "check_update",
    "square_sum",
]
