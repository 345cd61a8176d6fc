"""`photon init`: what it writes is read by the real loader, and its two commands run as printed."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.cli.screen import program
from photon.config import RunConfig, load_run_config


def photon(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of an odd name with what `photon init` wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("init") / 'a "first" [run]'
    result = photon("init", folder)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_the_run_file_is_read_and_names_every_table(made):
    folder, _ = made
    config = load_run_config(folder / "run.toml")
    assert config.data.path == str(folder / "data")
    assert config.run.name == "a-first-run"
    text = (folder / "run.toml").read_text()
    assert set(re.findall(r"^(?:# )?\[(\w+)\]", text, re.MULTILINE)) == set(RunConfig.model_fields)
    for line in text.splitlines():
        assert not line or line.startswith(("[", "#")) or "#" in line or "lr = 1.0" in line, line


def test_keys_that_are_commented_out_work_once_they_are_not(made, tmp_path):
    folder, _ = made
    text = re.sub(r"^# (?=\[|[a-z_]+ = )", "", (folder / "run.toml").read_text(), flags=re.M)
    text = text.replace('preset = "tiny"', "")
    (tmp_path / "all.toml").write_text(text)
    config = load_run_config(tmp_path / "all.toml")
    assert config.model.path == "my-model"
    assert config.serve.min_silos == 2


def test_its_two_commands_can_be_pasted(made):
    # tests/test_readme.py runs them.
    folder, printed = made
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  photon ")]
    text, data = str(folder / "text"), str(folder / "data")
    assert commands == [
        ["photon", "data", "prepare", "--input", text, "--silo-folders", "--out", data],
        ["photon", "simulate", str(folder / "run.toml")],
    ]


def test_commands_are_those_that_this_shell_can_call(tmp_path, monkeypatch):
    # As `make demo` calls it, before anybody has activated the environment.
    monkeypatch.setattr("sys.argv", [".venv/bin/photon", "init"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == ".venv/bin/photon"
    assert program("tensorboard") == ".venv/bin/tensorboard"
    (tmp_path / "photon").touch(mode=0o755)
    assert program() == "photon"


def test_it_is_small_and_replaces_nothing(made):
    folder, _ = made
    silos = {path.name: list(path.iterdir()) for path in (folder / "text").iterdir()}
    assert sorted(silos) == ["language", "library", "packages"]
    for texts in silos.values():
        assert len(texts) > 15
        assert 150_000 < sum(path.stat().st_size for path in texts) <= 300_000
    before = (folder / "run.toml").read_text()
    again = photon("init", folder)
    assert again.exit_code == 41
    assert "run.toml is there already" in again.stderr
    assert (folder / "run.toml").read_text() == before


def test_where_nothing_can_be_written_one_sentence_says_so(tmp_path):
    (tmp_path / "file").touch()
    result = photon("init", tmp_path / "file")
    assert result.exit_code == 50
    assert str(tmp_path / "file") in result.stderr
