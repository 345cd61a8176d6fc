"""A recipe in which silos keep state, and the keys of a store."""

from __future__ import annotations

#: A kept inner state, error feedback, encoded broadcasts.
WHOLE_LIFE = (
    "federation.optimizer_state=keep",
    'link.update_codec="int8"',
    'link.broadcast_codec="int8"',
)


def keys_of(store):
    return [key for key, _ in store.keys()]  # noqa: SIM118 - not a mapping
