"""`photon tree`: the federations of a run file as a tree, and who decides what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

from photon.cli.options import AsJson, RunFile, Sets
from photon.cli.screen import console, show_json
from photon.config import load_run_config
from photon.config.children import inside, with_branches

if TYPE_CHECKING:
    from photon.config import FederationConfig, PrivacyConfig, RunConfig
    from photon.config.children import ChildConfig


def tree(run_file: RunFile, overrides: Sets = None, as_json: AsJson = False) -> None:
    """Draw the federations of a run, one inside another, with who decides what.

    Each line is a federation: how often it merges, after how many local steps, whom it draws, how
    it merges, with which clip and noise updates leave its silos and itself, and in which file that
    is written. Below it are its members; silos take steps.

    Example: `photon tree run.toml`
    """
    config = load_run_config(run_file, overrides or ())
    config = with_branches(config, _silos(config))
    root = described(config, run_file.name)
    if as_json:
        show_json(root)
        return
    console(stderr=False).print(_drawn(root, Tree(_line(root))))


def described(config: RunConfig, file: str) -> dict[str, Any]:
    """The tree as nested tables, for --json."""
    federation, steps = config.federation, config.local.steps
    top = _level(federation, config.outer.name, config.link.update_codec, config.privacy)
    parts, key = config.parts, {}
    if parts.key:
        key = {"key_rule": parts.key_rule, "key_down": parts.key_down}
    below = list(_children(config, file))
    placed = {silo for name, one in federation.children.items() for silo in one.silos_of(name)}
    silos = sorted(set(_silos(config)) - placed)
    return {
        "name": config.run.name,
        "steps": steps,
        "written_in": file,
        **top,
        **key,
        "members": below + [{"name": silo} for silo in silos],
    }


def _children(config: RunConfig, file: str) -> Iterator[dict[str, Any]]:
    for name, child in config.federation.children.items():
        own, inner = child.written_in or file, inside(config, child)
        yield {
            "name": name,
            "steps": inner.local.steps,
            "written_in": own,
            **_level(child, child.outer.name, child.update_codec, inner.privacy),
            "update_privacy": _noise(child.update_privacy),
            "members": [
                *_children(inner, own),
                *({"name": silo} for silo in child.silos),
                *({"name": f"{name}.{index}"} for index in range(child.nodes or 0)),
            ],
        }


def _level(
    level: FederationConfig | ChildConfig, outer: str, codec: str, privacy: PrivacyConfig
) -> dict[str, Any]:
    names = ("rounds", "merging_rule", "sample", "sampling", "quorum")
    own = {name: getattr(level, name) for name in names}
    return own | {"outer": outer, "update_codec": codec, "privacy": _noise(privacy)}


def _noise(privacy: PrivacyConfig) -> str | None:
    clips = privacy.mechanism != "none"
    return f"clip {privacy.clip_norm:g}, noise {privacy.noise_multiplier:g}" if clips else None


def _silos(config: RunConfig) -> list[str]:
    """Of the data, where that is here."""
    from photon.data import open_data
    from photon.errors import PhotonError

    try:
        return list(open_data(config.data.path).silos)
    except PhotonError:
        return []


def _drawn(one: dict[str, Any], branch: Tree) -> Tree:
    for member in one["members"]:
        if "members" in member:
            _drawn(member, branch.add(_line(member)))
        else:
            branch.add(Text(member["name"]))
    return branch


def _line(one: dict[str, Any]) -> Text:
    key = f", key layers: {one['key_rule']} up, {one['key_down']} down" if "key_rule" in one else ""
    rounds = f"{one['rounds']} round{'s' * (one['rounds'] != 1)} of {one['steps']} steps"
    drawn = f", {one['sample']} drawn ({one['sampling']})" if one["sample"] else ""
    for who, name in (("silos", "privacy"), ("its own", "update_privacy")):
        key += f", {who}: {one[name]}" if one.get(name) else ""
    how = f": {rounds}{drawn}, {one['merging_rule']}, {one['outer']}, {one['update_codec']}{key} "
    return Text.assemble((one["name"], "bold"), how, (f"({one['written_in']})", "dim"))
