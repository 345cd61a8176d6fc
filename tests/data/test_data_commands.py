"""`photon data prepare` and `photon data show`."""

import json
import re

import pytest
from typer.testing import CliRunner

from photon.cli.data import data_app
from photon.data import open_data
from photon.errors import (
    EmptySiloError,
    IncompatibleConfigError,
    InvalidValueError,
    ShardCorruptError,
)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [{"text": f"Report {n}. " * 30, "topic": "ab"[n % 2]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def call(*arguments, fails=None):
    result = CliRunner().invoke(data_app, [str(argument) for argument in arguments])
    if fails is None:
        assert result.exit_code == 0, result.output
    else:
        assert isinstance(result.exception, fails), result.output
    return result


def test_prepare_then_show(rows, tmp_path):
    out = tmp_path / "data"
    result = call(
        "prepare", "--input", rows, "--silo-field", "topic", "--out", out, "--vocab-size", 300
    )
    for word in ("held-out tokens", "text MB", "global held-out"):
        assert word in result.stdout.replace("\n", " ") or word.split()[0] in result.stdout
    shown = json.loads(call("show", out, "--verify", "--json").stdout)
    data = open_data(out)
    assert shown["sha256"] == data.sha256
    assert {name: row["tokens"] for name, row in shown["silos"].items()} == {
        name: silo.train_tokens for name, silo in data.silos.items()
    }


def test_json_is_all_there_is_on_stdout(rows, tmp_path):
    result = call(
        *("prepare", "--input", rows, "--dirichlet", "2:5", "--label-field", "topic"),
        *("--out", tmp_path / "data", "--vocab-size", 300, "--json"),
    )
    assert sorted(json.loads(result.stdout)["silos"]) == ["silo-0", "silo-1"]


def test_verify_finds_damage(rows, tmp_path):
    call("prepare", "--input", rows, "--out", tmp_path / "data", "--vocab-size", 300)
    shard = next((tmp_path / "data/silos/all").glob("train*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(bytes(raw))
    call("show", tmp_path / "data")
    call("show", tmp_path / "data", "--verify", fails=ShardCorruptError)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--iid", "2", "--silo-field", "topic"], IncompatibleConfigError, "each say how to make"),
        (["--dirichlet", "many"], InvalidValueError, "is not N:ALPHA"),
        (["--partitioner-option", "x"], InvalidValueError, "is not KEY=VALUE"),
        (["--partitioner-option", "x=1"], IncompatibleConfigError, "without partitioner"),
    ],
)
def test_options_that_clash_or_can_not_be_read(rows, tmp_path, arguments, kind, message):
    result = call("prepare", "--input", rows, "--out", tmp_path / "data", *arguments, fails=kind)
    assert message in str(result.exception)
    assert not (tmp_path / "data").exists()


def test_a_separator_is_unescaped(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Part {n}. " * 20 for n in range(30)))
    arguments = ["--separator", r"\n\n", "--vocab-size", 300, "--json"]
    result = call("prepare", "--input", text, "--out", tmp_path / "data", *arguments)
    shown = json.loads(result.stdout)
    held_out = shown["held_out"]["held_out_documents"]
    silo = shown["silos"]["all"]
    assert silo["documents"] + silo["held_out_documents"] + held_out == 30


def test_several_inputs_and_evaluation_only_text(rows, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": f"Other {n}. " * 30}) + "\n" for n in range(40)))
    both = ["--input", rows, "--input", more]
    arguments = ["--iid", 2, "--vocab-size", 300, "--json"]
    result = call("prepare", *both, "--out", tmp_path / "data", *arguments)
    shown = json.loads(result.stdout)
    counts = [*shown["silos"].values(), shown["held_out"]]
    assert sum(row["documents"] + row["held_out_documents"] for row in counts) == 80
    tokenizer = ["--tokenizer", tmp_path / "data/tokenizer", "--held-out-only", "--json"]
    result = call("prepare", *both, "--out", tmp_path / "exam", *tokenizer)
    assert json.loads(result.stdout)["held_out"]["held_out_documents"] == 80
    table = call("show", tmp_path / "exam").stdout
    assert re.search(r"\(global\s.*held-out\)", table, re.DOTALL)  # cut at a space, if at all


def test_one_text_file_is_told_about_the_separator(tmp_path):
    (tmp_path / "input.txt").write_text("All of it in one file. " * 100)
    arguments = ["--input", tmp_path / "input.txt", "--out", tmp_path / "data"]
    for more in ([], ["--iid", 4]):
        refused = call("prepare", *arguments, *more, fails=EmptySiloError).exception
        assert "input.txt holds a single document" in str(refused)
        assert "--separator" in refused.hint
        assert "0 silos" not in refused.hint


def test_a_cut_that_nobody_named_is_said(rows, tmp_path):
    result = call("prepare", "--input", rows, "--out", tmp_path / "data", "--vocab-size", 300)
    assert "all text is one silo, 'all'" in result.stderr
    assert "one silo, 'all'" in (tmp_path / "data/README.md").read_text()


def test_a_log_shows_that_work_goes_on(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("photon.cli.data._LINE_EVERY_S", 0.0)
    arguments = ["--input", rows, "--out", tmp_path / "data", "--vocab-size", 300, "--json"]
    result = call("prepare", *arguments)
    for stage in ("reading: 40 of 40", "training the tokenizer: ", "tokenising: "):
        assert stage in result.stderr
    json.loads(result.stdout)


def test_names_are_whole_in_a_narrow_terminal(tmp_path, monkeypatch):
    names = [f"debian-descriptions-{n}" for n in range(3)]
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
        for n in range(8):
            (tmp_path / "in" / name / f"{n}.txt").write_text(f"{name} text {n}")
    monkeypatch.setenv("COLUMNS", "60")
    arguments = ["--input", tmp_path / "in", "--out", tmp_path / "data", "--silo-folders"]
    shown = call("prepare", *arguments, "--vocab-size", 300).stdout
    first = "".join(line.split("│")[1].strip() for line in shown.splitlines() if "│" in line)
    assert all(name in first for name in names)
    assert str(tmp_path / "data") in shown


def test_help_has_an_example():
    text = " ".join(call("prepare", "--help").stdout.split())
    assert "photon data prepare --input" in text
