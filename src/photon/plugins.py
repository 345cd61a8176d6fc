"""Finding things other packages registered through entry points.

A package adds an outer optimizer, a merging rule, a partitioner or a codec without touching our
files:

    [project.entry-points."photon.outer_optimizers"]
    lion = "my_package.lion:OuterLion"

Names are listed without importing anything, so that a run file can be checked cheaply.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from photon.errors import PluginError

OUTER_OPTIMIZERS = "photon.outer_optimizers"
MERGING_RULES = "photon.merging_rules"
PARTITIONERS = "photon.partitioners"
CODECS = "photon.codecs"


def plugin_names(group: str) -> list[str]:
    """Names registered under an entry-point group, sorted; imports nothing."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_plugin(group: str, name: str, base: type) -> Any:
    """Import the class registered as `name`.

    Args:
        group: entry-point group, one of the constants above.
        name: entry-point name.
        base: the class it must derive from.

    Raises:
        PluginError: no such entry point, its import fails, or it is not a subclass of `base`.
    """
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise PluginError(
            f"no plugin named {name!r} in entry-point group {group!r} (installed: {known})"
        )
    try:
        loaded = found[name].load()
    except Exception as error:
        raise PluginError(
            f"plugin {name!r} ({found[name].value}) of group {group!r} can't be imported: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise PluginError(
            f"plugin {name!r} of group {group!r} is {loaded!r}, not a subclass of "
            f"{base.__module__}.{base.__name__}"
        )
    return loaded
