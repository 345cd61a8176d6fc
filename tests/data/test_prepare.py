"""Preparing: what is left out, what is left behind, what a folder says of itself."""

import errno
import json
import random

import numpy as np
import pytest

from photon.data import PrepareOptions, load_tokenizer, open_data, prepare, token_stream
from photon.data.shards import ShardWriter
from photon.data.splits import position_of, split_documents
from photon.errors import (
    DataError,
    DataNotFoundError,
    DiskFullError,
    EmptySiloError,
    IncompatibleConfigError,
    ShardCorruptError,
)

WORDS = ["the", "river", "bank", "treaty", "harbor", "needs", "a", "quiet", "morning", "ships"]


def write_rows(path, count, *, words=60, seed=0, **fields):
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(words)) + f" {seed}-{number}"
            row = {"text": text, **{name: make(number) for name, make in fields.items()}}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 60, kind=lambda n: "web" if n % 3 else "book")


def options(rows, out="data", **more):
    return PrepareOptions(input=rows, out=rows.parent / out, **{"vocab_size": 300, **more})


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_prepare_leaves_nothing_and_keeps_the_old(rows, failure):
    kept = prepare(options(rows))

    def stop(stage, done, total):
        if stage == "tokenising":
            fired.append(stage)
            raise failure

    fired = []
    with pytest.raises(failure):
        prepare(options(rows, iid=3, overwrite=True), stop)
    assert fired
    assert left(rows.parent) == ["data", "rows.jsonl"]
    assert open_data(kept.path).sha256 == kept.sha256


def test_a_full_disk_is_named_and_nothing_is_left(rows, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "flush", full)
    with pytest.raises(DiskFullError, match=r"no room to write .*data: No space left"):
        prepare(options(rows))
    assert left(rows.parent) == ["rows.jsonl"]


def test_room_is_asked_for_before_anything_is_written(rows, monkeypatch):
    import shutil

    usage = shutil.disk_usage(rows.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DiskFullError, match="are free"):
        prepare(options(rows))
    assert left(rows.parent) == ["rows.jsonl"]


def test_input_that_changes_meanwhile_is_noticed(rows):
    def meddle(stage, done, total):
        if stage == "training the tokenizer" and not done:
            rows.write_text(rows.read_text().replace("0-7", "9-9"))

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(options(rows), meddle)
    assert left(rows.parent) == ["rows.jsonl"]


def test_out_is_not_replaced_without_being_asked(rows):
    prepare(options(rows))
    with pytest.raises(DataError, match="already exists"):
        prepare(options(rows))
    again = prepare(options(rows, iid=2, overwrite=True))
    assert sorted(again.silos) == ["silo-0", "silo-1"]
    assert left(rows.parent) == ["data", "rows.jsonl"]
    (rows.parent / "mine").mkdir()
    (rows.parent / "mine/notes.txt").write_text("Dear diary")
    with pytest.raises(DataError, match="not a prepared data folder"):
        prepare(options(rows, "mine", overwrite=True))
    assert (rows.parent / "mine/notes.txt").exists()


@pytest.mark.parametrize("out", ["text", "text/inside", "."])
def test_out_never_swallows_the_input(tmp_path, out):
    (tmp_path / "text").mkdir()
    write_rows(tmp_path / "text/rows.jsonl", 20)
    with pytest.raises(DataError, match="lie inside one another"):
        prepare(PrepareOptions(input=tmp_path / "text", out=tmp_path / out, overwrite=True))
    assert (tmp_path / "text/rows.jsonl").exists()


def test_shard_size_changes_files_but_not_the_stream(rows):
    whole = prepare(options(rows, "whole"))
    small = prepare(options(rows, "small", shard_tokens=500))
    assert len(small.silos["all"].shards("train")) > 5 > len(whole.silos["all"].shards("train"))
    small.verify()
    with token_stream(whole, ["all"], 64, 1) as one, token_stream(small, ["all"], 64, 1) as two:
        assert one._firsts[-1] == two._firsts[-1]
        np.testing.assert_array_equal(one.batch(0, 300), two.batch(0, 300))
        np.testing.assert_array_equal(one.document_ids(0, 50), two.document_ids(0, 50))


def test_more_silos_than_file_descriptors(tmp_path):
    import resource

    rows = write_rows(tmp_path / "rows.jsonl", 600, words=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, soft), hard))
    try:
        data = prepare(options(rows, iid=150))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(data.silos) == 150


def test_vocabularies_beyond_16_bits_take_wider_tokens(rows):
    folder = rows.parent / "tokenizer"
    load_tokenizer(prepare(options(rows, "small")).tokenizer_file).save(folder)
    record = json.loads((folder / "tokenizer.json").read_text())
    record["added_tokens"].append({**record["added_tokens"][0], "id": 70_000, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(record))
    data = prepare(options(rows, tokenizer=folder))
    expected = np.dtype("<u4" if data.vocab_size > 65_536 else "<u2")
    assert data.dtype == expected
    data.verify()


def test_text_that_spells_the_end_token_does_not_end_there(rows):
    with rows.open("a") as file:
        file.write(json.dumps({"text": "before <|endoftext|> after", "kind": "web"}) + "\n")
    data = prepare(options(rows))
    for part in data.sets():
        for split in part.splits:
            for shard in part.shards(split):
                tokens = np.fromfile(part.path / shard.file, dtype=data.dtype)
                assert (tokens == data.eos_id).sum() == shard.documents


def test_a_separator_parts_one_file_into_documents(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("\n\n\n".join(f"Chapter {n}. " + "It rained. " * 20 for n in range(30)))
    with pytest.raises(EmptySiloError, match=r"book\.txt holds a single document") as caught:
        prepare(PrepareOptions(input=text, out=tmp_path / "data", vocab_size=300))
    assert "--separator" in caught.value.hint
    data = prepare(
        PrepareOptions(input=text, out=tmp_path / "data", vocab_size=300, separator="\n\n\n")
    )
    assert sum(part.documents for part in data.sets()) == 30


def test_what_was_left_out_or_helped_is_said(tmp_path):
    (tmp_path / "text").mkdir()
    write_rows(tmp_path / "text/rows.jsonl", 12)
    (tmp_path / "text/blank.txt").write_text(" \n")
    (tmp_path / "text/scan.pdf").write_bytes(b"%PDF")
    data = prepare(PrepareOptions(input=tmp_path / "text", out=tmp_path / "data", vocab_size=300))
    said = " / ".join(data.remarks)
    assert "1 empty documents" in said
    assert "1 x .pdf" in said
    card = (data.path / "README.md").read_text()
    for remark in data.remarks:
        assert remark in card
    assert str(tmp_path) not in card + (data.path / "manifest.json").read_text()


def test_manifest_totals_are_the_files(rows):
    data = prepare(options(rows, silo_field="kind"))
    manifest = json.loads((data.path / "manifest.json").read_text())
    text = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    assert sum(part.documents for part in data.sets()) == len(text)
    assert sum(part.bytes for part in data.sets()) == sum(len(one.encode()) for one in text)
    for name, silo in data.silos.items():
        assert manifest["silos"][name]["train"]["tokens"] == silo.train_tokens
        for shard in silo.shards("train"):
            ends = np.load(silo.path / shard.index_file)
            tokens = np.fromfile(silo.path / shard.file, dtype=data.dtype)
            np.testing.assert_array_equal(np.flatnonzero(tokens == data.eos_id) + 1, ends)


def test_folders_that_gave_bare_hashes_still_open(rows):
    data = prepare(options(rows, iid=2))
    path = data.path / "manifest.json"
    record = json.loads(path.read_text())
    record["silos"] = {name: entry["sha256"] for name, entry in record["silos"].items()}
    record["held_out"] = record["held_out"]["sha256"]
    path.write_text(json.dumps(record))
    assert open_data(data.path).silos == data.silos


def test_missing_unknown_and_damaged_folders(rows):
    with pytest.raises(DataNotFoundError, match="no prepared data at"):
        open_data(rows.parent / "nothing")
    with pytest.raises(DataNotFoundError, match="not a prepared data folder"):
        open_data(rows.parent)
    data = prepare(options(rows))
    path = data.path / "manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="has format 99"):
        open_data(data.path)
    path.write_text(good[: len(good) // 2])
    with pytest.raises(ShardCorruptError, match="can't read"):
        open_data(data.path)
    path.write_text(good)
    silo = data.path / "silos/all/manifest.json"
    silo.write_text(silo.read_text().replace("train-00000.bin", "../../../x.bin"))
    with pytest.raises(ShardCorruptError, match="has sha256"):
        open_data(data.path)


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"iid": 2, "contiguous": 2}, IncompatibleConfigError, "iid and contiguous"),
        ({"eos": "</s>"}, IncompatibleConfigError, "eos means nothing without tokenizer"),
        ({"label_field": "kind"}, IncompatibleConfigError, "without dirichlet"),
        ({"global_fraction": 0.0}, DataError, "global_fraction 0.0 must lie"),
        ({"iid": 0}, DataError, "iid 0: at least 1"),
        ({"shard_tokens": 0}, DataError, "shard_tokens 0"),
        ({"separator": ""}, DataError, "separator is empty"),
        ({"vocab_size": 100}, DataError, "vocab_size 100 is too small"),
    ],
)
def test_options_that_make_no_sense(rows, more, kind, message):
    with pytest.raises(kind, match=message):
        prepare(options(rows, **more))
    assert left(rows.parent) == ["rows.jsonl"]


def test_splits_by_text_alone_and_never_an_empty_set():
    positions = [position_of(f"text {n}", 0) for n in range(2000)]
    splits, remarks = split_documents(
        positions, ["a"] * 2000, global_fraction=0.1, silo_fraction=0.2
    )
    assert 0.07 < splits.count("global") / 2000 < 0.13
    assert 0.16 < splits.count("local") / 2000 < 0.24
    assert not remarks
    # Nothing falls below a tiny fraction: each set is helped, and "small" keeps what it needs.
    few = sorted(positions)[-7:]
    splits, remarks = split_documents(
        few, ["small"] * 2 + ["large"] * 5, global_fraction=1e-9, silo_fraction=1e-9
    )
    assert splits == ["local", "train", "global", "local", "train", "train", "train"]
    assert len(remarks) == 3


def test_copies_never_part():
    positions = [position_of(text, 0) for text in ["a", "b", "c", "a", "d", "a"]]
    splits, _ = split_documents(positions, ["x"] * 6, global_fraction=1e-9, silo_fraction=1e-9)
    assert splits[0] == splits[3] == splits[5]
    with pytest.raises(EmptySiloError, match="0 different texts"):
        split_documents([0.5, 0.5], ["x", "x"], global_fraction=1e-9, silo_fraction=1e-9)
