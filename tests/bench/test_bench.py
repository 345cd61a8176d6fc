"""A suite run for real: cached by what decides a run, resumed, its figures those of the runs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from photon.bench.bench import Bench, read_results
from photon.bench.case import Case, loss_at, time_of, tokens_to
from photon.bench.page import write_page
from photon.bench.search import as_point
from photon.cli.main import app
from photon.data import open_data
from photon.errors import ConfigError
from photon.runs import simulate, train

SUITE = """
title = "Small"
about = "Two ways."
[base]
"model.preset" = "tiny"
"data.sequence_length" = 32
"compute.threads" = 1
"eval.max_tokens" = 500
"eval.per_silo" = false
"local.batch_size" = 2
"local.optimizer" = "muon"
"run.keep_checkpoints" = 1
[scales.small]
points = 3
steps = 4
set = { "local.steps" = 2 }
[methods.ours]
grid = { "local.lr" = [6e-3, 1.2e-2, 2.4e-2] }
[methods.pooled]
kind = "centralised"
[methods.alone]
kind = "local"
[sizes]
pairs = [["ours", "pooled"]]
[sizes.published]
"theirs" = [[1e6, 3.12, 3.0], [1e7, 2.04, 2.0]]
"others" = [[1e6, 3.0, 3.1], [1e7, 2.04, 2.0]]
[[claims]]
says = "ours is lower"
source = "here"
one = "ours"
other = "pooled"
[[claims]]
says = "a tenth of the bytes"
source = "here"
one = "ours"
other = "pooled"
measure = "bytes"
most = 0.1
"""


@pytest.fixture(scope="module")
def out(three_silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished bench; its data is that of three silos."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "small.toml").write_text(SUITE)
    shutil.copytree(three_silos, folder / "out/data-small-small")
    told = ran(folder)
    assert told.exit_code == 0, told.output
    return folder


def ran(folder: Path, *more: str) -> Any:
    words = ["bench", str(folder / "small.toml"), "--scale", "small", "--seeds", "1", "--quiet"]
    return CliRunner().invoke(app, [*words, "--out", str(folder / "out"), *more])


def bench(folder: Path, seeds: int = 1) -> Bench:
    data = {"": open_data(folder / "out/data-small-small")}
    file = folder / "out/results/small-small.json"
    return Bench(str(folder / "small.toml"), "small", seeds, data, folder / "out/work", file)


def test_records_are_what_the_runs_say(out: Path, tmp_path: Path) -> None:
    work = bench(out)
    results = work.results
    assert len(results.records) == 5
    (ours,), (pooled,), (alone,) = (results.best(name) for name in ("ours", "pooled", "alone"))
    data = out / "out/data-small-small"
    config = work.suite.config("small", "ours", ours["point"], 1, data, 3)
    summary = simulate(config, run_dir=tmp_path / "again").summary
    assert ours["loss"] == summary["global_loss"]
    # Manifests hold the name of the run.
    sent = summary["bytes_up"] + summary["bytes_down"]
    assert ours["bytes"] == pytest.approx(sent, rel=1e-4)
    assert ours["tokens"] == summary["tokens"] == 3 * 2 * 2 * 2 * 32
    config = work.suite.config("small", "pooled", {}, 1, data, 3)
    assert pooled["loss"] == train(config, run_dir=tmp_path / "pooled").summary["global_loss"]
    assert pooled["tokens"] == alone["tokens"] == ours["tokens"]
    assert pooled["bytes"] == 4 * ours["parameters"] * 2 * 4 * 3
    # A step of the three together, or pooled, is one; an exchange a step, or one a round.
    assert time_of(pooled, 1.92) == pytest.approx(4 + 4 * 1.92)
    assert time_of(alone, 1.92) == 4
    assert ours["flops"] > alone["tokens"] * 6 * 1000
    assert [point[0] for point in ours["curve"]] == [0, 384, 768]
    assert results.budget([ours, pooled], "time") == min(time_of(ours, 1.92), time_of(pooled, 1.92))
    assert results.loss(ours, "tokens", ours["tokens"]) == ours["loss"]
    claim = results.judged(work.suite.claims[0])
    assert claim is not None
    assert claim.ratio == pytest.approx(ours["loss"] / pooled["loss"])


def test_nothing_is_run_twice_and_what_decides_a_run_is(out: Path, tmp_path: Path) -> None:
    assert bench(out).wave() == []
    again = ran(out, "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["not_run"] == []
    assert [case.seed for case in bench(out, seeds=3).wave()] == [2, 3] * 3
    other = tmp_path / "small.toml"
    other.write_text(SUITE.replace('"local.batch_size" = 2', '"local.batch_size" = 3'))
    work = bench(out)
    changed = Bench(str(other), "small", 1, work.data, work.work, work.file)
    assert len(changed.wave()) == 5
    other.write_text(SUITE.replace("seeds", "seeds").replace('says = "ours', 'says = "theirs'))
    assert Bench(str(other), "small", 1, work.data, work.work, work.file).wave() == []


def test_a_page_of_results_alone(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write_page([out / "out/results/small-small.json"], page)
    text = page.read_text()
    assert "| ours is lower | here | - | ours / pooled, loss: at most 1 |" in text
    assert "undecided: 1 of 3 seeds" in text
    assert "**Not run**: nothing." in text
    # From 4% to 2% over ten times the size; of what is not above the other's there is no such fit.
    assert "| theirs | 1 M: +4.0%, 10 M: +2.0% | x 0.50 |" in text
    assert "| others | 1 M: -3.2%, 10 M: +2.0% | - |" in text
    (ours,), (pooled,) = (bench(out).results.best(name) for name in ("ours", "pooled"))
    gap = ours["loss"] / pooled["loss"] - 1
    assert f"| here | {ours['parameters'] / 1e6:g} M: {gap:+.1%} | - |" in text
    assert (tmp_path / "results-small-small.svg").read_text().startswith("<?xml")
    # Of a folder that was prepared without it, nobody knows which text it is.
    assert f"\nText: sha256 once prepared: {bench(out).data[''].sha256}.\n" in text
    again = tmp_path / "again"
    again.mkdir()
    write_page([out / "out/results/small-small.json"], again / "results.md")
    assert (again / "results.md").read_text() == text


def test_results_say_of_which_text_they_are(
    tmp_path: Path, write_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By names, bytes and sha256: what others need to have the same, and no folder's path."""
    text = write_corpus(tmp_path / "books" / "de", {"a": 12, "b": 12})
    (tmp_path / "books" / "metadata.csv").unlink()
    (tmp_path / "small.toml").write_text(SUITE.replace("steps = 4\n", "steps = 4\nsilos = 2\n"))
    result = ran(tmp_path, "--text", str(text.parent), "--report")
    assert result.exit_code == 0, result.output
    files = sorted(text.iterdir())
    whole = b"".join(one.read_bytes() for one in files)
    names = ", ".join(f"de/{one.name}" for one in files[:20])
    digest = hashlib.sha256(whole).hexdigest()
    words = f"{names} and 4 more: {len(whole):,} bytes, sha256 {digest}"
    work = bench(tmp_path)
    case = next(one for one in work.wave() if one.method == "pooled")
    told = {"method": "pooled", "point": {}, "seed": 1, "key": case.key, "curve": [[0, 5], [8, 3]]}
    told |= {"loss": 3.0, "tokens": 8, "step_tokens": 2, "flops": 9, "bytes": 9}
    told |= {"exchanges": 1, "parameters": 1000}
    monkeypatch.setattr(Case, "record", lambda case, folder: dict(told))
    work.take(case)
    assert read_results(work.file)["text"] == words
    write_page([work.file], tmp_path / "results.md")
    assert f"\nText: {words}, sha256 once prepared: " in (tmp_path / "results.md").read_text()
    assert str(text.parent) not in work.file.read_text() + (tmp_path / "results.md").read_text()


def test_a_killed_bench_goes_on(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(out / "out/data-small-small", folder / "out/data-small-small")
    (folder / "small.toml").write_text(SUITE)
    words = ["bench", str(folder / "small.toml"), "--scale", "small", "--seeds", "1"]
    command = [sys.executable, "-m", "photon.cli.main", *words, "--out", str(folder / "out")]
    file = folder / "out/results/small-small.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = {one["key"]: one for one in read_results(file)["runs"]}
    assert 0 < len(done) < 5
    assert ran(folder).exit_code == 0
    ended = {one["key"]: one for one in read_results(file)["runs"]}
    whole = {one["key"]: one for one in read_results(out / "out/results/small-small.json")["runs"]}
    assert {key: one["loss"] for key, one in ended.items()} == {
        key: one["loss"] for key, one in whole.items()
    }
    assert all(ended[key] == one for key, one in done.items())


def test_files_that_are_none_are_named(out: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"runs": [{"method": "ours"}]}')
    work = bench(out)
    with pytest.raises(ConfigError, match=r"bad\.json is no file of results"):
        Bench(work.name, "small", 1, work.data, work.work, bad)
    assert CliRunner().invoke(app, ["bench", "speed"]).exit_code == ConfigError.exit_code


def test_between_evaluations() -> None:
    curve = [(0, 6.0), (100, 4.0), (200, 3.0)]
    assert [loss_at(curve, at) for at in (0, 50, 100, 150, 200, 900)] == [6, 5, 4, 3.5, 3, 3]
    assert tokens_to(curve, 3.5) == 150
    assert tokens_to(curve, 2.9) == math.inf
    assert as_point({"b": 1.0, "a": 2.0}) == (("a", 2.0), ("b", 1.0))
