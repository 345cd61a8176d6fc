"""Endless, seeded, seekable training text: sample i is the same whenever it is asked for.

Documents lie in shards one after another, each ended by the end-of-text token. They are cut into
windows of sequence_length + 1 tokens at stride sequence_length; all windows of the given silos form
one pool, shuffled anew each epoch. The cursor is one integer, so nothing is replayed on resume and
a change of batch size neither repeats nor skips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from photon.data.prepared import PreparedData, TextSet
from photon.data.shards import TRAIN, Shard
from photon.errors import EmptySiloError, IncompatibleConfigError, SequenceTooLongError


class _Windows:
    """Random access to the windows of some shards; each shard is mapped when first read."""

    def __init__(
        self, files: Sequence[tuple[TextSet, Shard]], dtype: np.dtype, length: int
    ) -> None:
        self._files = [(text_set, shard) for text_set, shard in files if shard.tokens > length]
        counts = [(shard.tokens - 1) // length for _, shard in self._files]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._dtype, self._length = dtype, length
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> int:
        # The library shuffles indices; tokens are read in `read`, a batch at a time.
        return int(index)

    def read(self, index: int, out: np.ndarray) -> None:
        which, offset = self._locate(index)
        if which not in self._maps:
            text_set, shard = self._files[which]
            self._maps[which] = np.memmap(text_set.path / shard.file, dtype=self._dtype, mode="r")
        out[:] = self._maps[which][offset : offset + self._length + 1]

    def document_ids(self, index: int) -> np.ndarray:
        """int64 [length + 1]: which document of its shard each token belongs to."""
        which, offset = self._locate(index)
        text_set, shard = self._files[which]
        ends = np.load(text_set.path / shard.index_file, mmap_mode="r")
        positions = np.arange(offset, offset + self._length + 1)
        return np.searchsorted(ends, positions, side="right")

    def close(self) -> None:
        self._maps.clear()

    def _locate(self, index: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, (index - int(self._starts[which])) * self._length


class TokenStream:
    """See `token_stream`."""

    def __init__(self, pools: Sequence[_Windows], order: Any, sequence_length: int) -> None:
        self._pools = pools
        self._order = order
        self.sequence_length = sequence_length
        self._firsts = np.concatenate([[0], np.cumsum([len(pool) for pool in pools])])

    @property
    def sequences_per_epoch(self) -> int:
        """Distinct windows."""
        return int(self._firsts[-1])

    @property
    def tokens_per_epoch(self) -> int:
        """Predictions of all distinct windows."""
        return self.sequences_per_epoch * self.sequence_length

    def batch(self, start: int, count: int) -> np.ndarray:
        """Samples start .. start + count - 1 as int64 [count, sequence_length + 1]."""
        out = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row in range(count):
            pool, index = self._find(start + row)
            pool.read(index, out[row])
        return out

    def document_ids(self, start: int, count: int) -> np.ndarray:
        """int32 [count, sequence_length + 1]: 0 for a window's first document, then 1, 2, ..."""
        rows = []
        for position in range(start, start + count):
            pool, index = self._find(position)
            ids = pool.document_ids(index)
            rows.append(ids - ids[0])
        return np.stack(rows).astype(np.int32)

    def close(self) -> None:
        """Unmap the shards."""
        for pool in self._pools:
            pool.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, position: int) -> tuple[_Windows, int]:
        chosen = self._order[position]
        which = int(np.searchsorted(self._firsts, chosen, side="right")) - 1
        return self._pools[which], chosen - int(self._firsts[which])


class _Offset:
    """A range of window numbers, as the data source that grain shuffles."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> int:
        return self._first + int(index)


def token_stream(
    data: PreparedData,
    silos: Sequence[str],
    sequence_length: int,
    seed: int,
    mixture: Mapping[str, float] | None = None,
) -> TokenStream:
    """The training text of some silos.

    Args:
        data: from `open_data`.
        silos: whose text; pooled.
        sequence_length: predictions per sample; samples hold one token more.
        seed: of the shuffle. A stream over one silo does not depend on the others.
        mixture: weight of each source; without it the pool is shuffled as one.

    Raises:
        SequenceTooLongError: a silo has no window of that length.
        EmptySiloError: no such silo.
        IncompatibleConfigError: the mixture names a source that is not there, or leaves one out.
    """
    for silo in silos:
        _require_window(data, silo, sequence_length)
    by_source: dict[str, list[tuple[TextSet, Shard]]] = {}
    for silo in silos:
        text_set = data.silos[silo]
        for source, shards in sorted(text_set.splits[TRAIN].items()):
            by_source.setdefault(source, []).extend((text_set, shard) for shard in shards)
    names = sorted(by_source)
    pools = [_Windows(by_source[name], data.dtype, sequence_length) for name in names]
    if mixture is None:
        order = _shuffled(0, sum(len(pool) for pool in pools), seed)
    else:
        order = _mixed(dict(zip(names, pools, strict=True)), mixture, seed)
    return TokenStream(pools, order, sequence_length)


def _mixed(pools: Mapping[str, _Windows], mixture: Mapping[str, float], seed: int) -> Any:
    grain = _grain()
    if set(mixture) != set(pools):
        odd = sorted(set(mixture) ^ set(pools))
        raise IncompatibleConfigError(
            f"data.mixture names {sorted(mixture)}, the silos have sources {sorted(pools)}",
            hint=f"Name each source once; the difference is {odd}.",
        )
    empty = [name for name, pool in pools.items() if not len(pool)]
    if empty:
        raise SequenceTooLongError(f"source {empty[0]!r} is shorter than one sequence")
    datasets, first = [], 0
    for number, pool in enumerate(pools.values()):
        datasets.append(_shuffled(first, len(pool), seed + number))
        first += len(pool)
    return grain.MapDataset.mix(datasets, [mixture[name] for name in pools])


def _shuffled(first: int, count: int, seed: int) -> Any:
    dataset = _grain().MapDataset.source(_Offset(first, count)).seed(seed).shuffle()
    return dataset.repeat()


def _require_window(data: PreparedData, silo: str, sequence_length: int) -> None:
    if silo not in data.silos:
        raise EmptySiloError(
            f"no silo named {silo!r} in {data.path}", hint=f"Its silos: {', '.join(data.silos)}."
        )
    longest = max((shard.tokens for shard in data.silos[silo].shards(TRAIN)), default=0)
    if longest <= sequence_length:
        raise SequenceTooLongError(
            f"silo {silo!r} has {longest} training tokens, too few for one sequence of "
            f"data.sequence_length = {sequence_length} (plus one to predict)",
            hint=f"Use a sequence_length below {longest}, or give the silo more text.",
        )


def _grain() -> Any:
    """grain, without the line about profilers that its import logs."""
    import logging

    from absl import logging as absl_logging

    logger = absl_logging.get_absl_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain as found
        import grain.python
    finally:
        logger.setLevel(level)
    return found
