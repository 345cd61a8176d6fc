"""Which held-out tokens are scored, and how many bytes of text they stand for."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from photon.data import PrepareOptions, held_out_text, load_tokenizer, open_data, prepare
from photon.data.held_out import token_bytes

LENGTH = 16
#: Two sources without a word in common.
WORDS = {"hospital": ["ward", "nurse", "dose"], "court": ["judge", "Gericht", "東京"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    draw = random.Random(2)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for n in range(120):
            kind = "hospital" if n % 4 else "court"
            text = " ".join(draw.choice(WORDS[kind]) for _ in range(40))
            file.write(json.dumps({"text": text, "silo": kind, "kind": kind}) + "\n")
    return prepare(
        PrepareOptions(
            input=folder / "rows.jsonl",
            out=folder / "data",
            silo_field="silo",
            source_field="kind",
            vocab_size=290,
            global_fraction=0.4,
            silo_fraction=0.1,
        )
    )


def targets(windows):
    return np.concatenate([window.tokens[1:] for window in windows])


def share_of(data, tokens, kind):
    """Of the words in these tokens, the part that is one source's."""
    text = load_tokenizer(data.tokenizer_file).tokenizer.decode(tokens.tolist())
    counts = {kind: sum(text.count(word) for word in words) for kind, words in WORDS.items()}
    return counts[kind] / sum(counts.values())


@pytest.mark.parametrize("bound", [20 * LENGTH, 500])
def test_a_sample_is_of_all_sources_in_their_proportion(data, bound):
    text = held_out_text(data, None)
    every = targets(text.windows(LENGTH))
    some = targets(text.windows(LENGTH, bound))
    assert bound - LENGTH < len(some) <= bound < len(every) / 3
    for kind in WORDS:
        whole = share_of(data, every, kind)
        assert whole > 0.1
        assert share_of(data, some, kind) == pytest.approx(whole, abs=0.08)


@given(length=st.integers(1, 300), bound=st.integers(1, 3000))
def test_a_sample_is_windows_of_the_whole_and_never_above_its_bound(data, length, bound):
    text = held_out_text(data, None)
    whole = {window.tokens.tobytes() for window in text.windows(length)}
    sample = list(text.windows(length, bound))
    all_of_it = data.held_out.held_out_tokens - 1
    assert min(bound, all_of_it) - length < sum(len(w.tokens) - 1 for w in sample) <= bound
    assert all(window.tokens.tobytes() in whole for window in sample[:-1])
    assert any(window.startswith(sample[-1].tokens.tobytes()) for window in whole)
    if bound >= all_of_it:
        assert (targets(sample) == targets(text.windows(length))).all()


def test_the_sample_is_the_same_wherever_it_is_drawn(data):
    again = open_data(data.path)
    for silo in (None, "court"):
        one, other = (held_out_text(d, silo).windows(LENGTH, 100) for d in (data, again))
        assert (targets(one) == targets(other)).all()


def test_bounds_below_one(data):
    for bounds in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            next(held_out_text(data, None).windows(*bounds))


def test_documents_are_told_apart(data):
    text = held_out_text(data, None)
    for window in text.windows(200, documents=True):
        ends = np.flatnonzero(window.tokens[:-1] == data.eos_id)
        assert (np.flatnonzero(np.diff(window.documents)) == ends).all()
        assert window.documents[0] == 0
    assert next(text.windows(200)).documents is None


@given(length=st.integers(1, 100))
def test_the_bytes_are_those_of_the_very_targets(data, length):
    """All windows of all sets: each byte of each document once, but the first token's."""
    for silo in (None, *data.silos):
        text, part = held_out_text(data, silo), data.silos.get(silo, data.held_out)
        first = next(text.windows(1)).tokens[0]
        counted = sum(window.bytes for window in text.windows(length))
        assert counted == part.held_out_bytes - text.sizes.sizes[first]
    window = next(held_out_text(data, None).windows(50))
    piece = load_tokenizer(data.tokenizer_file).tokenizer.decode(window.tokens[1:].tolist())
    assert window.bytes == len(piece.encode())


def sizes_of(tokenizer, folder, text):
    """Bytes that the table gives for a text, and how many of its tokens are unknown."""
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    table = token_bytes(folder / "tokenizer.json", str(random.random()), size, size - 1)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return int(table.sizes[ids].sum()), sum(number == table.unknown for number in ids)


def test_words_with_a_mark_for_the_space_before(tmp_path):
    pieces = ["<unk>", "▁the", "▁harbor", "s", "▁", "東", "<0xE4>", "<0xBA>", "<0xAC>", "</s>"]
    for model, decoder in (
        (Unigram([(piece, -1.0) for piece in pieces], unk_id=0), decoders.Metaspace()),
        (
            BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>"),
            decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
        ),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.decoder = decoder
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        table = token_bytes(tmp_path / "tokenizer.json", str(decoder), len(pieces), len(pieces) - 1)
        assert table.sizes.tolist() == [0, 4, 7, 1, 1, 3, 1, 1, 1, 0]
        assert table.unknown == 0


def test_pieces_that_go_on_a_word(tmp_path):
    vocabulary = {"[UNK]": 0, "the": 1, "har": 2, "##bor": 3, "[SEP]": 4}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    assert sizes_of(tokenizer, tmp_path, "the harbor the") == (len(" the harbor the"), 0)
    assert sizes_of(tokenizer, tmp_path, "the 東京 harbor") == (len(" the harbor"), 1)


def test_special_and_added_tokens(tmp_path):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["Königsberg"])
    tokenizer.add_special_tokens(["</s>"])
    found, unknown = sizes_of(tokenizer, tmp_path, "<s> the Königsberg road")
    assert (found, unknown) == (len(" the") + len("Königsberg".encode()), 1)
