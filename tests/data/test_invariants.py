"""What the rest relies on: a cursor that seeks, splits that do not depend on the partition."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from photon.data import PrepareOptions, open_data, prepare, token_stream
from photon.data.shards import TokenRun
from photon.data.stream import _require_window
from photon.errors import (
    EmptySiloError,
    SequenceTooLongError,
    ShardCorruptError,
    VocabularyMismatchError,
)

LENGTH = 32


def shard_tokens(data, silo, split="train"):
    """All tokens of a silo's split, in file order."""
    text_set = data.silos[silo] if silo else data.held_out
    return np.concatenate(
        [np.fromfile(text_set.path / s.file, dtype=data.dtype) for s in text_set.shards(split)]
    ).astype(np.int64)


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=12), start=st.integers(0, 3000))
def test_any_way_of_batching_gives_the_same_samples(three_silos, cuts, start):
    """A change of batch size, a resume, a round border: nothing repeats, nothing is skipped."""
    data = open_data(three_silos)
    with token_stream(data, ["red"], LENGTH, seed=3) as stream:
        whole = stream.batch(start, sum(cuts))
        parts, cursor = [], start
        for cut in cuts:
            parts.append(stream.batch(cursor, cut))
            cursor += cut
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("silos", [["red"], ["blue", "green", "red"]])
def test_an_epoch_holds_each_window_once_and_the_next_another_order(three_silos, silos):
    data = open_data(three_silos)
    with token_stream(data, silos, LENGTH, seed=3) as stream:
        count = stream._firsts[-1]
        first, second = stream.batch(0, count), stream.batch(count, count)
    expected = []
    for silo in silos:
        tokens = shard_tokens(data, silo)
        expected += [
            tuple(tokens[start : start + LENGTH + 1])
            for start in range(0, len(tokens) - LENGTH, LENGTH)
        ]
    assert sorted(map(tuple, first)) == sorted(expected)
    assert sorted(map(tuple, second)) == sorted(expected)
    assert not np.array_equal(first, second)


def test_order_depends_on_the_seed_and_not_on_other_silos(three_silos, tmp_path):
    data = open_data(three_silos)

    def first(silos, seed):
        with token_stream(data, silos, LENGTH, seed=seed) as stream:
            return stream.batch(0, 64)

    np.testing.assert_array_equal(first(["red"], 1), first(["red"], 1))
    assert not np.array_equal(first(["red"], 1), first(["red"], 2))
    assert not np.array_equal(first(["red"], 1), first(["green"], 1))


def test_document_ids_count_the_ends_of_text(three_silos):
    data = open_data(three_silos)
    with token_stream(data, ["red"], LENGTH, seed=3) as stream:
        batch, ids = stream.batch(0, 200), stream.document_ids(0, 200)
    ends = batch == data.eos_id
    expected = np.cumsum(ends, axis=1) - ends
    np.testing.assert_array_equal(ids, expected)
    assert ids.max() > 0


PARTITIONS = [
    {"silo_field": "party"},
    {"iid": 3},
    {"dirichlet": (3, 0.5), "label_field": "party"},
    {"contiguous": 4},
    {},
]


@pytest.fixture(scope="module")
def text(three_silos) -> Path:
    return three_silos.parent / "text"


def documents(data, silo, split):
    """Decoded documents of a split."""
    tokenizer = Tokenizer.from_file(str(data.tokenizer_file))
    tokens = shard_tokens(data, silo, split)
    ends = np.flatnonzero(tokens == data.eos_id)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return {tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)}


def test_splits_are_the_same_whatever_the_partition(text, tmp_path):
    seen = []
    for number, partition in enumerate(PARTITIONS):
        data = prepare(
            PrepareOptions(
                input=str(text),
                out=tmp_path / str(number),
                metadata=text.parent / "metadata.csv",
                vocab_size=300,
                global_fraction=0.15,
                silo_fraction=0.25,
                **partition,
            )
        )
        overall = documents(data, None, "held_out")
        local = {one for silo in data.silos for one in documents(data, silo, "held_out")}
        training = {one for silo in data.silos for one in documents(data, silo, "train")}
        assert overall
        assert not overall & (local | training)
        assert not local & training
        for silo in data.silos:
            assert data.silos[silo].held_out_tokens > 1
        seen.append((overall, local, len(training)))
    assert len({frozenset(overall) for overall, _, _ in seen}) == 1
    # Only a silo that would have had none may differ, and none had to be helped here.
    assert len({frozenset(local) for _, local, _ in seen}) == 1


def test_prepare_twice_gives_the_same_bytes(text, tmp_path):
    options = {"input": str(text), "iid": 3, "vocab_size": 300}
    one = prepare(PrepareOptions(out=tmp_path / "one", **options))
    two = prepare(PrepareOptions(out=tmp_path / "two", **options))
    assert one.sha256 == two.sha256
    for path in sorted(one.path.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (two.path / path.relative_to(one.path)).read_bytes(), path
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "two"]


def copy_of(three_silos, tmp_path):
    import shutil

    return Path(shutil.copytree(three_silos, tmp_path / "data"))


def test_a_truncated_shard_is_named_at_once(three_silos, tmp_path):
    root = copy_of(three_silos, tmp_path)
    shard = next((root / "silos/red").glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ShardCorruptError, match=rf"{shard.name} has \d+ bytes, its manifest says"):
        open_data(root)


def test_a_flipped_byte_is_found_by_its_hash(three_silos, tmp_path):
    root = copy_of(three_silos, tmp_path)
    shard = next((root / "silos/red").glob("train*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(bytes(raw))
    with pytest.raises(ShardCorruptError, match=rf"{shard.name} has sha256"):
        open_data(root).verify()


def test_another_tokenizer_is_noticed(three_silos, tmp_path):
    root = copy_of(three_silos, tmp_path)
    file = root / "tokenizer/tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ShardCorruptError, match=r"tokenizer\.json has sha256"):
        open_data(root).verify()


def test_tokens_beyond_the_vocabulary_are_noticed(three_silos, tmp_path):
    root = copy_of(three_silos, tmp_path)
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 300', '"vocab_size": 200'))
    with pytest.raises(VocabularyMismatchError, match=r"holds token id \d+.*200 tokens"):
        open_data(root).verify()


def test_a_sequence_longer_than_a_silos_text_is_named(three_silos):
    data = open_data(three_silos)
    tokens = data.silos["green"].train_tokens
    with pytest.raises(SequenceTooLongError, match=rf"'green' has {tokens} training tokens"):
        token_stream(data, ["green"], tokens, seed=0)
    nothing = TokenRun(data.path, [], data.dtype)
    with pytest.raises(SequenceTooLongError) as caught:  # and no length below 1 is suggested
        _require_window("silo 'green'", [nothing], 8)
    assert caught.value.hint == "Give it more text."
    with pytest.raises(EmptySiloError, match="no silo named 'purple'"):
        token_stream(data, ["purple"], 8, seed=0)
