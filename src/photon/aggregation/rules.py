"""The merging rules by the names that run files give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from photon.aggregation.attention import AttentionMean
from photon.aggregation.coordinatewise import Median, TrimmedMean
from photon.aggregation.edit import EditMean
from photon.aggregation.mean import ClippedMean, WeightedMean
from photon.aggregation.rule import MergingRule
from photon.config import FederationConfig
from photon.config.parts import ATTENTION_RULES, PartsConfig
from photon.plugins import MERGING_RULES, load_plugin

#: Makes of `federation.merging_rule` that need no plugin.
BUILTIN_RULES: dict[str, Callable[[FederationConfig, Path | None], MergingRule]] = {
    "mean": lambda config, folder: WeightedMean(),
    "clipped_mean": lambda config, folder: ClippedMean(config.clip_update_norm),
    "median": lambda config, folder: Median(folder),
    "trimmed_mean": lambda config, folder: TrimmedMean(config.trim, folder),
    "edit": lambda config, folder: EditMean(config.anomaly_z, config.clip_update_norm),
}

#: Those that keep a round's updates on disk, 4 bytes per parameter each, until all are here.
SPOOLING = ("median", "trimmed_mean", "attention", "fedatt")


def build_merging_rule(config: FederationConfig, folder: Path | None = None) -> MergingRule:
    """The built-in rule `config.merging_rule`, or the plugin's, freshly made.

    Args:
        folder: where updates wait that a rule must see together; that of temporary files by
            default.

    Raises:
        IncompatibleConfigError: the rule needs a key that is not set.
        PluginError: neither built-in nor plugin, or the plugin can't be loaded.
    """
    build = BUILTIN_RULES.get(config.merging_rule)
    if build is not None:
        return build(config, folder)
    return load_plugin(MERGING_RULES, config.merging_rule, MergingRule)()


def build_key_rule(
    parts: PartsConfig, config: FederationConfig, folder: Path | None = None
) -> MergingRule:
    """The rule `parts.key_rule` for key tensors, freshly made; as `build_merging_rule`."""
    if parts.key_rule in ATTENTION_RULES:
        return AttentionMean(parts, folder)
    return build_merging_rule(config.model_copy(update={"merging_rule": parts.key_rule}), folder)
