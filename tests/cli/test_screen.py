"""What commands print: whole, as it is, and never a reason to fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.cli.main import app

ROOT = Path(__file__).parents[2]
#: A name that markup, an emoji code, a terminal and an ASCII one would each make something else of.
ODD = "exp [v2] :bug: [/b] \u2026 naïve"


@pytest.fixture(scope="module")
def run(three_silos, tmp_path_factory):
    """A finished run in a folder of an odd name, and what was printed of it."""
    root = tmp_path_factory.mktemp("screen")
    folder, run_file = root / ODD, root / "run.toml"
    run_file.write_text(
        f"""
model.preset = "tiny"
compute.threads = 1
federation.rounds = 1
local = {{ steps = 1, batch_size = 2 }}
eval.max_tokens = 64
[data]
path = "{three_silos}"
sequence_length = 32
"""
    )
    words = ["simulate", str(run_file), "--run-dir", str(folder)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    return folder, result


def test_paths_and_hashes_are_printed_as_they_are_however_narrow_the_terminal(run, tmp_path):
    folder, result = run
    summary = json.loads((folder / "summary.json").read_text())
    assert f" {folder}\n" in result.stdout
    assert f" {summary['weights_sha256']}\n" in result.stdout
    assert f"photon report '{folder}'\n" in result.stdout
    out = tmp_path / ODD
    exported = CliRunner().invoke(app, ["export", str(folder), "--out", str(out)])
    assert exported.stdout.splitlines()[0] == f"Model: {out}"


def test_errors_name_paths_as_they_are(tmp_path):
    result = CliRunner().invoke(app, ["resume", str(tmp_path / ODD)])
    assert result.exit_code == 42
    assert f"no run in {tmp_path / ODD}:" in result.stderr


def test_no_cell_of_a_table_is_cut(three_silos, tmp_path):
    text = tmp_path / "text"
    names = [f"a-silo-with-a-name-much-longer-than-the-next-{end}" for end in ("one", "two")]
    for name in names:
        (text / name).mkdir(parents=True)
        for number in range(8):
            (text / name / f"{number}.txt").write_text(f"{name} says {number}. " * 40)
    words = ["data", "prepare", "--input", str(text), "--silo-folders", "--out"]
    words += [str(tmp_path / "data"), "--vocab-size", "300"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "60"})
    assert result.exit_code == 0, result.output
    first_column = "".join(
        line.split("│")[1].strip() for line in result.stdout.splitlines() if "│" in line
    )
    assert "…" not in result.stdout
    for name in names:
        assert name in first_column


PRINTS = """
import sys
from photon.cli.screen import console, guard_output, say, show, show_table
guard_output()
show("a result: \\u2026 na\\u00efve \\u4e2d \\udcff")
show_table(("silo", "\\u2013"), [("[red]x[/y]", "\\x1b[2J\\u00e9")])
say("a note \\u2026")
with console().status("working \\u2026"):
    print("x" * 100_000)
sys.stdout.flush()
sys.exit(7)
"""


def printed(tail: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f'"$PYTHON" -c "$CODE" {tail}'],
        env={**os.environ, "PYTHON": sys.executable, "CODE": PRINTS, **environment},
        capture_output=True,
        check=False,
        timeout=120,
    )


def test_an_encoding_without_the_character_spells_it() -> None:
    done = printed("", PYTHONIOENCODING="ascii")
    assert done.returncode == 7, done.stderr
    assert b"a result: ... na\\xefve \\u4e2d \xff\n" in done.stdout
    assert b"a note ...\n" in done.stderr
    assert b"[red]x[/y]" in done.stdout
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize(
    "tail",
    [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", "| true; exit ${PIPESTATUS[0]}"],
)
def test_a_stream_that_takes_nothing_changes_no_exit_code(tail: str) -> None:
    done = printed(tail)
    assert done.returncode == 7, done.stderr
    assert b"Traceback" not in done.stderr
    said = b"standard output is incomplete: No space left on device" in done.stderr
    assert said == (tail == ">/dev/full")


def test_commands_print_through_one_place() -> None:
    for path in (ROOT / "src/photon/cli").glob("*.py"):
        if path.name not in {"screen.py", "bars.py"}:
            assert not re.search(r"\bConsole\(|\bTable\(|(?<![.\w])print\(", path.read_text()), path
