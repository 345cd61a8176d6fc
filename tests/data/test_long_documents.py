"""Long documents: tokens of the whole, memory of a piece, Ctrl-C at once."""

import json
import os
import random
import signal
import threading

import pytest
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFKC, Lowercase, Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import (
    BertPreTokenizer,
    ByteLevel,
    Digits,
    Metaspace,
    Split,
    WhitespaceSplit,
)
from tokenizers.pre_tokenizers import Sequence as Words
from tokenizers.trainers import BpeTrainer

from photon.data import PrepareOptions, prepare
from photon.data.pieces import pieces
from photon.data.tokenizer import TextTokenizer, interruptible
from photon.errors import DataError

#: What Llama 3, Qwen and others split by.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PARTS = ["word", "Königsberg", "東京都", "🚢", ".", "...", "don't", "1234567", "<END>", "e\u0301"]
GAPS = [" ", " ", " ", "\n", "\n\n\n", "  ", "\t", "\r\n", "", " \n ", "\u00a0"]
SPLITTERS = {
    "gpt-2": (ByteLevel(add_prefix_space=False), None),
    "prefix": (ByteLevel(add_prefix_space=True), None),
    "llama-3": (
        Words([Split(Regex(LLAMA), "isolated"), ByteLevel(False, use_regex=False)]),
        None,
    ),
    "digits": (Words([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), NFKC()),
    "bert": (BertPreTokenizer(), Lowercase()),
    "metaspace": (Metaspace(prepend_scheme="always"), None),
    "t5": (Words([WhitespaceSplit(), Metaspace(prepend_scheme="always")]), NFKC()),
}


def texts(count, words, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice(PARTS) + draw.choice(GAPS) for _ in range(words))


def trained(pre_tokenizer, normalizer):
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = BpeTrainer(vocab_size=700, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts(20, 300), trainer=trainer)
    tokenizer.add_tokens([AddedToken("word 1234567", normalized=False), "    "])
    return tokenizer


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("photon.data.pieces._PIECE", 120)
    monkeypatch.setattr("photon.data.pieces._CONTEXT", 40)


@pytest.mark.parametrize("name", SPLITTERS)
def test_tokens_of_the_pieces_are_those_of_the_whole(small, name):
    tokenizer = trained(*SPLITTERS[name])
    cuts = 0
    for text in texts(60, 120, seed=1):
        parts = list(pieces(text, tokenizer, 1000, "a"))
        cuts += len(parts) - 1
        assert "".join(parts) == text
        ids = [id for part in parts for id in tokenizer.encode(part, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert cuts > 200


def test_a_tokenizer_that_reads_all_as_one_word_is_given_no_pieces(small):
    tokenizer = trained(ByteLevel(add_prefix_space=False), None)
    record = json.loads(tokenizer.to_str())
    record["pre_tokenizer"] = None
    record["normalizer"] = json.loads(Tokenizer(BPE()).to_str())["normalizer"]
    whole = Tokenizer.from_str(json.dumps(record))
    whole.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    text = "word " * 100
    assert list(pieces(text, whole, 1000, "a")) == [text]
    with pytest.raises(DataError, match=r"book\.txt: .* are beyond max_document_bytes 300"):
        list(pieces(text, whole, 300, "book.txt"))


def test_a_document_in_pieces_makes_the_same_data(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    every = [*texts(12, 40), *texts(2, 4000, seed=2)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in every))
    encode, sizes = TextTokenizer.encode, []

    def measured(self, given):
        sizes.append(sum(map(len, given)))
        return encode(self, given)

    monkeypatch.setattr(TextTokenizer, "encode", measured)
    whole = prepare(PrepareOptions(input=rows, out=tmp_path / "whole", vocab_size=400))
    assert max(sizes) > 20_000
    sizes.clear()
    monkeypatch.setattr("photon.data.pieces._PIECE", 2000)
    monkeypatch.setattr("photon.data.pieces._BATCH", 5000)
    parted = prepare(PrepareOptions(input=rows, out=tmp_path / "parted", vocab_size=400))
    assert parted.sha256 == whole.sha256
    parted.verify()
    assert max(sizes) <= 7000


def test_a_stretch_that_nothing_can_cut_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("photon.data.pieces._PIECE", 1000)
    rows = tmp_path / "rows.jsonl"
    every = [{"text": text} for text in [*texts(12, 40), "x" * 9000]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in every))
    options = {"input": rows, "vocab_size": 400}
    with pytest.raises(DataError, match=r"rows\.jsonl:13: .* beyond max_document_bytes 8,000"):
        prepare(PrepareOptions(out=tmp_path / "data", max_document_bytes=8000, **options))
    assert not (tmp_path / "data").exists()
    data = prepare(PrepareOptions(out=tmp_path / "data", max_document_bytes=9000, **options))
    assert sum(part.documents for part in data.sets()) == 13


@pytest.fixture
def ctrl_c():
    """Heard, also where a shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_heard_while_native_code_works(ctrl_c):
    begun, gate = threading.Event(), threading.Event()

    def native():
        begun.set()
        gate.wait()

    def press():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(native)
        assert not gate.is_set()
    finally:
        gate.set()
        presser.join()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    assert interruptible(lambda: 7) == 7
