"""The merging rules by the names that run files give them."""

from __future__ import annotations

from collections.abc import Callable

from photon.aggregation.coordinatewise import Median, TrimmedMean
from photon.aggregation.edit import EditMean
from photon.aggregation.mean import ClippedMean, WeightedMean
from photon.aggregation.rule import MergingRule
from photon.config import FederationConfig
from photon.plugins import MERGING_RULES, load_plugin

#: Makes of `federation.merging_rule` that need no plugin.
BUILTIN_RULES: dict[str, Callable[[FederationConfig], MergingRule]] = {
    "mean": lambda config: WeightedMean(),
    "clipped_mean": lambda config: ClippedMean(config.clip_update_norm),
    "median": lambda config: Median(),
    "trimmed_mean": lambda config: TrimmedMean(config.trim),
    "edit": lambda config: EditMean(config.anomaly_z, config.clip_update_norm),
}


def build_merging_rule(config: FederationConfig) -> MergingRule:
    """The built-in rule `config.merging_rule`, or the plugin's, freshly made.

    Raises:
        IncompatibleConfigError: the rule needs a key that is not set.
        PluginError: neither built-in nor plugin, or the plugin can't be loaded.
    """
    build = BUILTIN_RULES.get(config.merging_rule)
    if build is not None:
        return build(config)
    return load_plugin(MERGING_RULES, config.merging_rule, MergingRule)()
