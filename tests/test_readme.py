"""README's tour is true: its commands, its run file and its Python run as printed."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.cli.main import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

#: Shrinks the run to seconds; everything else is as printed.
SMALL = ["federation.rounds=2", "local.steps=2", "local.batch_size=2", "compute.threads=1"]


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL).group(1)


@pytest.mark.slow
def test_the_tour(tmp_path, monkeypatch, write_corpus):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "speeches", {"any": 40})
    Path("run.toml").write_text(block("toml"))
    tour = README[README.index("Monday to Friday") :]
    commands = re.findall(
        r"^    photon (.*)$", tour[: tour.index("`photon data prepare` reads")], re.M
    )
    assert [command.split()[0] for command in commands] == [
        "data",
        "simulate",
        "report",
        "export",
        "generate",
    ]
    for command in commands:
        words = shlex.split(command)
        if words[0] == "simulate":
            words += [word for pair in SMALL for word in ("--set", pair)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "runs/first/report.html").exists()
    assert "Fellow citizens" in result.output

    python = block("python").replace('"run.toml", [', '"run.toml", ["run.name=again", ')
    for pair in SMALL[1:]:
        python = python.replace('["run.name', f'["{pair}", "run.name')
    python = python.replace('"my-model"', '"my-model-2"')
    space: dict = {}
    exec(compile(python, "README.md", "exec"), space)
    assert len(space["table"]["loss"]) > 2
    assert (tmp_path / "my-model-2/config.json").exists()
