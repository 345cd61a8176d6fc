"""Train or held out: decided by a hash of the text, so the same whatever the partition.

An input's own names may say what is there to validate and test with.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from photon.errors import EmptySiloError, some

#: Different texts that a source has before the global held-out set asks one of it.
STRATUM = 8

# As Hugging Face's `datasets` reads names of files: a word between anything but letters.
_WORD = r"(?:^|[^a-z])({})(?:[^a-z]|$)"
_HELD_OUT = re.compile(
    _WORD.format("validation|valid|val|dev|tests?|testing|eval|evaluation|held[-_ ]?out")
)
_TRAIN = re.compile(_WORD.format("train|training"))

#: The global held-out set, a silo's own held-out set, or training text.
GLOBAL, LOCAL, TRAIN = "global", "local", "train"


def position_of(text: str, seed: int) -> float:
    """A number in [0, 1) from the text alone; identical texts fall together."""
    digest = hashlib.sha256(f"{seed}\0".encode() + text.encode("utf-8")).digest()
    # 53 bits are what a float holds exactly; more could round up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def split_documents(
    positions: Sequence[float],
    silos: Sequence[str],
    *,
    global_fraction: float,
    silo_fraction: float,
    own: Collection[float] = (),
    strata: Sequence[Sequence[str]] = (),
) -> tuple[list[str], list[str]]:
    """Split documents by their positions.

    Below global_fraction, an expected share of different texts: the global held-out set. Below
    global_fraction + silo_fraction: the held-out set of their silo. A set that would be empty takes
    its lowest training text, with all its copies in all silos, or one silo would train on what
    another holds out: the only place where the partition has a say. The global set takes the lowest
    of each stratum, too, that it holds nothing of.

    Args:
        positions: `position_of` each text.
        silos: of each document.
        own: positions of texts that the input itself holds out: they are the global set then.
        strata: labels of all documents, in one or more ways (source, folder): the global set is to
            hold something of each label that has at least `STRATUM` different texts.

    Returns:
        the split of each document, and remarks on sets that had to be helped.

    Raises:
        EmptySiloError: a silo has too few different texts to train and hold out.
    """
    texts: dict[str, set[float]] = {silo: set() for silo in sorted(set(silos))}
    homes: dict[float, set[str]] = defaultdict(set)
    for position, silo in zip(positions, silos, strict=True):
        texts[silo].add(position)
        homes[position].add(silo)
    overall = set(own) & homes.keys() if own else {at for at in homes if at < global_fraction}
    remarks: list[str] = []
    if not own:
        if not overall:
            lowest = _spare(homes, {silo: len(each) for silo, each in texts.items()}, homes)
            overall.add(lowest if lowest is not None else min(homes))
            remarks.append("the global held-out set was empty: it takes the text of lowest hash")
        remarks += _spread(overall, positions, strata, texts, homes)
    bound = global_fraction + silo_fraction
    decided = {
        at: LOCAL if global_fraction <= at < bound else TRAIN for at in homes if at not in overall
    }
    documents = Counter(silos)
    for silo, different in texts.items():
        different -= overall
        if len(different) < 2:
            raise EmptySiloError(
                f"silo {silo!r} has {documents[silo]} documents, of which {len(different)} "
                "different texts are left after the global held-out set took its share; at least "
                "2 are needed, one to train on and one to hold out",
                hint="Give it more documents, fold small silos with --min-documents, or part the "
                "documents of a single text file with --separator.",
            )
    remarks += _help(decided, texts)
    return [decided.get(position, GLOBAL) for position in positions], remarks


def _spread(
    overall: set[float],
    positions: Sequence[float],
    strata: Sequence[Sequence[str]],
    texts: Mapping[str, set[float]],
    homes: Mapping[float, set[str]],
) -> list[str]:
    """Add to `overall` a text of each label that has none in it and can spare one; says which."""
    helped: list[str] = []
    left = {silo: len(different - overall) for silo, different in texts.items()}
    for labels in strata:
        groups: dict[str, set[float]] = defaultdict(set)
        for position, label in zip(positions, labels, strict=True):
            groups[label].add(position)
        for label in sorted(groups):
            if not label or len(groups[label]) < STRATUM or groups[label] & overall:
                continue
            if (lowest := _spare(groups[label], left, homes)) is not None:
                overall.add(lowest)
                left.update((silo, left[silo] - 1) for silo in homes[lowest])
                helped.append(label)
    if not helped:
        return []
    shown = some(map(repr, helped), 8)
    return [f"the global held-out set had nothing of {shown}: it takes the text of lowest hash"]


def _help(decided: dict[float, str], texts: Mapping[str, set[float]]) -> list[str]:
    """Move texts, in `decided`, until each silo trains on one and holds one out; says which."""
    remarks = []
    for silo, own in texts.items():
        if all(decided[position] == LOCAL for position in own):
            decided[max(own)] = TRAIN
            remarks.append(f"silo {silo!r} had no training text: it takes the one of highest hash")
    homes: dict[float, list[str]] = defaultdict(list)
    training: dict[str, int] = {}
    for silo, own in texts.items():
        training[silo] = sum(decided[position] == TRAIN for position in own)
        for position in own:
            homes[position].append(silo)
    for silo, own in texts.items():
        if any(decided[position] == LOCAL for position in own):
            continue
        # A text that another silo has too may be all that one trains on.
        spare = (at for at in sorted(own) if all(training[home] > 1 for home in homes[at]))
        if (moved := next(spare, None)) is None:
            raise EmptySiloError(
                f"silo {silo!r} can hold out none of its {len(own)} different texts: each is also "
                "the only training text of another silo",
                hint="Give these silos texts of their own, or fold small silos with "
                "--min-documents.",
            )
        decided[moved] = LOCAL
        for home in homes[moved]:
            training[home] -= 1
        remarks.append(f"silo {silo!r} had no held-out text: it takes the one of lowest hash")
    return remarks


def _spare(
    candidates: Iterable[float], left: Mapping[str, int], homes: Mapping[float, set[str]]
) -> float | None:
    """The lowest position that leaves two different texts to each silo that has it."""
    can = (at for at in sorted(candidates) if all(left[silo] > 2 for silo in homes[at]))
    return next(can, None)


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
