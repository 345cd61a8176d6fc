"""What stands beside the text can't stop it; what is asked for is named when it can't be read."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from photon.data.ingest import Source
from photon.errors import DataError

BIG = "7" * 5000


def texts(path, **options):
    return [document.text for document in Source([str(path)], **options).documents()]


def write_table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], **columns}), path)
    return path


ODD = {
    "year zero": pyarrow.array([-719529, 3], pyarrow.int32()).cast(pyarrow.date32()),
    "far": pyarrow.array([2**60, 0], pyarrow.timestamp("us")),
    "zone": pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Nowhere/Never")),
    "bytes": pyarrow.array([b"\xff", None]),
    "pictures": pyarrow.array([{"bytes": b"\xff"}, None]),
    "lists": pyarrow.array([[1], [2, 3]]),
}


@pytest.mark.parametrize("name", ODD)
def test_a_column_of_a_table_counts_only_if_it_is_asked_for(tmp_path, name):
    path = write_table(tmp_path / "rows.parquet", odd=ODD[name], topic=["a", "b"])
    for fields in ({}, {"topic": "--silo-field"}):
        assert texts(path, fields=fields) == ["one", "two"]
    with pytest.raises(DataError, match=r"rows\.parquet, row.*'odd'") as caught:
        texts(path, fields={"odd": "--silo-field"})
    assert caught.value.hint


def test_plain_columns_are_read_as_they_were(tmp_path):
    day = pyarrow.array([1, 2], pyarrow.int32()).cast(pyarrow.date32())
    money = pyarrow.array(["1.50", "2.00"]).cast(pyarrow.decimal128(9, 2))
    path = write_table(tmp_path / "rows.parquet", day=day, n=[1.0, 2.5], ok=[True, None], sum=money)
    fields = [document.fields for document in Source([str(path)]).documents()]
    assert fields == [
        {"day": "1970-01-02", "n": "1.0", "ok": "True", "sum": "1.50"},
        {"day": "1970-01-03", "n": "2.5", "sum": "2.00"},
    ]
    some = [d.fields for d in Source([str(path)], fields={"n": "--silo-field"}).documents()]
    assert some == [{"n": "1.0"}, {"n": "2.5"}]


def test_a_list_is_told_as_one(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [["one", "two"]], "body": ["b"]}), path)
    with pytest.raises(DataError, match=r"found a list<.*string>; keys: text, body"):
        texts(path)
    assert texts(path, text_key="body") == ["b"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "topic": ["x"]}\n')
    assert texts(rows, fields={}) == ["a"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected one value under 'topic', found"):
        texts(rows, fields={"topic": "--silo-field"})


def test_a_number_beyond_all_bounds_stands_beside_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "one", "id": {BIG}, "low": -{BIG}}}\n')
    (found,) = Source([str(path)]).documents()
    assert found.fields == {"id": BIG, "low": f"-{BIG}"}
    path.write_text(f'{{"text": {BIG}}}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected text under 'text', found a Dec"):
        texts(path)


def test_a_missing_field_is_named_at_its_first_document(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "topic": "x"}, {"text": " "}, {"text": "b", "lang": "en"}, {"text": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"silo_field topic: .*rows\.jsonl:3 has no such field"
    ) as at:
        texts(path, fields={"topic": "--silo-field"})
    assert "it has lang" in str(at.value)
    table = write_table(tmp_path / "rows.parquet", far=ODD["far"])
    with pytest.raises(DataError, match=r"silo_field topic: .*rows\.parquet has no such.* far, te"):
        texts(table, fields={"topic": "--silo-field"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Datasets as `save_to_disk` leaves them: with a format, with columns that want decoders."""
    import datasets

    root = tmp_path_factory.mktemp("saved")
    rows = {"text": ["one", "two"], "topic": ["a", "b"], "year": [1, 2]}
    plain = datasets.Dataset.from_dict(rows)
    for kind in ("numpy", "arrow", "pandas"):
        plain.with_format(kind).save_to_disk(str(root / kind))
    plain.with_format("numpy", columns=["year"]).save_to_disk(str(root / "columns"))
    blobs = {**rows, "blob": [{"bytes": b"no", "path": None}] * 2}
    for kind, feature in (("image", datasets.Image()), ("audio", datasets.Audio())):
        features = datasets.Features({**plain.features, "blob": feature})
        table = pyarrow.table(blobs, schema=features.arrow_schema)
        datasets.Dataset(table).save_to_disk(str(root / kind))
    return root


@pytest.mark.parametrize("kind", ["numpy", "arrow", "pandas", "columns", "image", "audio"])
def test_saved_datasets_are_read_whatever_else_is_in_them(saved, kind):
    for fields in (None, {"topic": "--silo-field"}):
        found = list(Source([str(saved / kind)], fields=fields).documents())
        assert [(d.text, d.fields["topic"]) for d in found] == [("one", "a"), ("two", "b")]
    with pytest.raises(DataError, match=r"expected text under 'n'.*no such key; keys: .*topic"):
        texts(saved / kind, text_key="n")


def test_a_saved_dataset_that_was_cut_is_named(saved, tmp_path):
    import shutil

    root = shutil.copytree(saved / "numpy", tmp_path / "in/cut")
    file = next(root.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"in/cut"):
        texts(tmp_path / "in")


def test_a_long_column_of_metadata_is_passed_over(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("words")
    table = tmp_path / "table.csv"
    table.write_text(f"id,party,abstract\na,whig,{'x' * 200_000}\n")
    (found,) = Source([str(tmp_path / "text")], metadata=table).documents()
    assert found.fields["party"] == "whig"


def test_a_wide_window_is_read_and_a_wider_one_told_as_that(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.zst"
    rows = b"".join(json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(1000))
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    path.write_bytes(packer.compress(rows) + packer.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 2**28
    assert len(texts(path)) == 1000
    monkeypatch.setattr("photon.data.readers._LARGEST_WINDOW", 2**27)
    with pytest.raises(DataError, match=r"needs more than the 128 MiB of memory") as caught:
        texts(path)
    assert "smaller window" in caught.value.hint
    assert "damaged" not in str(caught.value)


def test_json_is_read_as_json_gz_is(tmp_path):
    import gzip

    line = b'{"text": "one"}\n'
    (tmp_path / "a.json").write_bytes(line)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(line))
    assert texts(tmp_path) == ["one", "one"]


@pytest.mark.parametrize("separator", [None, "<END>"])
def test_a_part_of_many_chunks_comes_whole(tmp_path, monkeypatch, separator):
    monkeypatch.setattr("photon.data.readers._CHUNK", 64)
    long = "x" * 50_000
    path = tmp_path / ("a.txt" if separator else "a.jsonl")
    parts = [long, "short", long]
    if separator:
        path.write_text(separator.join(parts))
    else:
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    assert texts(path, separator=separator) == parts
