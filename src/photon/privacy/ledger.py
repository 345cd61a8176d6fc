"""What a site's text has spent: written down before an answer leaves, and never forgotten.

LEDGERS names the texts that there is a ledger of, and each has a file, named by the digest of its
training shards: a silo that joins again under another name, or in another run, goes on with it.
What is lost is noticed: noise that was drawn, or a text that is named, has a ledger.

An entry is an answer to a question. A task of dp_sgd is noted with its sequences before it trains,
and with its answer before that leaves: the same question with the same answer costs nothing more,
asked again or done again after a kill; another answer to it costs again. An answer of `client` is
noted when it leaves. No clock is read.
"""

from __future__ import annotations

import fcntl
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from photon.config.section import Section
from photon.errors import CheckpointCorruptError
from photon.privacy.noise import SECRET_FILE
from photon.store.disk import write_json

LEDGERS = "ledgers.json"
Unit = Literal["sequence", "client"]
#: (epoch, first, end, times): sequences first to end of an epoch, each costing times / z^2.
Span = tuple[int, int, int, int]


class Entry(Section):
    """What one answer to a question costs.

    Attributes:
        run: that asked.
        question: digest of all that is asked.
        unit: what is protected: a sequence of so many tokens, or all that a silo sends.
        multiplier: z.
        stream: digest of what orders the sequences; those of two streams may be the same ones.
        answer: digest of what left, or is about to; None while nothing has.
    """

    run: str
    question: str
    unit: Unit
    multiplier: Annotated[float, Field(gt=0)]
    tokens: Annotated[int, Field(ge=1)] = 1
    stream: str = ""
    spans: list[Span] = Field(default_factory=list)
    answer: str | None = None


class _File(Section):
    texts: list[str] = Field(default_factory=list)  # of LEDGERS
    entries: list[Entry] = Field(default_factory=list)  # of a text's


def mu_squared(entries: Iterable[Entry], unit: Unit) -> float:
    """sum 1 / z^2 of the record of this unit that cost most, at most.

    Sequences of an epoch are told apart, so the sequence that costs most in it counts; epochs add
    up. In a run with shorter sequences, one of the longest covers k, and costs k^2 times as much at
    most (Cauchy and Schwarz). One sequence may turn a silo's clipped update around, 2 C, which is
    4 / z^2; noise on a sequence promises nothing about a silo.
    """
    own = list(entries)
    longest = max((one.tokens for one in own), default=0)
    epochs = defaultdict[tuple[str, int], list[tuple[int, float]]](list)
    whole = 0.0
    for one in own:
        cost = 1 / one.multiplier**2
        if one.unit == "client":
            whole += cost if unit == "client" else 4 * cost
        elif unit == "sequence":
            covered = math.ceil(longest / one.tokens) + bool(longest % one.tokens)
            for epoch, first, end, times in one.spans:
                each = cost * times * covered**2
                epochs[one.stream, epoch] += [(first, each), (end, -each)]
    return whole + sum(map(_highest, epochs.values()))


def _highest(changes: list[tuple[int, float]]) -> float:
    now = most = 0.0
    for _, change in sorted(changes):  # at one place what ends comes first
        most = max(most, now := now + change)
    return most


class Ledger:
    """Of one text.

    Args:
        folder: of the node's noise.key.
        text: digest of the text.
    """

    def __init__(self, folder: Path, text: str) -> None:
        self._folder, self._text = folder, text
        self._path = folder / f"ledger-{text[:32]}.json"

    @contextmanager
    def held(self) -> Iterator[list[Entry]]:
        """Its entries, for this process alone: what is added to them is on disk afterwards.

        Nothing is written where the block raises.

        Raises:
            CheckpointCorruptError: it is lost, or can't be read.
            DiskFullError: no room for it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "ledgers.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self._read()
            before = list(entries)
            yield entries
            if entries != before:
                self._write(entries)

    def entries(self) -> list[Entry]:
        """As they are now; raises as `held`."""
        with self.held() as entries:
            return entries

    def _read(self) -> list[Entry]:
        index = self._folder / LEDGERS
        if not index.exists() and (self._folder / SECRET_FILE).exists():
            raise _lost(index, f"{SECRET_FILE} is there, and what it was used for is not")
        texts = _parsed(index).texts if index.exists() else []
        if self._text in texts and not self._path.exists():
            raise _lost(self._path, f"{LEDGERS} names it, and it is gone")
        entries = _parsed(self._path).entries if self._path.exists() else []
        if self._text not in texts:  # its file first: a kill may come between the two
            self._write(entries)
            _write(index, _File(texts=[*texts, self._text]), "which texts have ledgers")
        return entries

    def _write(self, entries: list[Entry]) -> None:
        _write(self._path, _File(entries=entries), "what a text has spent")


def _write(path: Path, record: _File, what: str) -> None:
    write_json(path, record.model_dump(exclude_defaults=True), what, mode=0o600)


def _parsed(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _lost(path, f"it can't be read: {error.errors()[0]['msg']}") from error


def _lost(path: Path, why: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{path}: {why}: nobody knows what differential privacy this site's text has left",
        hint="Bring it back from a backup. Whoever answers for the text may begin a new account, "
        f"beside what was promised before: remove {SECRET_FILE}, {LEDGERS} and the text's ledger.",
    )
