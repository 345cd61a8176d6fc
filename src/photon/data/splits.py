"""Train or held out: decided by a hash of the text, so the same whatever the partition."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from photon.errors import EmptySiloError

#: The global held-out set, a silo's own held-out set, or training text.
GLOBAL, LOCAL, TRAIN = "global", "local", "train"


def position_of(text: str, seed: int) -> float:
    """A number in [0, 1) from the text alone; identical texts fall together."""
    digest = hashlib.sha256(f"{seed}\0".encode() + text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_documents(
    positions: Sequence[float],
    silos: Sequence[str],
    *,
    global_fraction: float,
    silo_fraction: float,
) -> tuple[list[str], list[str]]:
    """Split documents by their positions.

    Below global_fraction: the global held-out set. Below global_fraction + silo_fraction: the
    held-out set of their silo. A set that would be empty takes its lowest training text (with all
    its copies): the only place where the partition has a say.

    Args:
        positions: `position_of` each text.
        silos: of each document.

    Returns:
        the split of each document, and remarks on sets that had to be helped.

    Raises:
        EmptySiloError: a silo has too few different texts to train and hold out.
    """
    bound = global_fraction + silo_fraction
    splits = [
        GLOBAL if position < global_fraction else LOCAL if position < bound else TRAIN
        for position in positions
    ]
    remarks: list[str] = []
    if GLOBAL not in splits:
        lowest = min(positions)
        splits = [
            GLOBAL if position == lowest else split
            for position, split in zip(positions, splits, strict=True)
        ]
        remarks.append("the global held-out set was empty: it takes one text")
    members: dict[str, list[int]] = defaultdict(list)
    for index, silo in enumerate(silos):
        members[silo].append(index)
    for silo in sorted(members):
        own = [index for index in members[silo] if splits[index] != GLOBAL]
        different = {positions[index] for index in own}
        if len(different) < 2:
            raise EmptySiloError(
                f"silo {silo!r} has {len(different)} different texts after the global held-out "
                "set took its share; at least 2 are needed, one to train and one to hold out",
                hint="Give it more documents, or fold small silos with --min-documents.",
            )
        held = {positions[index] for index in own if splits[index] == LOCAL}
        moved, split = None, TRAIN
        if not held:
            moved, split = min(different), LOCAL
            remarks.append(f"silo {silo!r} had no held-out text: it takes one")
        elif held == different:
            moved = max(different)
            remarks.append(f"silo {silo!r} had no training text: it takes one")
        for index in own:
            if positions[index] == moved:
                splits[index] = split
    return splits, remarks
