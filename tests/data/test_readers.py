"""Details of reading that lose or bend text when they are wrong."""

import gzip
import json

import pytest
import zstandard

from photon.data import Source
from photon.errors import DataError


def texts(path, **options):
    return [document.text for document in Source(str(path), **options).documents()]


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
    found = list(Source(str(tmp_path)).documents())
    assert [document.source for document in found] == ["news/b.jsonl", "news/local"]
    assert found[0].fields == {"file": "b.jsonl", "folder": "news", "n": "1"}


def test_metadata_by_file_name_and_two_rows_for_one(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/dr.smith.txt").write_text("text")
    table = tmp_path / "table.csv"
    table.write_text("id,party\ndr.smith,whig\n")
    found = list(Source(str(tmp_path / "text"), metadata=table).documents())
    assert found[0].fields["party"] == "whig"
    table.write_text("id,party\na,whig\na,tory\n")
    with pytest.raises(DataError, match=r"table\.csv:3: a second row for 'a'"):
        list(Source(str(tmp_path / "text"), metadata=table).documents())


def test_a_row_named_stem_is_not_taken_for_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "row", "stem": "a"}\n')
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    table.write_text("id,party\na,whig\n")
    found = list(Source(str(tmp_path), metadata=table).documents())
    assert ["party" in document.fields for document in found] == [True, False]
