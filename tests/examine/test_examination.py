"""A silo's text examined: what leaves, and what does not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from examined_texts import german, prepare_texts, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.errors import DataError, EmptySiloError
from photon.examine.detect import method, tables
from photon.examine.examination import COPIES, SEEN, Examination, examine
from photon.examine.exchange import read_examination, write_examination
from photon.examine.signatures import BANDS

KEY = bytes(range(64))
HELD = "global held-out set"


@pytest.fixture(scope="module")
def tokenizer(one_silo: Path) -> Path:
    return one_silo / "tokenizer"


def test_counts_of_a_silo(tmp_path: Path, tokenizer: Path) -> None:
    parts = {
        "plain": [sentences(n) for n in range(40)],
        "e-mail": [f"{sentences(50 + n)} Write to someone{n}@example.org." for n in range(12)],
        "german": [german(n) for n in range(25)],
        "copies": [sentences(n) + " And one more." for n in range(13)],
        "cards": [f"paid 4111 1111 1111 1111, {sentences(n)}" for n in range(200, 203)],
    }
    texts = [text for some in parts.values() for text in some]
    held = [f"{text} Indeed." for text in [*texts[:12], *map(sentences, range(300, 325))]]
    data = prepare_texts(tmp_path / "data", tokenizer, {"north": texts}, held)
    record, signatures = examine(data, "north", key=KEY)
    # `prepare` holds one out for the silo: each count is one less at most.
    assert record.documents == len(texts) - 1 == data.silo("north").train_documents
    assert record.tables["e-mail"].cells["found"] in (11, 12)
    assert record.tables[COPIES[1]].cells[COPIES[1]] in (12, 13)
    languages = record.tables["languages"]
    assert languages.joined == ["de"]
    assert languages.joined_documents in (24, 25)
    card = record.tables["payment card"]
    assert (card.cells, card.joined, card.joined_documents) == ({}, ["not found"], len(texts) - 1)
    assert record.tables[HELD].cells[SEEN[1]] in (11, 12)
    assert "held out by the silo" not in record.tables  # one document: too few
    assert signatures is not None
    assert signatures.shape == (len(texts) - 1, BANDS)
    assert sorted(signatures[:, 0]) == list(signatures[:, 0])  # in no order of the text's


def test_processes_agree_with_one(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare_texts(tmp_path / "data", tokenizer, {"north": [*map(sentences, range(40))]})
    alone, here = examine(data, "north", key=KEY)
    monkeypatch.setattr("photon.examine.examination._BATCH_TOKENS", 1000)
    together, there = examine(data, "north", key=KEY, workers=2)
    assert alone == together
    assert here is not None
    assert np.array_equal(here, there)


def test_ctrl_c_leaves_neither_files_nor_processes(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare_texts(tmp_path / "data", tokenizer, {"north": [*map(sentences, range(40))]})
    monkeypatch.setattr("photon.examine.examination._BATCH_TOKENS", 200)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def stopped(*_: object) -> None:
        assert list((tmp_path / "scratch").glob("*/*.npy"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(data, "north", key=KEY, workers=2, progress=stopped)
    assert not list((tmp_path / "scratch").iterdir())
    assert not multiprocessing.active_children()


def test_long_documents_and_many_batches(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    texts = {"north": [sentences(n, 40 + 400 * (n % 3)) for n in range(40)]}
    data = prepare_texts(tmp_path / "data", tokenizer, texts)
    whole, here = examine(data, "north", key=KEY)
    monkeypatch.setattr("photon.examine.examination._BATCH_TOKENS", 100)
    said: list[int] = []
    parted, there = examine(data, "north", key=KEY, progress=lambda _, done, __: said.append(done))
    assert whole == parted
    assert np.array_equal(here, there)
    assert len(said) > 10
    assert data.silo("north").train_tokens in said
    assert not list((tmp_path / "scratch").iterdir())


@settings(max_examples=8)
@given(st.data())
def test_no_text_and_no_small_count_leaves(
    tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, drawn: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("small")
    draw = random.Random(drawn.draw(st.integers(0, 2**32)))
    cell = drawn.draw(st.integers(3, 12))
    kinds = (
        "Der Hafen liegt am Fluss und die Schule im Dorf, {}.",
        "The harbour lies at the river and the school in the village, {}.",
        "Write to {}@example.org or call +49 30 1234567 today.",
        "MIT License. Permission is hereby granted, free of charge, {}.",
        "def add(self, a):\n    return self, a, {}\n",
    )
    sizes = drawn.draw(st.lists(st.integers(0, 14), min_size=5, max_size=5))
    secrets = [f"zq{draw.randrange(10**12):x}" for _ in range(sum(sizes) + 2 * cell + 3)]
    forms = [kind for kind, size in zip(kinds, sizes, strict=True) for _ in range(size)]
    forms += [kinds[1]] * (len(secrets) - len(forms))
    texts = [form.format(secret) for form, secret in zip(forms, secrets, strict=True)]
    data = prepare_texts(folder / "data", tokenizer, {"north": texts})
    record, signatures = examine(data, "north", key=KEY, min_cell=cell)
    write_examination(folder / "north.json", record, signatures)
    left = (folder / "north.json").read_text()
    assert read_examination(folder / "north.json").tables == record.tables

    numbers, words = leaves(json.loads(left)["tables"])
    assert min(numbers) >= cell
    allowed = {name for table, cells in tables().items() for name in (table, *cells)}
    allowed |= {*COPIES, *SEEN, HELD, "held out by the silo", "cells", "joined"}
    assert words <= allowed | {"joined_documents"}
    known = {"north", method(), record.data_sha256, record.folder_sha256, record.held_out_sha256}
    _, others = leaves({k: v for k, v in json.loads(left).items() if k != "tables"})
    beside = folder / "north.signatures.npy"
    known |= {str(record.key), hashlib.sha256(beside.read_bytes()).hexdigest()}
    assert others <= known | {*Examination.model_fields}
    # Neither a text's words nor any hash of it that somebody without the key could make.
    everything = left.encode() + beside.read_bytes()
    assert not any(secret.encode() in everything for secret in secrets)
    for text in texts:
        for made in (hashlib.sha256, hashlib.md5, hashlib.blake2b):
            assert made(text.encode()).hexdigest()[:16] not in left
    assert b"zq" not in re.sub(rb"[^ -~]", b"", left.encode())


def leaves(tree: object) -> tuple[set[int], set[str]]:
    """All numbers and all words of a JSON value, but 0 where nothing is joined."""
    numbers: set[int] = set()
    words: set[str] = set()
    for key, one in tree.items() if isinstance(tree, dict) else enumerate(tree):  # type: ignore[arg-type]
        words |= {key} if isinstance(key, str) else set()
        if isinstance(one, dict | list):
            more = leaves(one)
            numbers |= more[0]
            words |= more[1]
        elif isinstance(one, str):
            words.add(one)
        elif one:
            numbers.add(one)
    return numbers, words


def test_signatures_tell_nothing_without_the_key(tmp_path: Path, tokenizer: Path) -> None:
    data = prepare_texts(tmp_path / "data", tokenizer, {"north": [sentences(n) for n in range(30)]})
    one, other = (examine(data, "north", key=bytes([n]) * 64) for n in (1, 2))
    assert one[1] is not None
    assert other[1] is not None
    assert not np.intersect1d(one[1], other[1]).size
    assert one[0].key != other[0].key
    unsigned, nothing = examine(data, "north")
    assert (unsigned.key, nothing) == (None, None)


def test_what_can_not_be_examined(tmp_path: Path, tokenizer: Path) -> None:
    data = prepare_texts(tmp_path / "data", tokenizer, {"north": [sentences(n) for n in range(20)]})
    with pytest.raises(EmptySiloError, match="18 documents"):
        examine(data, "north")
    texts = [sentences(n) for n in range(20)]
    two = prepare_texts(tmp_path / "two", tokenizer, dict.fromkeys("ab", texts))
    with pytest.raises(EmptySiloError, match="no silo named 'west'"):
        examine(two, "west")
    for cell in (2, 10**7):
        with pytest.raises(DataError, match=f"--min-cell {cell}|min_cell {cell}"):
            examine(data, "north", min_cell=cell)


def test_the_only_silo_goes_by_the_name_that_is_given(tmp_path: Path, tokenizer: Path) -> None:
    data = prepare_texts(tmp_path / "data", tokenizer, {"all": [sentences(n) for n in range(30)]})
    record = examine(data, "all")[0]
    assert examine(data, "north")[0] == record.model_copy(update={"silo": "north"})
