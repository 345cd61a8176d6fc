"""Where a document came from is Photon's to say; links, splits and inputs are never left out."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from photon.data import PrepareOptions, prepare
from photon.data.ingest import Source, Tally
from photon.errors import DataError, DataNotFoundError, EmptySiloError

ROW = {"text": "x", "file": "mine", "folder": "mine", "split": "train", "source": "mine"}


def write_folder(folder, name, count):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n}.txt").write_text(f"{name} text number {n} of the round. " * 3)
    return folder


def write_rows(path, name, count, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**more, "text": f"{name} row number {n} of the round. " * 3} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(*inputs, **options):
    return sorted(
        d.text.split()[0] for d in Source([str(i) for i in inputs], **options).documents()
    )


def out_of(tmp_path, given, out="data", **more):
    return prepare(PrepareOptions(input=given, out=tmp_path / out, vocab_size=300, **more))


def silo_words(data, tokenizer, name):
    """First words of the texts of a silo."""
    import numpy as np

    part = data.silos[name] if name else data.held_out
    words = set()
    for split in part.splits:
        for shard in part.shards(split):
            tokens = np.fromfile(part.path / shard.file, dtype=data.dtype)
            ends = np.load(part.path / shard.index_file)
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                words.add(tokenizer.decode(tokens[start : end - 1].tolist()).split()[0])
    return words


@pytest.fixture
def words_of():
    from photon.data import load_tokenizer

    return lambda data, name: silo_words(data, load_tokenizer(data.tokenizer_file).tokenizer, name)


def test_no_row_says_where_it_came_from(tmp_path, words_of):
    for silo in ("hospital-a", "hospital-b"):
        own = {"folder": "inbox", "file": "f", "split": "test", "source": "s", "@folder": "x"}
        write_rows(tmp_path / "in" / silo / "mail.jsonl", silo, 30, **own)
    by_folder = out_of(tmp_path, tmp_path / "in", silo_folders=True)
    assert list(by_folder.silos) == ["hospital-a", "hospital-b"]
    assert words_of(by_folder, "hospital-a") == {"hospital-a"}
    named = out_of(tmp_path, tmp_path / "in", "named", silo_field="@folder")
    assert list(named.silos) == ["hospital-a", "hospital-b"]
    own = out_of(tmp_path, tmp_path / "in", "own", silo_field="folder")  # a column like any other
    assert list(own.silos) == ["inbox"]
    dealt = out_of(tmp_path, tmp_path / "in", "dealt", dirichlet=(2, 1.0), label_field="@source")
    assert list(dealt.silos) == ["silo-0", "silo-1"]
    with pytest.raises(DataError, match=r"silo_field @split: mail\.jsonl has no such field"):
        out_of(tmp_path, tmp_path / "in", "none", silo_field="@split")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_every_reader_keeps_rows_and_origin_apart(tmp_path, kind):
    import datasets
    import pyarrow.parquet

    own = tmp_path / "a" / f"rows.{kind}"
    own.parent.mkdir()
    if kind == "jsonl":
        own.write_text(json.dumps(ROW))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), own)
    else:
        datasets.DatasetDict({"de": datasets.Dataset.from_list([ROW])}).save_to_disk(str(own))
    (found,) = Source([str(tmp_path)]).documents()
    assert (found.fields["folder"], found.origin.folder) == ("mine", "a")
    assert found.origin.file == ("" if kind == "saved" else own.name)
    assert found.origin.split == ("de" if kind == "saved" else "")
    assert found.origin.source.startswith("a/rows.")


def test_linked_folders_and_files_are_read(tmp_path):
    write_folder(tmp_path / "in/a", "a", 3)
    write_folder(tmp_path / "elsewhere/c/deep", "c", 2)
    (tmp_path / "in/c").symlink_to("../elsewhere/c")
    (tmp_path / "in/a/more.txt").symlink_to(tmp_path / "elsewhere/c/deep/0.txt")
    assert texts(tmp_path / "in") == ["a"] * 3 + ["c"] * 3
    assert {d.origin.folder for d in Source([str(tmp_path / "in")]).documents()} == {"a", "c"}


def test_a_dangling_link_and_a_loop_are_refused_by_name(tmp_path):
    write_folder(tmp_path / "in/a", "a", 3)
    for link, target, said in (
        ("a/gone.txt", "/nonexistent", r"a/gone\.txt is a link to nowhere \(/nonexistent\)"),
        ("disk", "/nonexistent", r"in/disk is a link to nowhere"),
        ("a/up", "..", r"a/up is a link to a folder that it lies in"),
    ):
        (tmp_path / "in" / link).symlink_to(target)
        with pytest.raises(DataError, match=said) as caught:
            texts(tmp_path / "in")
        assert caught.value.hint
        (tmp_path / "in" / link).unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataNotFoundError, match=r"no input at .*link \(a link to nowhere\)"):
        texts(tmp_path / "link")


@pytest.mark.parametrize(("name", "mode"), [("b", 0), ("b", 0o444), ("a/1.txt", 0)])
def test_what_may_not_be_read_is_refused_by_name(unprivileged, name, mode):
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        write_folder(root / "a", "a", 3)
        write_folder(root / "b", "b", 3)
        (root / name).chmod(mode)
        with (
            unprivileged(),
            pytest.raises(DataError, match=rf"can't read .*/{name}(/\d\.txt)?: Permission"),
        ):
            texts(root)
    finally:
        (root / name).chmod(0o755)
        shutil.rmtree(root)


def test_what_is_no_file_of_text_is_counted(tmp_path):
    write_folder(tmp_path / "in", "a", 1)
    os.mkfifo(tmp_path / "in/pipe.txt")
    (tmp_path / "in/.hidden").mkdir()
    tally = Tally()
    assert len(list(Source([str(tmp_path / "in")]).documents(tally))) == 1
    said = " / ".join(tally.remarks())
    assert "1 hidden files and folders" in said
    assert "1 x no regular file" in said


def test_all_inputs_are_read(tmp_path, words_of):
    one, two = write_folder(tmp_path / "x/a", "a", 12), write_folder(tmp_path / "y/b", "b", 12)
    rows = write_rows(tmp_path / "z/rows.jsonl", "row", 12)
    data = out_of(tmp_path, [one, two], silo_folders=True)
    assert list(data.silos) == ["a", "b"]
    assert words_of(data, "b") == {"b"}
    manifest = json.loads((data.path / "manifest.json").read_text())
    assert manifest["options"]["input"] == ["a", "b"]
    assert "from `a`, `b`" in (data.path / "README.md").read_text()
    assert texts(one, rows, two) == ["a"] * 12 + ["b"] * 12 + ["row"] * 12
    other = write_folder(tmp_path / "w/a", "w", 2)
    with pytest.raises(DataError, match="several inputs are called 'a'"):
        out_of(tmp_path, [one, other], "more")
    with pytest.raises(DataError, match=r"input .*x and input .*x/a lie inside one another"):
        out_of(tmp_path, [tmp_path / "x", one], "more")
    with pytest.raises(DataError, match=r"out .*y/more and input .*y lie inside"):
        out_of(tmp_path, [one, tmp_path / "y"], "y/more")
    with pytest.raises(DataNotFoundError, match="no input at"):
        out_of(tmp_path, [one, tmp_path / "gone"], "more")


def save_dict(root):
    import datasets

    sizes = {"train": 40, "validation": 6, "test": 5}
    datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list([{"text": f"{split} {n} " * 9} for n in range(count)])
            for split, count in sizes.items()
        }
    ).save_to_disk(str(root))


def files_beside(root):
    for split, count in (("train", 40), ("validation", 6), ("test", 5)):
        write_rows(root / "data" / f"{split}-00000-of-00001.jsonl", split, count)


def folders_beside(root):
    for split, count in (("train", 40), ("validation", 6), ("test", 5)):
        write_folder(root / "mail" / split / "a", split, count)


@pytest.mark.parametrize("write", [save_dict, files_beside, folders_beside])
def test_an_inputs_own_splits_are_the_held_out_set(tmp_path, write, words_of):
    write(tmp_path / "in")
    data = out_of(tmp_path, tmp_path / "in", iid=2)
    assert words_of(data, None) == {"validation", "test"}
    assert data.held_out.held_out_documents == 11
    for silo in data.silos:
        assert words_of(data, silo) == {"train"}
    said = next(remark for remark in data.remarks if "own splits" in remark)
    assert "test, validation: 11 documents" in said
    assert "--ignore-splits" in said
    assert said in (data.path / "README.md").read_text()
    mixed = out_of(tmp_path, tmp_path / "in", "mixed", iid=2, ignore_splits=True)
    assert any("test" in words_of(mixed, silo) for silo in mixed.silos)
    assert mixed.held_out.held_out_documents < 11


def test_a_copy_of_test_text_is_not_trained_on(tmp_path, words_of):
    write_rows(tmp_path / "in/train.jsonl", "train", 20)
    write_rows(tmp_path / "in/test.jsonl", "test", 4)
    with (tmp_path / "in/train.jsonl").open("a") as file:
        file.write((tmp_path / "in/test.jsonl").read_text().splitlines()[2] + "\n")
    data = out_of(tmp_path, tmp_path / "in")
    assert words_of(data, "all") == {"train"}
    assert data.held_out.held_out_documents == 5
    assert any("and 1 copies of them among the rest" in remark for remark in data.remarks)


def test_a_name_alone_makes_no_split(tmp_path):
    """A folder "dev" beside others is a folder; a lone test file is what was asked for."""
    for name in ("dev", "security", "contest"):
        write_folder(tmp_path / "in" / name, name, 9)
    assert list(out_of(tmp_path, tmp_path / "in", silo_folders=True).silos) == [
        "contest",
        "dev",
        "security",
    ]
    write_rows(tmp_path / "test.jsonl", "test", 20)
    assert out_of(tmp_path, tmp_path / "test.jsonl", "lone").silos["all"].train_documents > 10
    write_rows(tmp_path / "train.jsonl", "train", 20)
    both = out_of(tmp_path, [tmp_path / "test.jsonl", tmp_path / "train.jsonl"], "both")
    assert both.held_out.held_out_documents == 20


def test_only_held_out_text_is_refused_for_training(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train.jsonl").write_text('{"text": ""}\n')
    write_rows(tmp_path / "in/test.jsonl", "test", 4)
    with pytest.raises(EmptySiloError, match="all 4 documents are in splits") as caught:
        out_of(tmp_path, tmp_path / "in")
    assert "--held-out-only" in caught.value.hint
