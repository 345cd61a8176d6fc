"""Weighted sources, pooled silos, and what a stream costs to open."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.data import PrepareOptions, prepare, token_stream
from photon.errors import EmptySiloError, IncompatibleConfigError, SequenceTooLongError

LENGTH = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two silos with sources of different sizes: books are few, the web is large."""
    root = tmp_path_factory.mktemp("mixture")
    with (root / "rows.jsonl").open("w") as file:
        for n in range(120):
            kind = "web" if n % 4 else "book"
            row = {"text": f"{kind} {n} said {n * n} times {n}. " * 12, "kind": kind}
            file.write(json.dumps(row) + "\n")
    return prepare(
        PrepareOptions(
            input=root / "rows.jsonl", out=root / "data", iid=2, source_field="kind", vocab_size=300
        )
    )


def windows_of(data, silos, source):
    found = []
    for silo in silos:
        part = data.silos[silo]
        files = [part.path / shard.file for shard in part.splits["train"][source]]
        tokens = np.concatenate([np.fromfile(file, dtype=data.dtype) for file in files])
        found += [
            tuple(tokens[a : a + LENGTH + 1].tolist())
            for a in range(0, len(tokens) - LENGTH, LENGTH)
        ]
    return found


def test_a_mixture_keeps_its_weights_and_shuffles_each_source(data):
    silos = list(data.silos)
    books, web = (windows_of(data, silos, source) for source in ("book", "web"))
    with token_stream(data, silos, LENGTH, 5, {"book": 3, "web": 1}) as stream:
        samples = [tuple(row) for row in stream.batch(0, 800).tolist()]
    drawn = [sample for sample in samples if sample in set(books)]
    assert abs(len(drawn) / 800 - 0.75) < 0.01
    assert sorted(drawn[: len(books)]) == sorted(books)  # every book once before any twice
    assert all(sample in set(web) for sample in samples if sample not in set(books))


@given(start=st.integers(0, 10**12), cut=st.integers(0, 12))
def test_a_mixture_seeks_too(data, start, cut):
    with token_stream(data, list(data.silos), LENGTH, 5, {"book": 1, "web": 2}) as stream:
        whole = stream.batch(start, 12)
        parts = [stream.batch(start, cut), stream.batch(start + cut, 12 - cut)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_pools_do_not_depend_on_the_order_of_names(data):
    with (
        token_stream(data, ["silo-1", "silo-0"], LENGTH, 2) as one,
        token_stream(data, ["silo-0", "silo-1", "silo-0"], LENGTH, 2) as two,
    ):
        assert one._firsts[-1] == two._firsts[-1]
        np.testing.assert_array_equal(one.batch(0, 50), two.batch(0, 50))


def test_mixtures_that_do_not_fit_the_sources(data):
    silos = list(data.silos)
    with pytest.raises(IncompatibleConfigError, match=r"sources book, web: it has no 'wiki'"):
        token_stream(data, silos, LENGTH, 0, {"book": 1, "web": 1, "wiki": 1})
    with pytest.raises(IncompatibleConfigError, match="'web' has no weight"):
        token_stream(data, silos, LENGTH, 0, {"book": 1})
    size = sum(shard.tokens for shard in data.silos["silo-0"].splits["train"]["book"])
    with pytest.raises(SequenceTooLongError, match=r"source 'book' has \d+ training tokens"):
        token_stream(data, ["silo-0"], size, 0, {"book": 1, "web": 1})


def test_ranges_and_names_that_make_no_sense(data):
    with pytest.raises(EmptySiloError, match="no silo is named"):
        token_stream(data, [], LENGTH, 0)
    with token_stream(data, ["silo-0"], LENGTH, 0) as stream:
        assert stream.batch(3, 0).shape == (0, LENGTH + 1)
        with pytest.raises(ValueError, match="must not be negative"):
            stream.batch(-1, 2)


def test_neighbouring_seeds_share_no_epoch(data):
    with (
        token_stream(data, ["silo-0"], LENGTH, 0) as zero,
        token_stream(data, ["silo-0"], LENGTH, 1) as one,
    ):
        count = zero._firsts[-1]
        assert not np.array_equal(zero.batch(count, count), one.batch(0, count))


def test_a_stream_opens_no_file_before_it_is_read(data, tmp_path):
    """64 virtual clients are opened and closed every round."""
    import shutil
    from dataclasses import replace

    gone = tmp_path / "gone"
    silo = replace(data.silos["silo-0"], path=gone)
    moved = replace(data, silos={"silo-0": silo})
    stream = token_stream(moved, ["silo-0"], LENGTH, 0)
    with pytest.raises(FileNotFoundError):
        stream.batch(0, 1)
    shutil.copytree(data.silos["silo-0"].path, gone)
    batch = stream.batch(0, 4)
    assert batch.dtype == np.int64
    assert batch.flags.owndata
    stream.close()
