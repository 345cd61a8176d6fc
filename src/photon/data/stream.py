"""Endless, seeded, seekable training text: sample i is the same whenever it is asked for.

Documents lie one after another, each ended by the end-of-text token. Each source of each silo is
cut into windows of sequence_length + 1 tokens at stride sequence_length (neighbours share the
token that is the target of one and the first input of the next); what is left at its end, less
than a window, is not used. All windows of the given silos form one pool, shuffled anew each epoch;
or one pool per source, mixed by weights. The order comes from `grain`, which computes it index by
index: the cursor is one integer, nothing is replayed on resume, and a change of batch size neither
repeats nor skips.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from photon.config import RunConfig
from photon.data.prepared import PreparedData
from photon.data.shards import TRAIN, TokenRun
from photon.errors import DataError, EmptySiloError, IncompatibleConfigError, SequenceTooLongError

#: grain permutes 32-bit indices.
_MOST_WINDOWS = 2**32


class TokenStream:
    """An endless sequence of samples; made by `token_stream`.

    Holds no copy of any token: shards are mapped when they are first read.

    Args:
        runs: the texts, whose windows are numbered one text after another.
        order: order[i] is the number of sample i's window.
        sequence_length: predictions per sample.
    """

    def __init__(self, runs: Sequence[TokenRun], order: Any, sequence_length: int) -> None:
        self._runs = runs
        self._order = order
        self._firsts = [0, *accumulate(_windows(run, sequence_length) for run in runs)]
        self.sequence_length = sequence_length

    def batch(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1, int64 [count, sequence_length + 1].

        Args:
            start: the cursor, from 0; it may lie many epochs ahead.

        Raises:
            ValueError: start or count is negative.
        """
        out = np.empty((max(0, count), self.sequence_length + 1), dtype=np.int64)
        for row, (run, first) in zip(out, self._found(start, count), strict=True):
            run.read(first, row)
        return out

    def document_ids(self, start: int, count: int) -> np.ndarray:
        """Which document each token of `batch` belongs to, int32 of its shape.

        For attention masks that keep documents apart: 0 for a window's first document, then 1, 2,
        ... A document's end-of-text token belongs to it.
        """
        out = np.empty((max(0, count), self.sequence_length + 1), dtype=np.int32)
        for row, (run, first) in zip(out, self._found(start, count), strict=True):
            ids = run.document_of(first, self.sequence_length + 1)
            row[:] = ids - ids[0]
        return out

    @property
    def sequences(self) -> int:
        """Of an epoch; where sources are mixed by weights, there is no such thing."""
        return self._firsts[-1]

    def numbers(self, start: int, count: int) -> list[int]:
        """Which sequence each sample is: the same number, the same tokens."""
        return [int(self._order[sample]) for sample in range(start, start + count)]

    def close(self) -> None:
        """Unmap the shards; a later read maps them again."""
        for run in self._runs:
            run.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _found(self, start: int, count: int) -> list[tuple[TokenRun, int]]:
        """The text of each sample, and its first token there."""
        if start < 0 or count < 0:
            raise ValueError(f"start = {start} and count = {count} must not be negative")
        windows = self.numbers(start, count)
        texts = [bisect_right(self._firsts, window) - 1 for window in windows]
        return [
            (self._runs[text], (window - self._firsts[text]) * self.sequence_length)
            for window, text in zip(windows, texts, strict=True)
        ]


def open_stream(config: RunConfig, data: PreparedData, silos: Sequence[str]) -> TokenStream:
    """The training text of these silos, pooled, as a run has it; raises as `token_stream`."""
    return token_stream(
        data, silos, config.data.sequence_length, config.run.seed, config.data.mixture or None
    )


def token_stream(
    data: PreparedData,
    silos: Sequence[str],
    sequence_length: int,
    seed: int,
    mixture: Mapping[str, float] | None = None,
) -> TokenStream:
    """The training text of some silos.

    Args:
        silos: whose text; pooled. Order and repetition of names don't matter.
        sequence_length: predictions per sample; samples hold one token more.
        seed: of the shuffle. A stream over one silo does not depend on the others.
        mixture: weight of each source of these silos; without it the pool is shuffled as one, so
            that a source's share is its size.

    Raises:
        SequenceTooLongError: a silo (or with a mixture, a source) has no window of that length.
        EmptySiloError: no such silo, or none named.
        IncompatibleConfigError: the mixture names a source that is not there, leaves one out, or
            gives it a weight of 0 or less.
        ValueError: sequence_length is below 1, or the seed negative.
    """
    if sequence_length < 1 or seed < 0:
        raise ValueError(f"sequence_length = {sequence_length}, seed = {seed}")
    if not silos:
        raise EmptySiloError("no silo is named", hint=f"Its silos: {', '.join(data.silos)}.")
    texts: list[tuple[str, TokenRun]] = []
    for silo in sorted(set(silos)):
        own = data.silo(silo)
        runs = [
            (source, TokenRun(own.path, own.splits[TRAIN][source], data.dtype))
            for source in own.sources
        ]
        _require_window(f"silo {silo!r}", [run for _, run in runs], sequence_length)
        texts += runs
    texts.sort(key=lambda text: text[0])  # stable: silos stay sorted within a source
    pools: dict[str, list[TokenRun]] = {}
    for source, run in texts:
        pools.setdefault(source, []).append(run)
    if mixture is None:
        count = sum(_windows(run, sequence_length) for _, run in texts)
        order = _shuffled(0, count, seed)
    else:
        order = _mixed(pools, mixture, sequence_length, seed)
    return TokenStream([run for _, run in texts], order, sequence_length)


def _mixed(
    pools: Mapping[str, Sequence[TokenRun]],
    mixture: Mapping[str, float],
    sequence_length: int,
    seed: int,
) -> Any:
    if set(mixture) != set(pools):
        unknown = sorted(set(mixture) - set(pools))
        left_out = sorted(set(pools) - set(mixture))
        wrong = [f"it has no {', '.join(map(repr, unknown))}"] if unknown else []
        wrong += [f"{', '.join(map(repr, left_out))} has no weight"] if left_out else []
        raise IncompatibleConfigError(
            f"data.mixture names {', '.join(sorted(mixture)) or 'nothing'}; the text has the "
            f"sources {', '.join(pools)}: {'; '.join(wrong)}",
            hint="Give each source one weight, or leave data.mixture empty to take them by size.",
        )
    for source, weight in mixture.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise IncompatibleConfigError(
                f"data.mixture gives {source!r} the weight {weight}, which is not above 0",
                hint="Prepare the data without that source to leave it out.",
            )
    datasets, first = [], 0
    for number, (source, runs) in enumerate(pools.items()):
        _require_window(f"source {source!r}", runs, sequence_length)
        count = sum(_windows(run, sequence_length) for run in runs)
        datasets.append(_shuffled(first, count, seed + number))
        first += count
    from photon.data.quiet_grain import grain

    return grain.MapDataset.mix(datasets, [mixture[source] for source in pools])


def _shuffled(first: int, count: int, seed: int) -> Any:
    """Window numbers first .. first + count - 1, shuffled anew each epoch, without end."""
    if count > _MOST_WINDOWS:
        raise DataError(
            f"{count} windows are more than the {_MOST_WINDOWS} that can be shuffled as one",
            hint="Use a larger data.sequence_length.",
        )
    # .seed() hashes; shuffle(seed=) does not, and would share epochs between neighbouring seeds.
    # Tokens are read afterwards, row by row.
    from photon.data.quiet_grain import grain

    numbers = grain.MapDataset.source(range(first, first + count))
    return numbers.seed(seed).shuffle().repeat()


def _windows(run: TokenRun, sequence_length: int) -> int:
    return max(0, (len(run) - 1) // sequence_length)


def _require_window(what: str, runs: Sequence[TokenRun], sequence_length: int) -> None:
    longest = max((len(run) for run in runs), default=0)
    if longest <= sequence_length:
        most = f" in its longest source (of {len(runs)})" if len(runs) > 1 else ""
        raise SequenceTooLongError(
            f"{what} has {longest} training tokens{most}, too few for one sequence of "
            f"data.sequence_length = {sequence_length} (plus one to predict)",
            hint=f"Use a data.sequence_length below {longest}, or give it more text."
            if longest > 1
            else "Give it more text.",
        )
