"""Tokenizers: trained here or given, and the same ids in transformers."""

import json

import pytest

from photon.data import load_tokenizer, train_tokenizer
from photon.errors import DataError, DataNotFoundError, VocabularyMismatchError

TEXTS = ["The harbor needs a road.", "Königsberg, 東京 and a 🚢\tin\r\nport", "  spaces  "] * 5


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 320)


def test_training_is_deterministic_and_loses_nothing(trained, tmp_path):
    assert trained.save(tmp_path / "a") == train_tokenizer(TEXTS, 320).save(tmp_path / "b")
    assert trained.eos_id < trained.vocab_size <= 320
    text = "Bytes never seen: \x00 \u2028 ﷽ é"
    assert trained.tokenizer.decode(trained.encode([text])[0]) == text


def test_transformers_reads_it_and_agrees(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(TEXTS, trained.encode(TEXTS), strict=True):
        assert theirs(text)["input_ids"] == ids
    assert theirs.eos_token_id == theirs.bos_token_id == trained.eos_id
    assert len(theirs) == trained.vocab_size


def test_a_saved_one_loads_and_saves_alike(trained, tmp_path):
    digest = trained.save(tmp_path / "a")
    for given in (tmp_path / "a", tmp_path / "a/tokenizer.json"):
        again = load_tokenizer(given)
        assert again.eos_id == trained.eos_id
        assert again.save(tmp_path / "b") == digest


def test_vocabulary_and_merges(trained, tmp_path):
    trained.tokenizer.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = trained.eos_id
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.encode(TEXTS) == trained.encode(TEXTS)


def test_the_end_token_is_found_or_asked_for(trained, tmp_path):
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|odd|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"none of the usual end-of-text tokens") as caught:
        load_tokenizer(tmp_path)
    assert "--eos" in str(caught.value)
    assert load_tokenizer(tmp_path, "<|odd|>").eos_id == trained.eos_id
    with pytest.raises(VocabularyMismatchError, match="no token '</s>'"):
        load_tokenizer(tmp_path, "</s>")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "<|odd|>"}, "auto_map": {"x": "y"}}))
    named = load_tokenizer(tmp_path)
    assert named.eos_token == "<|odd|>"
    named.save(tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
