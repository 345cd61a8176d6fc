"""A tree of federations: who is in whom, whom attention heard, what went where, leaves' scores.

tree.html.j2 draws it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from photon.config import PrivacyConfig, RunConfig, load_run_config
from photon.config.baselines import METHODS, folder_of
from photon.config.children import ChildConfig, inside
from photon.dashboard.comparison import SAME_TOKENIZER
from photon.dashboard.digest import RunDigest, cut_alike, read_digest
from photon.errors import PhotonError

#: Of a run folder: the run of each method that it is held against.
BASELINES = "baselines"
#: Under which a mean stands among what it is of: leaves, layers.
MEAN = ""
_MOST_COLUMNS = 40
#: What a federation says of itself, under the names of its keys.
_SAID = ("rounds", "merging_rule", "levels", "sample", "sampling", "quorum")
#: By group ("": the federation itself), layer (and MEAN, of all), member and round.
Heard = dict[str, dict[str, dict[str, dict[int, list[float]]]]]


def described(
    config: RunConfig,
    file: str,
    silos: Sequence[str],
    name: str | None = None,
    child: ChildConfig | None = None,
) -> dict[str, Any]:
    """A federation as nested tables, of a run file and the data's silos; a leaf has a name only.

    Args:
        name, child: of one that is inside another; `config` is the run file as it has it.
    """
    level, parts, children = child or config.federation, config.parts, config.federation.children
    own: dict[str, Any] = {"name": name or config.run.name, "steps": config.local.steps}
    own |= {"written_in": file} | {one: getattr(level, one) for one in _SAID}
    own |= {"outer": config.outer.name, "privacy": _noise(config.privacy)}
    own["update_codec"] = (child or config.link).update_codec
    own["policy"] = config.federation.policy.model_dump(exclude_none=True)
    if child:
        own["update_privacy"] = _noise(child.update_privacy)
        leaves = [*child.silos, *(f"{name}.{index}" for index in range(child.nodes or 0))]
    else:
        own |= {"key_rule": parts.key_rule, "key_down": parts.key_down} if parts.key else {}
        placed = {silo for key, one in children.items() for silo in one.silos_of(key)}
        leaves = sorted({*silos} - placed)
    members = [
        described(inside(config, one), one.written_in or file, (), key, one)
        for key, one in children.items()
    ]
    return own | {"members": [*members, *({"name": one} for one in leaves)]}


def _noise(privacy: PrivacyConfig) -> str | None:
    if privacy.mechanism == "none":
        return None
    target, z = privacy.target_epsilon, privacy.noise_multiplier
    told = f"clip {privacy.clip_norm:g}, " + (f"epsilon {target:g}" if target else f"noise {z:g}")
    return told + (" on the sum" if privacy.at_sum else "")


def read_tree(folder: Path, silos: Sequence[str]) -> dict[str, Any] | None:
    """Of a run folder; None without groups and key layers, or where its run file can't be read."""
    try:
        config = load_run_config(folder / "config.resolved.toml")
    except PhotonError:
        return None
    shown = config.federation.children or config.parts.key
    return described(config, "run.toml", silos) if shown else None


def heard(digest: RunDigest) -> Heard:
    """How much more attention let members count than their share of the tokens trained on.

    Rounds of a long run are in bins, each under its first. The federation itself comes first.
    """
    told: Heard = {}
    members, width = digest.silos | digest.groups, -(-digest.started.rounds // _MOST_COLUMNS)
    for event in digest.attention:
        bin = event.round - (event.round - 1) % width
        tokens = [members[who].sum("tokens") for who in event.participants]
        for layer, shares in event.shares.items():
            for who, share, own in zip(event.participants, shares, tokens, strict=True):
                times = max(0.01, share * sum(tokens) / max(1, own))  # none is drawn as little
                for key in (MEAN, layer):
                    rows = told.setdefault(event.silo, {}).setdefault(key, {}).setdefault(who, {})
                    rows.setdefault(bin, []).append(times)
    return dict(sorted(told.items()))


def leaf_scores(
    digest: RunDigest, others: Mapping[str, RunDigest]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """By run, or method, the newest perplexity on each leaf's own text, and the best by leaf.

    Of those that have all leaves also the geometric MEAN. Methods are those that ran in
    RUN/baselines: alone, a run for each silo. Left out is who has another tokenizer.
    """
    runs = {"this run": [digest]}
    for label in METHODS:
        found = sorted((digest.folder / BASELINES / folder_of(label)).glob("**/events.jsonl"))
        runs[label] = [read_digest(events.parent) for events in found]
    runs |= {
        label: [run]
        for label, run in others.items()
        if cut_alike([one.last.score for one in (digest, run) if one.last], SAME_TOKENIZER)
    }
    rows, best = dict[str, dict[str, float]](), dict[str, float]()
    for label, several in runs.items():
        row = {
            name: score
            for run in several
            for name in digest.silos
            if name in run.started.silos and run.silos[name].evaluations
            if (score := run.silos[name].evaluations[-1].perplexity) is not None
        }
        if len(row) == len(digest.silos):
            row[MEAN] = statistics.geometric_mean(row.values())
        rows |= {label: row} if row else {}
        best |= {leaf: min(score, best.get(leaf, score)) for leaf, score in row.items()}
    return rows, best
