"""A suite that cuts one text in several ways: other silos, the same text held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from photon.bench.bench import Bench, read_results
from photon.cli.main import app
from photon.data import open_data
from photon.data.shards import HELD_OUT
from photon.errors import ConfigError

SUITE = """
title = "Cuts"
about = "Two of them."
[base]
"model.preset" = "tiny"
"data.sequence_length" = 16
"compute.threads" = 1
"eval.max_tokens" = 100
"eval.per_silo" = false
"local.batch_size" = 2
"local.steps" = 1
"run.keep_checkpoints" = 1
[scales.small]
steps = 2
silos = 2
vocab_size = 300
[cuts.mixed]
iid = 2
[cuts.files]
silo_field = "@file"
[methods.mixed]
cut = "mixed"
[methods.apart]
cut = "files"
set = { "local.batch_size" = 1 }
[methods.plain]
kind = "centralised"
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, write_corpus: Any) -> Path:
    """A finished bench, on two files."""
    folder = tmp_path_factory.mktemp("cuts")
    (folder / "cuts.toml").write_text(SUITE)
    (folder / "text").mkdir()
    for number, name in enumerate(("left", "right")):
        written = write_corpus(folder / name / "t", {name: 30}, words=20, seed=number)
        lines = [json.dumps({"text": one.read_text()}) for one in sorted(written.glob("*.txt"))]
        (folder / "text" / f"{name}.jsonl").write_text("\n".join(lines))
        shutil.rmtree(folder / name)
    told = ran(folder, "--text", str(folder / "text"))
    assert told.exit_code == 0, told.output
    return folder


def ran(folder: Path, *more: str) -> Any:
    words = ["bench", str(folder / "cuts.toml"), "--scale", "small", "--seeds", "1", "--quiet"]
    return CliRunner().invoke(app, [*words, "--out", str(folder / "out"), *more])


def test_silos_differ_and_held_out_text_does_not(out: Path) -> None:
    names = {"": ["silo-0", "silo-1"], "-mixed": ["silo-0", "silo-1"]}
    names["-files"] = ["left.jsonl", "right.jsonl"]
    opened = {cut: open_data(out / f"out/data-cuts-small{cut}") for cut in names}
    assert {cut: sorted(data.silos) for cut, data in opened.items()} == names
    held_out = {
        tuple(shard.sha256 for shard in data.held_out.shards(HELD_OUT)) for data in opened.values()
    }
    assert len(held_out) == len({data.tokenizer_sha256 for data in opened.values()}) == 1
    results = read_results(out / "out/results/cuts-small.json")
    assert results["data_sha256"] == {
        cut.removeprefix("-"): data.sha256 for cut, data in opened.items()
    }
    records = {one["method"]: one for one in results["runs"]}
    assert records.keys() == {"mixed", "apart", "plain"}
    # Half the batch, so twice the steps.
    assert len({one["tokens"] for one in records.values()}) == 1
    assert records["apart"]["config"]["local"]["steps"] == 2
    assert all("path" not in one["config"]["data"] for one in records.values())


def test_cuts_that_hold_out_other_text_are_refused(out: Path, three_silos: Path) -> None:
    data = {cut: open_data(out / f"out/data-cuts-small{cut}") for cut in ("", "-mixed", "-files")}
    data = {cut.removeprefix("-"): one for cut, one in data.items()} | {
        "mixed": open_data(three_silos)
    }
    with pytest.raises(ConfigError, match="hold out different text"):
        Bench(str(out / "cuts.toml"), "small", 1, data, out / "work", out / "none.json")


def test_the_demo_s_text_has_no_files_to_cut_by(tmp_path: Path) -> None:
    (tmp_path / "cuts.toml").write_text(SUITE)
    missing = ran(tmp_path, "--text", str(tmp_path / "gone"))
    assert missing.exit_code == ConfigError.exit_code
    suite = SUITE.replace("[methods.plain]\n", '[methods.plain]\ncut = "files"\n').replace(
        '"mixed"', '"files"'
    )
    (tmp_path / "cuts.toml").write_text(suite)
    told = ran(tmp_path)
    assert told.exit_code == ConfigError.exit_code
    assert "--text DIR" in told.output
