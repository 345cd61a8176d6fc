"""A tree of federations out of files that their owners wrote: [federation.children.NAME] file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from photon.errors import ConfigError, IncompatibleConfigError, some

#: Of a child's table: the file that it came from.
WRITTEN_IN = "written_in"


def assembled(
    children: Mapping[str, Any],
    folder: Path,
    read: Callable[[Path], dict[str, Any]],
    above: Sequence[Path] = (),
) -> dict[str, Any]:
    """A table of children with each file's content in the place of its name, at any depth.

    Args:
        children: tables by name; those without a file are left as they are.
        folder: that file names are relative to, the one of the file that names them.
        read: a child's file, checked by itself.
        above: files that led here.

    Raises:
        ConfigError: a file leads back to itself.
        IncompatibleConfigError: beside `file` stands what is the child's own to say.
    """
    whole: dict[str, Any] = {}
    for name, child in children.items():
        if isinstance(child, dict) and "file" in child:
            path = (folder / str(child["file"])).resolve()
            if others := sorted(set(child) - {"file"}):
                raise IncompatibleConfigError(
                    f"[federation.children.{name}] has file = {child['file']!r} and "
                    f"{some(others)}: what that federation is like, its own file says",
                    hint=f"Ask its owner to change {path}, or leave `file` out.",
                )
            if path in above:
                chain = " -> ".join(one.name for one in [*above[above.index(path) :], path])
                raise ConfigError(f"a federation can't be inside itself: {chain}")
            child = read(path) | {WRITTEN_IN: str(child["file"])}
            inner, way = path.parent, [*above, path]
        else:
            inner, way = folder, above
        below = child.get("children") if isinstance(child, dict) else None
        if isinstance(below, dict):
            child = child | {"children": assembled(below, inner, read, way)}
        whole[name] = child
    return whole


def require_own_word(children: Any, override: str) -> None:
    """Raise IncompatibleConfigError where an override changes what a child's own file says.

    Args:
        children: the table, as assembled.
        override: such as "federation.children.eu.rounds=3".
    """
    names = override.partition("=")[0].strip().split(".")
    if names[:2] != ["federation", "children"]:
        return
    for depth, name in enumerate(names[2::2]):
        child = children.get(name) if isinstance(children, dict) else None
        if not isinstance(child, dict):
            return
        if WRITTEN_IN in child:
            raise IncompatibleConfigError(
                f"--set {override}: {'.'.join(names[: 3 + 2 * depth])} is written in "
                f"{child[WRITTEN_IN]}, and its owner's to change"
            )
        children = child.get("children")
