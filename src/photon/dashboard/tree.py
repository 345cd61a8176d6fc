"""A tree of federations: who is in whom, whom attention heard, what went where, leaves' scores.

tree.html.j2 draws it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from photon.config import FederationConfig, PrivacyConfig, RunConfig, load_run_config
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
#: By group ("": the federation itself), layer (and MEAN, of all), member and round.
Heard = dict[str, dict[str, dict[str, dict[int, list[float]]]]]


def described(config: RunConfig, file: str, silos: Sequence[str]) -> dict[str, Any]:
    """The tree as nested tables, of a run file and the data's silos; a leaf has a name only."""
    federation, parts, steps = config.federation, config.parts, config.local.steps
    top = _level(federation, config.outer.name, config.link.update_codec, config.privacy)
    key = {"key_rule": parts.key_rule, "key_down": parts.key_down} if parts.key else {}
    placed = {silo for name, one in federation.children.items() for silo in one.silos_of(name)}
    members = [*_children(config, file), *({"name": one} for one in sorted({*silos} - placed))]
    named: dict[str, Any] = {"name": config.run.name, "steps": steps, "written_in": file}
    named["policy"] = federation.policy.model_dump(exclude_none=True)
    return named | top | key | {"members": members}


def _children(config: RunConfig, file: str) -> Iterator[dict[str, Any]]:
    for name, child in config.federation.children.items():
        own, inner = child.written_in or file, inside(config, child)
        yield {
            "name": name,
            "steps": inner.local.steps,
            "written_in": own,
            **_level(child, child.outer.name, child.update_codec, inner.privacy),
            "update_privacy": _noise(child.update_privacy),
            "policy": inner.federation.policy.model_dump(exclude_none=True),
            "members": [
                *_children(inner, own),
                *({"name": silo} for silo in child.silos),
                *({"name": f"{name}.{index}"} for index in range(child.nodes or 0)),
            ],
        }


def _level(
    level: FederationConfig | ChildConfig, outer: str, codec: str, privacy: PrivacyConfig
) -> dict[str, Any]:
    names = ("rounds", "merging_rule", "levels", "sample", "sampling", "quorum")
    own = {name: getattr(level, name) for name in names}
    return own | {"outer": outer, "update_codec": codec, "privacy": _noise(privacy)}


def _noise(privacy: PrivacyConfig) -> str | None:
    clips = privacy.mechanism != "none"
    return f"clip {privacy.clip_norm:g}, noise {privacy.noise_multiplier:g}" if clips else None


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
