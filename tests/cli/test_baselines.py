"""`photon tree RUN.toml --baselines` on tiny text."""

import json
import re

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import resolved_toml
from photon.telemetry import read_history
from photon.telemetry.events import RunStarted

CHOSEN = ("flat FL", "mean in attention's place", "local only", "centralised")
OVERRIDES = (
    "parts.key=['last:0.4']",
    "parts.key_rule=attention",
    "federation.rounds=2",
    "federation.children.east={silos=['blue','green'], rounds=2}",
    "eval.every=0",
    "eval.max_tokens=300",
)


@pytest.fixture(scope="module")
def world(three_silos, make_config, tmp_path_factory):
    """The command as it was called, its run folder, and what it printed."""
    folder = tmp_path_factory.mktemp("world")
    file = folder / "run.toml"
    file.write_text(resolved_toml(make_config(three_silos, *OVERRIDES)))
    words = ["tree", str(file), "--run-dir", str(folder / "run"), "--quiet"]
    words += [word for name in CHOSEN for word in ("--only", name)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return words, folder / "run", result.output


def started(folder):
    return read_history(folder).of(RunStarted)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_each_method_has_run_beside_the_tree(world):
    _, run, _ = world
    found = sorted(path.parent.relative_to(run) for path in run.glob("baselines/**/run.json"))
    assert [str(one) for one in found] == [
        "baselines/centralised",
        "baselines/flat-FL",
        *(f"baselines/local-only/{silo}" for silo in ("blue", "green", "red")),
        "baselines/mean-in-attentions-place",
    ]
    flat, alone = run / "baselines/flat-FL", run / "baselines/local-only/red"
    assert summary(flat)["tokens"] == summary(run)["tokens"] == 3 * summary(alone)["tokens"]
    assert started(flat)[0].rounds == started(run)[0].rounds == 2
    assert started(flat)[0].participants_per_round == 3
    assert started(run)[0].participants_per_round == 2


def test_it_ends_with_each_leaf_by_method(world):
    _, run, told = world
    lines = [re.split(r"  +", line.strip()) for line in told.splitlines()]
    at = next(i for i, line in enumerate(lines) if line[0] == "perplexity")
    assert lines[at] == ["perplexity", "mean", "blue", "green", "red"]
    table = {line[0]: line[1:] for line in lines[at + 1 : at + 2 + len(CHOSEN)]}
    assert set(table) == {"this run", *CHOSEN}
    of = {"this run": run, "flat FL": run / "baselines/flat-FL"}
    for label, folder in of.items():
        scores = [summary(folder)["per_silo"][silo] for silo in ("blue", "green", "red")]
        assert [float(cell) for cell in table[label][1:]] == pytest.approx(scores, rel=0.01)
    red = summary(run / "baselines/local-only/red")["per_silo"]["red"]
    assert float(table["local only"][3]) == pytest.approx(red, rel=0.01)
    page = (run / "report.html").read_text()
    assert "Perplexity in each leaf, beside other runs" in page
    assert "Whom attention heard" in page


def test_what_is_done_is_not_done_again_and_what_is_missing_is(world):
    words, run, _ = world
    flat, alone = run / "baselines/flat-FL", run / "baselines/local-only/red"
    before = summary(flat)
    (alone / "summary.json").unlink()  # as after Ctrl-C in its last round
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["perplexity"]
    assert list(told) == ["this run", *CHOSEN]
    assert set(told["flat FL"]) == {"mean", "blue", "green", "red"}
    assert summary(flat) == before
    assert len(started(flat)) == 1
    assert len(started(alone)) == 2
    assert (alone / "summary.json").exists()


def test_the_file_is_refused_before_anything_runs(world, tmp_path):
    words, _, _ = world
    fresh = [str(tmp_path / "new") if word.rpartition("/")[2] == "run" else word for word in words]
    for more, code, why in (
        (["--only", "magic"], 2, "no baseline is called 'magic'"),
        (["--set", "parts={}"], 13, "parts.key"),
    ):
        result = CliRunner().invoke(app, [*fresh, *more])
        assert result.exit_code == code
        assert why in result.output
    assert not (tmp_path / "new").exists()
