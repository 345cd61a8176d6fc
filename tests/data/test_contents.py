"""What lies in the shards, token by token, and how streams and held-out windows read it."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from photon.data import (
    PrepareOptions,
    held_out_text,
    load_tokenizer,
    open_data,
    prepare,
    token_stream,
)
from photon.data.ingest import Source
from photon.errors import SequenceTooLongError, VocabularyMismatchError

LENGTH = 24
WORDS = ["harbor", "Königsberg", "東京", "🚢", "ships\n", "needs", "a", "quiet", "\tmorning", "é"]


def write_rows(path, count, words=30):
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(words)) + f" {n}"
            row = {"text": text, "silo": f"s{n % 2}", "kind": "book" if n % 5 == 0 else "web"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("contents") / "rows.jsonl", 120)


@pytest.fixture(scope="module")
def small_shards(rows):
    """Two silos, whose shards hold about two documents each."""
    return prepare(
        PrepareOptions(
            input=rows,
            out=rows.parent / "small",
            vocab_size=300,
            silo_field="silo",
            shard_tokens=150,
            global_fraction=0.1,
            silo_fraction=0.2,
        )
    )


def tokens_of(data, part, split):
    files = [part.path / shard.file for shard in part.shards(split)]
    return np.concatenate([np.fromfile(file, dtype=data.dtype) for file in files]).astype(np.int64)


def test_shards_are_exactly_the_documents_in_order(rows, small_shards):
    """Every document is somewhere once; within a set, in input order, each with its end."""
    tokenizer = load_tokenizer(small_shards.tokenizer_file)
    seen: Counter[str] = Counter()
    place = {document.text: n for n, document in enumerate(Source([str(rows)]).documents())}
    for part in small_shards.sets():
        for split in part.splits:
            tokens = tokens_of(small_shards, part, split)
            ends = np.flatnonzero(tokens == small_shards.eos_id)
            assert ends[-1] == len(tokens) - 1
            texts = [
                tokenizer.tokenizer.decode(tokens[a:b].tolist())
                for a, b in zip([0, *(ends[:-1] + 1)], ends, strict=True)
            ]
            places = [place[text] for text in texts]
            assert places == sorted(places)
            encoded = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode(texts)]
            assert np.concatenate(encoded).tolist() == tokens.tolist()
            shards = part.shards(split)
            assert len(shards) > 1
            assert all(shard.tokens >= 150 for shard in shards[:-1])
            assert sum(shard.tokens for shard in shards) == len(tokens)
            assert sum(shard.documents for shard in shards) == len(texts)
            assert sum(shard.bytes for shard in shards) == sum(len(t.encode()) for t in texts)
            seen.update(texts)
    assert seen == Counter(list(place))


def windows_of(tokens):
    return [tuple(tokens[a : a + LENGTH + 1]) for a in range(0, len(tokens) - LENGTH, LENGTH)]


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8), start=st.integers(0, 10**9))
def test_any_cutting_gives_the_same_samples_across_shards(small_shards, cuts, start):
    with token_stream(small_shards, ["s0", "s1"], LENGTH, 7) as stream:
        whole = stream.batch(start, sum(cuts))
        parts, at = [], start
        for cut in cuts:
            parts.append(stream.batch(at, cut))
            at += cut
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_windows_cross_shards_but_never_silos(small_shards):
    expected = []
    for silo in small_shards.silos.values():
        expected += windows_of(tokens_of(small_shards, silo, "train"))
    with token_stream(small_shards, ["s0", "s1"], LENGTH, 7) as stream:
        count = stream._firsts[-1]
        first = [tuple(row) for row in stream.batch(0, count)]
        second = [tuple(row) for row in stream.batch(count, count)]
        ids = stream.document_ids(0, count)
    assert sorted(first) == sorted(expected) == sorted(second)
    assert first != second
    ends = np.array(first) == small_shards.eos_id
    np.testing.assert_array_equal(ids, np.cumsum(ends, axis=1) - ends)
    assert ids.max() > 0
    # Fewer tokens than one window a silo are left over, however many shards there are.
    for name, silo in small_shards.silos.items():
        with token_stream(small_shards, [name], LENGTH, 7) as stream:
            assert 0 <= silo.train_tokens - 1 - stream._firsts[-1] * LENGTH < LENGTH


def test_text_spread_over_small_shards_is_not_too_short(small_shards):
    silo = small_shards.silos["s0"]
    length = silo.train_tokens - 1
    assert length > 4 * max(shard.tokens for shard in silo.shards("train"))
    with token_stream(small_shards, ["s0"], length, 0) as stream:
        batch = stream.batch(0, 2)
    np.testing.assert_array_equal(batch[0], tokens_of(small_shards, silo, "train"))
    with pytest.raises(SequenceTooLongError, match="silo 's0' has"):
        token_stream(small_shards, ["s0", "s1"], length + 1, 0)


@given(length=st.integers(1, 400))
def test_held_out_targets_come_once_each_whatever_the_window(small_shards, length):
    for silo in (None, "s0"):
        held_out = held_out_text(small_shards, silo)
        part = small_shards.silos[silo] if silo else small_shards.held_out
        tokens = tokens_of(small_shards, part, "held_out")
        assert len(part.shards("held_out")) > 1
        windows = [window.tokens for window in held_out.windows(length)]
        targets = [target for window in windows for target in window[1:].tolist()]
        assert targets == tokens[1:].tolist()
        inputs = [token for window in windows for token in window[:-1].tolist()]
        assert inputs == tokens[:-1].tolist()
        assert all(len(window) == length + 1 for window in windows[:-1])


def test_mixture_shares_over_5000_samples_and_epochs_of_each_source(rows):
    data = prepare(
        PrepareOptions(input=rows, out=rows.parent / "mixed", vocab_size=300, source_field="kind")
    )
    part = data.silos["all"]
    weights = {"book": 0.37, "web": 0.63}
    kind_of, size = {}, Counter()
    for kind in weights:
        files = [part.path / shard.file for shard in part.splits["train"][kind]]
        tokens = np.concatenate([np.fromfile(file, dtype=data.dtype) for file in files])
        for window in windows_of(tokens.tolist()):
            kind_of[window] = kind
            size[kind] += 1
    assert len(kind_of) == size.total()  # no window stands twice, so a window tells its source
    with token_stream(data, ["all"], LENGTH, 3, weights) as stream:
        samples = [tuple(row) for row in stream.batch(0, 5000).tolist()]
    for kind, weight in weights.items():
        drawn = [sample for sample in samples if kind_of[sample] == kind]
        assert abs(len(drawn) / 5000 - weight) < 0.01
        epochs = [drawn[a : a + size[kind]] for a in range(0, len(drawn), size[kind])]
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert len(set(epoch)) == size[kind]
        assert epochs[0] != epochs[1]


def test_a_pool_of_one_silo_is_that_silos_stream(small_shards):
    with (
        token_stream(small_shards, ["s1"], LENGTH, 7) as pool,
        token_stream(open_data(small_shards.path), ("s1",), LENGTH, 7) as own,
    ):
        np.testing.assert_array_equal(pool.batch(0, 99), own.batch(0, 99))


def test_ids_beyond_16_bits(tmp_path):
    words = [f"w{n}" for n in range(70_000)]
    vocabulary = {word: n for n, word in enumerate([*words, "</s>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [" ".join(words[a : a + 100]) for a in range(60_000, 70_000, 100)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(
        PrepareOptions(input=rows, out=tmp_path / "data", tokenizer=tmp_path / "tokenizer.json")
    )
    assert data.dtype == np.dtype("<u4")
    assert (data.vocab_size, data.eos_id) == (70_001, 70_000)
    data.verify()
    tokens = np.concatenate([tokens_of(data, p, split) for p in data.sets() for split in p.splits])
    assert sorted(tokens[tokens != data.eos_id].tolist()) == list(range(60_000, 70_000))


def test_silos_made_with_another_tokenizer_are_refused(small_shards, tmp_path):
    import shutil

    root = shutil.copytree(small_shards.path, tmp_path / "data")
    manifest = root / "manifest.json"
    record = json.loads(manifest.read_text())
    record["tokenizer"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(record))
    with pytest.raises(VocabularyMismatchError, match=r"s0/manifest\.json were made with"):
        open_data(root)
