"""What an input's own names say about training, validation and test text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

# As Hugging Face's `datasets` reads names of files: a word between anything but letters.
_WORD = r"(?:^|[^a-z])({})(?:[^a-z]|$)"
_HELD_OUT = re.compile(
    _WORD.format("validation|valid|val|dev|tests?|testing|eval|evaluation|held[-_ ]?out")
)
_TRAIN = re.compile(_WORD.format("train|training"))


def own_splits(names: Iterable[str]) -> set[str]:
    """Those of a dataset's splits that are there to validate or test; none if all of them are."""
    every = set(names)
    held = {name for name in every if _HELD_OUT.search(name.lower())}
    return held if held != every else set()


def splits_of_files(
    paths: Sequence[tuple[str, ...]],
) -> dict[tuple[str, ...], tuple[str, bool]]:
    """(split, whether it is to validate or test with) of each file that lies in one, by its parts.

    A name counts where one beside it says "train": train.jsonl and test.jsonl, or train/ and
    valid/; a lone folder "dev" is a folder.
    """
    beside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in paths:
        for depth, name in enumerate(parts):
            beside[parts[:depth]].add(name)
    parted = {
        above for above, names in beside.items() if any(_TRAIN.search(n.lower()) for n in names)
    }
    found: dict[tuple[str, ...], tuple[str, bool]] = {}
    for parts in paths:
        for depth, name in enumerate(parts):
            held, train = _HELD_OUT.search(name.lower()), _TRAIN.search(name.lower())
            if parts[:depth] in parted and (word := held or train):
                # "train-test.jsonl" is anybody's guess: it is trained on, as it was.
                found[parts] = (word[1], held is not None and train is None)
                break
    return found
