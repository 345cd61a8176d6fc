"""Details of reading that lose or bend text when they are wrong."""

import gzip
import json

import pytest
import zstandard

from photon.data.ingest import Origin, Source, Tally
from photon.errors import DataError, DataNotFoundError


def texts(path, **options):
    return [document.text for document in Source([str(path)], **options).documents()]


def lines(count):
    return "".join(json.dumps({"text": f"line {n} " * 50}) + "\n" for n in range(count)).encode()


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files_of_several_parts_are_read_whole(tmp_path, ending):
    compress = gzip.compress if ending == "gz" else zstandard.compress
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(compress(lines(3000)) + compress(lines(20)))
    assert len(texts(path)) == 3020


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_cut_file_is_never_taken_for_a_short_one(tmp_path, ending, kept):
    compress = gzip.compress if ending == "gz" else zstandard.compress
    raw = compress(lines(3000))
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(raw[: int(len(raw) * kept)])
    with pytest.raises(DataError, match="is damaged or cut short after line"):
        texts(path)


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    body = json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + body.encode() + b"\r\n\r\n" + body.encode())
    assert texts(path) == ["a\u2028b\u0085c"] * 2


def test_text_keeps_its_line_ends_and_loses_its_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert texts(path) == ["one\r\ntwo\n"]


def test_half_a_character_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the text holds half a character"):
        texts(path)


def test_a_line_number_is_right_far_into_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(5000) + b'{"text": "\xff"}\n' + lines(10))
    with pytest.raises(DataError, match=r"rows\.jsonl:5001: not UTF-8"):
        texts(path)


def test_separators_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("photon.data.readers._CHUNK", 7)
    path = tmp_path / "a.txt"
    path.write_text("one<END>two<END>thr<END><END>four")
    assert texts(path, separator="<END>") == ["one", "two", "thr", "four"]


def test_hidden_files_are_passed_over(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/notes.txt").write_text("hidden")
    (tmp_path / ".secret.txt").write_text("hidden")
    (tmp_path / "a.TXT").write_text("seen")
    assert texts(tmp_path) == ["seen"]


def test_sources_name_the_file_or_folder(tmp_path):
    (tmp_path / "news/local").mkdir(parents=True)
    (tmp_path / "news/local/a.txt").write_text("text")
    (tmp_path / "news/b.jsonl").write_text('{"text": "row", "n": 1, "deep": {"x": 2}}\n')
    found = list(Source([str(tmp_path)]).documents())
    assert [document.origin.source for document in found] == ["news/b.jsonl", "news/local"]
    assert found[0].origin == Origin("news/b.jsonl", "b.jsonl", "news")
    assert found[0].fields == {"n": "1"}


def test_metadata_by_file_name_and_two_rows_for_one(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/dr.smith.txt").write_text("text")
    table = tmp_path / "table.csv"
    table.write_text("id,party\ndr.smith,whig\n")
    found = list(Source([str(tmp_path / "text")], metadata=table).documents())
    assert found[0].fields["party"] == "whig"
    table.write_text("id,party\na,whig\na,tory\n")
    with pytest.raises(DataError, match=r"table\.csv:3: a second row for 'a'"):
        list(Source([str(tmp_path / "text")], metadata=table).documents())


def test_a_row_named_stem_is_not_taken_for_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "row", "stem": "a"}\n')
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    table.write_text("id,party\na,whig\n")
    found = list(Source([str(tmp_path)], metadata=table).documents())
    assert ["party" in document.fields for document in found] == [True, False]


def test_null_is_an_empty_document(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "rows.jsonl").write_text('{"text": null}\n{"text": "kept"}\n')
    table = pyarrow.Table.from_pylist([{"text": "also kept"}, {"text": None}])
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    tally = Tally()
    texts = [document.text for document in Source([str(tmp_path)]).documents(tally)]
    assert texts == ["kept", "also kept"]
    assert tally.empty == 2


def test_parquet_that_is_cut_flipped_or_not_utf8(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"text": f"row {n} " * 50} for n in range(500)])
    pyarrow.parquet.write_table(table, path, compression="zstd")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[100:140] = bytes(40)
    latin = pyarrow.array([b"caf\xe9"]).cast(pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(1, latin.buffers()[1], latin.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "latin.parquet")
    for raw in (whole[:-20], whole[: len(whole) // 2], bytes(flipped), b""):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"rows\.parquet is not a readable parquet file"):
            list(Source([str(path)]).documents())
    with pytest.raises(
        DataError, match=r"latin\.parquet, rows 1 to 1: the column 'text' \(string\)"
    ):
        list(Source([str(tmp_path / "latin.parquet")]).documents())


def test_parquet_without_the_text_column_lists_its_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "lang": ["en"]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet: .*'text'.*keys: body, lang") as caught:
        list(Source([str(path)]).documents())
    assert "--text-key" in caught.value.hint
    assert [document.text for document in Source([str(path)], text_key="body").documents()] == ["x"]


def test_every_message_of_broken_input_has_a_hint(tmp_path):
    broken = {
        "a.jsonl": b'{"text": \n',
        "b.jsonl": b"[1]\n",
        "c.jsonl": b'{"text": "\xff"}\n',
        "d.jsonl": b'{"body": "a"}\n',
        "e.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
        "f.txt": b"\xff",
        "g.parquet": b"PAR1",
        "h.docx": b"",
    }
    for name, raw in broken.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
            list(Source([str(tmp_path / name)]).documents())
        assert caught.value.hint, name


def test_metadata_that_is_no_table(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/one.txt").write_text("Words.")
    table = tmp_path / "table.csv"

    def read():
        list(Source([str(tmp_path / "text")], metadata=table).documents())

    with pytest.raises(DataNotFoundError, match=r"no metadata file at .*table\.csv"):
        read()
    table.write_text("")
    with pytest.raises(DataError, match=r"table\.csv has no column ''; its columns: none"):
        read()
    table.write_text("id,party\n")
    with pytest.raises(DataError, match=r"no row of .*table\.csv belongs to a file"):
        read()
    table.write_bytes(b"id\n\xff\n")
    with pytest.raises(DataError, match=r"table\.csv is not a readable CSV"):
        read()
