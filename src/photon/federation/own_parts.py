"""What participants of a tree have of their own: key tensors, and silos' personal ones.

A group, or a silo in one, is given versions by the group around it, so whose key tensors it mixes
its own with depends on where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from photon.aggregation.attention import taken_up
from photon.config.children import Children, group_of
from photon.config.parts import PartsConfig
from photon.federation.checkpoint import CheckpointStore, RunState
from photon.federation.layout import Layout
from photon.federation.node_state import ANCHOR, KEY, PERSONAL, read_node_state
from photon.federation.tasks import WEIGHTS, GlobalState, section


def own_key(
    parts: PartsConfig, kept: Mapping[str, Mapping[str, Tensor]], state: GlobalState
) -> dict[str, Tensor]:
    """Key tensors with which a group goes on, of a state from above; none where it keeps none.

    Args:
        kept: what the group keeps, by group of tensors.
    """
    if not (parts.own_key and "key" in kept):
        return {}
    above = {name: state[WEIGHTS + name] for name in kept["key"]}
    taken = taken_up(parts, kept["anchor"], kept["key"], above)
    return {WEIGHTS + name: tensor for name, tensor in taken.items()}


def way_to(children: Children, member: str) -> Iterator[str]:
    """The groups around a silo or group, the outermost first, and then itself."""
    while (name := group_of(children, member)) != member:
        yield name
        children = children[name].children
    yield member


def as_seen(
    parts: PartsConfig, folder: Path, way: Sequence[str], state: GlobalState, run: RunState
) -> tuple[GlobalState, int | None]:
    """A version as the groups around a member hand it on.

    Args:
        folder: of kept states.
        way: of `way_to`.
        run: the run's newest state, which names what the outermost group kept.

    Returns:
        also the round after which the member kept what it keeps; None where it keeps nothing.

    Raises:
        CheckpointCorruptError: what a group kept is gone.
    """
    for name in way[:-1]:
        number = run.node_rounds.get(name)
        if number is None:
            return state, None
        run, kept = CheckpointStore(folder / name, 1).load(number)
        state = {**state, **own_key(parts, kept, state)}
    return state, run.node_rounds.get(way[-1])


def weights_of(
    parts: PartsConfig,
    folder: Path,
    layout: Layout,
    way: Sequence[str],
    state: GlobalState,
    run: RunState,
    *,
    group: bool,
) -> dict[str, Tensor]:
    """The weights with which a silo or group would go on: what is shared, and its own.

    Personal tensors are a silo's; of one that has trained none yet they are left out.

    Args:
        way: of `way_to` it.
        state, run: from the run's newest checkpoint.
        group: whether it is a group.

    Raises:
        CheckpointCorruptError: what it, or a group around it, kept is gone.
    """
    member, key = way[-1], layout.named("key")
    state, number = as_seen(parts, folder, way, state, run)
    if number is None:
        return section(state, WEIGHTS)
    if group:
        _, kept = CheckpointStore(folder / member, 1).load(number)
        return section({**state, **own_key(parts, kept, state)}, WEIGHTS)
    found = read_node_state(folder, member, number)
    groups = {
        group: {name: found[name + end] for name in key if name + end in found}
        for group, end in (("key", KEY), ("anchor", ANCHOR))
    }
    own = own_key(parts.for_scores, groups, state) if groups["key"] else {}
    weights = section({**state, **own}, WEIGHTS)
    return weights | {name: found[name + PERSONAL] for name in layout.personal}
