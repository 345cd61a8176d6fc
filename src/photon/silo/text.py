"""This site's text: one silo of a prepared folder, called as the member is. No torch."""

from __future__ import annotations

from dataclasses import replace

from photon.config.node import NodeDataConfig
from photon.data import PreparedData
from photon.errors import EmptySiloError


def own_part(data: PreparedData, config: NodeDataConfig, name: str) -> PreparedData:
    """The folder as if this site's were the only text in it.

    Args:
        data: the opened folder.
        config: [data] of node.toml, which may say which silo of the folder it is.
        name: of the member.

    Raises:
        EmptySiloError: no silo of it is this site's.
    """
    chosen = config.silo
    if chosen is None:
        chosen = name if name in data.silos or len(data.silos) != 1 else next(iter(data.silos))
    if chosen not in data.silos:
        raise EmptySiloError(
            f"{data.path} holds no silo {chosen!r}, it holds {', '.join(data.silos)}",
            hint="Say in node.toml which one is this site's: data.silo = NAME.",
        )
    own = replace(data.silos[chosen], name=name)
    return replace(data, silos={name: own})
