"""Tokenizers: trained here or given, and the same ids in transformers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.data import load_tokenizer
from photon.data.tokenizer import train_tokenizer
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
    for path in (tmp_path / "a", tmp_path / "a/tokenizer.json"):
        again = load_tokenizer(path)
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
    assert "--eos" in caught.value.hint
    assert load_tokenizer(tmp_path, "<|odd|>").eos_id == trained.eos_id
    with pytest.raises(VocabularyMismatchError, match="no token '</s>'"):
        load_tokenizer(tmp_path, "</s>")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "<|odd|>"}, "auto_map": {"x": "y"}}))
    named = load_tokenizer(tmp_path)
    assert named.eos_token == "<|odd|>"
    named.save(tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_the_end_token_may_be_named_in_the_map_of_special_tokens(trained, tmp_path):
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|odd|>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null, "pad_token": "<|odd|>"}')
    special = tmp_path / "special_tokens_map.json"
    special.write_text('{"eos_token": {"content": "<|odd|>"}, "pad_token": "<pad>"}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token, loaded.eos_id) == ("<|odd|>", trained.eos_id)
    assert loaded.settings["pad_token"] == "<|odd|>"  # the newer file says it
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_token == "<|odd|>"
    special.write_text("{")
    with pytest.raises(DataError, match=r"special_tokens_map\.json is not JSON"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(DataNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)


@given(text=st.text())
def test_every_text_comes_back(trained, text):
    ids = trained.encode([text])[0]
    assert trained.eos_id not in ids
    assert trained.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_given_tokenizer_keeps_its_ids_and_takes_the_end_named(trained, tmp_path):
    """Its tokenizer_config.json may name a class that transformers would build by other rules."""
    from transformers import AutoTokenizer

    given_folder, out = tmp_path / "given", tmp_path / "out"
    trained.save(given_folder)
    file = given_folder / "tokenizer.json"
    record = json.loads(file.read_text())
    extra = {**record["added_tokens"][0], "content": "<|stop|>", "id": trained.vocab_size}
    record["added_tokens"].append(extra)
    file.write_text(json.dumps(record))
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|endoftext|>"}
    (given_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(given_folder, "<|stop|>")
    loaded.save(out)
    theirs = AutoTokenizer.from_pretrained(out)
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|stop|>", loaded.eos_id)
    assert loaded.eos_id == trained.vocab_size
    for text, ids in zip(TEXTS, loaded.encode(TEXTS), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_a_misspelt_file_does_not_load_its_neighbour(trained, tmp_path):
    trained.save(tmp_path)
    trained.tokenizer.model.save(str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"no tokenizer at .*tokeniser\.json"):
        load_tokenizer(tmp_path / "tokeniser.json")


def test_training_does_not_depend_on_threads(monkeypatch, tmp_path):
    texts = [f"{n} ships sail to port {n % 7} and {n * n} return" for n in range(3000)]
    hashes = set()
    for threads in ("true", "false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        hashes.add(train_tokenizer(iter(texts), 600).save(tmp_path))
    assert len(hashes) == 1
