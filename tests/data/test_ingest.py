"""Every format in; every broken one named by file and line."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from photon.data.ingest import Source
from photon.errors import DataError, DataNotFoundError

ROWS = [
    {"text": f"Text number {n}.", "topic": "odd" if n % 2 else "even", "n": n} for n in range(5)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_jsonl(path):
    path.write_text(LINES)


def write_gz(path):
    path.write_bytes(gzip.compress(LINES.encode()))


def write_zst(path):
    path.write_bytes(zstandard.compress(LINES.encode()))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gz,
    "rows.jsonl.zst": write_zst,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(tmp_path, name):
    WRITERS[name](tmp_path / name)
    documents = list(Source([str(tmp_path / name)]).documents())
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.fields["topic"] for document in documents] == [row["topic"] for row in ROWS]
    assert documents[3].fields["n"] == "3"


def test_a_mixed_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b/rows.jsonl")
    (tmp_path / "a.txt").write_text("First.")
    (tmp_path / "c.md").write_text("Last.")
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    documents = list(Source([str(tmp_path)]).documents())
    texts = [document.text for document in documents]
    assert texts == ["First.", *(row["text"] for row in ROWS), "Last."]
    assert documents[1].origin.folder == "b"


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_saved_hugging_face_datasets(tmp_path, kind):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    saved = rows if kind == "Dataset" else datasets.DatasetDict({"train": rows})
    saved.save_to_disk(str(tmp_path / "saved"))
    documents = list(Source([str(tmp_path / "saved")]).documents())
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert documents[0].fields["topic"] == "even"


def test_metadata_joins_by_stem(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name in ("one", "two"):
        (text / f"{name}.txt").write_text(f"Words of {name}.")
    table = tmp_path / "table.csv"
    table.write_text("year,id,party\n1800,one,whig\n1900,two,tory\n")
    documents = list(Source([str(text)], metadata=table, metadata_key="id").documents())
    assert [document.fields["party"] for document in documents] == ["whig", "tory"]
    with pytest.raises(DataError, match=r"no row of .*table\.csv belongs to a file"):
        list(Source([str(text)], metadata=table).documents())
    with pytest.raises(DataError, match=r"no column 'name'; its columns: year, id, party"):
        list(Source([str(text)], metadata=table, metadata_key="name").documents())


def cut(write, path):
    write(path)
    path.write_bytes(path.read_bytes()[:-12])


BROKEN = {
    "rows.jsonl": (
        lambda path: path.write_text('{"text": "a"}\n{"text": \n'),
        r"rows\.jsonl:2: not JSON",
    ),
    "list.jsonl": (lambda path: path.write_text("[1]\n"), r"list\.jsonl:1: expected an object"),
    "bytes.jsonl": (
        lambda path: path.write_bytes(b'{"text": "\xff"}\n'),
        r"bytes\.jsonl:1: not UTF-8",
    ),
    "key.jsonl": (
        lambda path: path.write_text('{"body": "a"}\n'),
        r"key\.jsonl:1: expected text under 'text', found no such key; keys: body",
    ),
    "type.jsonl": (lambda path: path.write_text('{"text": 3}\n'), r"found a int"),
    "cut.jsonl.gz": (lambda path: cut(write_gz, path), r"cut\.jsonl\.gz is damaged or cut short"),
    "cut.jsonl.zst": (
        lambda path: cut(write_zst, path),
        r"cut\.jsonl\.zst is damaged or cut short",
    ),
    "not.parquet": (lambda path: path.write_text("no"), r"not\.parquet is not a readable parquet"),
    "latin.txt": (
        lambda path: path.write_bytes("café".encode("latin-1")),
        r"latin\.txt is not UTF-8",
    ),
    "text.docx": (
        lambda path: path.write_text("x"),
        r"text\.docx has an ending Photon does not read",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_named(tmp_path, name):
    write, message = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        list(Source([str(tmp_path / name)]).documents())


def test_missing_input_and_empty_folders(tmp_path):
    with pytest.raises(DataNotFoundError, match="no input at"):
        list(Source([str(tmp_path / "nothing")]).documents())
    with pytest.raises(DataNotFoundError, match="holds no file that Photon reads"):
        list(Source([str(tmp_path)]).documents())


def test_a_dataset_of_the_hubs_layout_is_read_by_the_columns_it_needs(tmp_path, monkeypatch):
    """`datasets` takes OWNER/NAME for a folder where there is one: the same way, without a hub."""
    far = pyarrow.array([2**60, 0], pyarrow.timestamp("us"))
    (tmp_path / "owner/name").mkdir(parents=True)
    table = pyarrow.table(
        {"text": ["one", "two"], "topic": ["a", "b"], "far": far, "deep": [[1], []]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "owner/name/train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = list(Source(["hf:owner/name:train"], fields={"topic": "--silo-field"}).documents())
    assert [(d.text, d.fields, d.origin.split) for d in found] == [
        ("one", {"topic": "a"}, "train"),
        ("two", {"topic": "b"}, "train"),
    ]
    assert found[1].place == "hf:owner/name:train, row 2"
    with pytest.raises(
        DataError, match=r"hf:owner/name:train: expected text under 'body', found no"
    ):
        list(Source(["hf:owner/name:train"], text_key="body").documents())


def test_the_hub_is_reached_by_name_only(tmp_path):
    """Offline, naming a hub dataset is a clean error; a bare word is a local path."""
    with pytest.raises(DataNotFoundError, match="no input at wikitext"):
        list(Source(["wikitext"]).documents())
    code = (
        "from photon.data.ingest import Source\n"
        "from photon.errors import DataNotFoundError\n"
        "try:\n"
        "    list(Source(['hf:no/such-dataset']).documents())\n"
        "except DataNotFoundError as error:\n"
        "    assert 'no/such-dataset' in str(error)\n"
        "    raise SystemExit(21)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 21
