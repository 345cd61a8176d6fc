"""The commands as a person or a script calls them."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from photon.cli.main import app
from photon.evaluation import HeldOutScore
from photon.products import Evaluation
from photon.runs import load_weights
from photon.telemetry import read_history

COMMANDS = [
    ["simulate"],
    ["train"],
    ["resume"],
    ["report"],
    ["export"],
    ["eval"],
    ["generate"],
    ["demo"],
    ["doctor"],
    ["profile"],
    ["data", "prepare"],
    ["data", "show"],
]


def photon(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run_file(three_silos, tmp_path_factory):
    path = tmp_path_factory.mktemp("commands") / "run.toml"
    path.write_text(
        f"""
[run]
name = "commands"
[compute]
threads = 1

[model]
preset = "tiny"
[data]
path = "{three_silos}"
sequence_length = 32
[federation]
rounds = 3
[local]
steps = 3
batch_size = 4
optimizer = "muon"
lr = 1e-2
"""
    )
    return path


@pytest.fixture(scope="module")
def run(run_file):
    """A finished run, and what `--json` printed of it."""
    folder = run_file.parent / "run"
    result = photon("simulate", run_file, "--run-dir", folder, "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def pooled(run_file):
    """A finished centralised run, and what `--json` printed of it."""
    folder = run_file.parent / "central"
    result = photon("train", run_file, "--run-dir", folder, "--json", "-q")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def exported(run):
    out = run[0].parent / "hf"
    result = photon("export", run[0], "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_by_example(command):
    result = photon(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert "photon" in result.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["simulate"], "The run file, TOML."),
        (["data", "show"], "Folder made by"),
        (["members", "suspend"], "The member's name"),
        (["init"], "Folder for both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_says_what_arguments_are(command, words):
    assert words in photon(*command, "--help").stdout


def test_help_lists_commands_in_the_order_of_use():
    listed = photon("--help").stdout
    places = [listed.index(f" {name} ") for name in ("init", "data", "simulate", "serve", "join")]
    assert places == sorted(places)
    for option in ("--version", "--verbose"):
        assert option in listed
    assert photon("--version").stdout == photon("version").stdout


def test_a_misspelt_command_gets_one_suggestion():
    refused = CliRunner().invoke(app, ["siumlate"])
    assert refused.exit_code == 2
    assert refused.output.count("Did you mean") == 1
    assert "'simulate'" in refused.output


def test_json_is_one_object_on_stdout_and_the_view_is_on_stderr(run):
    folder, summary = run
    assert summary["run_dir"] == str(folder)
    written = json.loads((folder / "summary.json").read_text())
    assert {key: value for key, value in summary.items() if key != "run_dir"} == written
    assert (folder / "config.resolved.toml").exists()
    assert list((folder / "tensorboard").rglob("events.*"))


def test_default_folder_and_overrides(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["simulate", run_file, "--quiet", "--json", "--set", "federation.rounds=1"]
    result = photon(*words, "--set", "run.name=other", "--set", "local.steps=1")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rounds"] == 1
    assert (tmp_path / "runs/other/summary.json").exists()


def test_one_silo_alone_takes_its_own_steps(run_file, run, pooled, tmp_path):
    folder = tmp_path / "alone"
    result = photon("train", run_file, "--run-dir", folder, "--silo", "red", "--json", "-q")
    alone = json.loads(result.stdout)
    assert alone["tokens"] * 3 == run[1]["tokens"]
    assert pooled[1]["tokens"] == run[1]["tokens"]
    assert pooled[1]["bytes_up"] == 0


def test_a_run_ends_with_its_silos_and_a_baseline_that_can_be_run(run):
    folder, _ = run
    told = photon("resume", folder, "-q").stdout  # of a finished run: what it ended with
    assert "more than bf16 models every round" in told  # not "0.5 times less"
    for silo in ("blue", "green", "red"):
        assert re.search(rf"^ {silo} +\d+\.?\d* +\d\.\d{{3}}", told, re.M)
    for step in ("report", "generate", "export", "eval"):
        assert f"photon {step} {folder}" in told
    assert f"tensorboard --logdir {folder}/tensorboard" in told
    assert (folder / "tensorboard").is_dir()
    line = re.search(r"photon (train .*)$", told, re.M)
    assert line is not None
    alone = photon(*shlex.split(line.group(1)), "--json", "-q")
    assert alone.exit_code == 0, alone.output
    assert json.loads(alone.stdout)["tokens"] == run[1]["tokens"]  # of one silo, as many
    beside = re.search(r"photon (report .* --compare .*)$", told, re.M)
    assert beside is not None
    assert photon(*shlex.split(beside.group(1))).exit_code == 0


def test_a_report_compares(run, pooled):
    result = photon("report", run[0], "--compare", f"centralised={pooled[0]}")
    assert result.exit_code == 0, result.output
    page = (run[0] / "report.html").read_text()
    assert "centralised" in page
    assert f"{run[1]['global_perplexity']:.0f}"[:2] in page
    assert photon("report", run[0], "--compare", "nonsense").exit_code == 2


def test_an_infinity_in_a_checkpoint_keeps_no_run_from_its_summary_and_report(run, tmp_path):
    folder = tmp_path / "poisoned"
    shutil.copytree(run[0], folder)
    state = max((folder / "checkpoints").iterdir()) / "state.json"
    poisoned = json.loads(state.read_text()) | {"local_train_s": math.inf}
    state.write_text(json.dumps(poisoned))
    (folder / "summary.json").unlink()
    result = photon("resume", folder, "--json", "-q")
    assert result.exit_code == 0, result.output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["local_train_s"], summary["train_share"]) == (None, None)
    assert summary["weights_sha256"] == run[1]["weights_sha256"]
    assert "Infinity" not in (folder / "events.jsonl").read_text()
    assert photon("report", folder).exit_code == 0


def test_evaluation_agrees_with_the_run_and_with_the_export(run, exported, three_silos):
    folder, summary = run
    scores = json.loads(photon("eval", folder, "--data", three_silos, "--json").stdout)
    assert scores["global"]["perplexity"] == pytest.approx(summary["global_perplexity"])
    assert scores["global"]["bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    for silo, perplexity in summary["per_silo"].items():
        assert scores["per_silo"][silo]["perplexity"] == pytest.approx(perplexity)
    words = ["eval", exported, "--data", three_silos, "--json", "--sequence-length", "32"]
    again = json.loads(photon(*words).stdout)
    assert again["global"]["loss"] == pytest.approx(scores["global"]["loss"], rel=1e-6)
    table = photon("eval", folder, "--data", three_silos)
    assert "global" in table.stdout
    assert "red" in table.stdout


def test_scores_that_are_no_figures_are_told_as_such(monkeypatch, tmp_path):
    """A model that diverged, and text that its tokenizer does not know."""
    odd = Evaluation(
        HeldOutScore(loss=1e4, perplexity=math.inf, bits_per_byte=None, tokens=5), per_silo={}
    )
    monkeypatch.setattr("photon.products.evaluate", lambda *_, **__: odd)
    shown = photon("eval", tmp_path, "--data", tmp_path).stdout
    assert "diverged" in shown
    assert "No bits per byte: too much of the text is unknown" in " ".join(shown.split())
    told = json.loads(photon("eval", tmp_path, "--data", tmp_path, "--json").stdout)
    assert told["global"] == {
        "loss": 1e4, "perplexity": None, "bits_per_byte": None, "tokens": 5,
    }  # fmt: skip


def test_exported_logits_are_ours(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, _ = load_weights(run[0])
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("The bank serves the river of 1812.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "The bank serves the river of 1812."
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs(ids).logits)
    card = (exported / "README.md").read_text()
    assert run[1]["weights_sha256"] in card
    assert "simulate (a federation on one machine)" in card
    assert "silos: 3" in card
    started = read_history(run[0]).started.started_at
    assert f"begun on {started[:10]}" in card
    second = photon("export", run[0], "--out", exported)
    assert second.exit_code == 30
    assert "already exists" in second.output


def test_an_export_needs_the_run_folder_only(run, three_silos, tmp_path):
    """The data may be elsewhere by then."""
    hidden = three_silos.rename(three_silos.with_name("hidden"))
    try:
        result = photon("export", run[0], "--out", tmp_path / "hf")
    finally:
        hidden.rename(three_silos)
    assert result.exit_code == 0, result.output


def test_generation_is_the_same_from_run_and_export_and_seeded(run, exported):
    words = ["--prompt", "The bank", "--max-new-tokens", "20"]
    first = photon("generate", run[0], *words).stdout
    assert first == photon("generate", exported, *words).stdout
    assert first.startswith("The bank")
    assert len(first) > len("The bank") + 10
    assert first != photon("generate", run[0], *words, "--seed", "5").stdout


def test_data_show_and_partitions(three_silos, tmp_path):
    shown = json.loads(photon("data", "show", three_silos, "--verify", "--json").stdout)
    assert sorted(shown["silos"]) == ["blue", "green", "red"]
    text = three_silos.parent / "text"
    for option, value, count in [
        ("--iid", 4, 4),
        ("--dirichlet", "3:10", 3),
        ("--contiguous", 2, 2),
    ]:
        out = tmp_path / option.strip("-")
        words = ["data", "prepare", "--input", text, option, value, "--out", out]
        result = photon(*words, "--vocab-size", "300", "--json")
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["silos"]) == count
    both = ["data", "prepare", "--input", text, "--iid", "2", "--contiguous", "2"]
    result = photon(*both, "--out", tmp_path / "both")
    assert result.exit_code == 13
    assert "--iid and --contiguous" in result.output


@pytest.mark.parametrize("family", ["mpt", "gpt2", "gpt2 pretrained"])
def test_other_models_train_export_and_reload(run_file, tmp_path, family):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    text = run_file.read_text()
    if family == "mpt":
        text = text.replace('preset = "tiny"', 'preset = "tiny"\nfamily = "mpt"')
    else:
        config = GPT2Config(
            vocab_size=304,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
        init = "pretrained" if "pretrained" in family else "random"
        text = text.replace('preset = "tiny"', f'path = "{tmp_path / "gpt2"}"\ninit = "{init}"')
    (tmp_path / "run.toml").write_text(text)
    words = ["simulate", tmp_path / "run.toml", "--run-dir", tmp_path / "run", "-q"]
    result = photon(*words, "--set", "federation.rounds=2", "--set", "local.steps=2")
    assert result.exit_code == 0, result.output
    assert photon("export", tmp_path / "run", "--out", tmp_path / "hf").exit_code == 0
    ours, _ = load_weights(tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


def test_nothing_is_asked_of_the_network(run_file, three_silos, tmp_path):
    """Invariant 8: an audit hook sees every connection and look-up the process attempts."""
    script = """
import sys
reached = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        reached.append((event, str(args[-1] if event == "socket.connect" else args[0])))
sys.addaudithook(hook)
from photon.cli.main import app
import typer
for words in COMMANDS:
    try:
        app(words, standalone_mode=False)
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.2)
except OSError:
    pass
assert reached, "the hook does not see connections, so this test shows nothing"
assert len(reached) <= 2 and all("127.0.0.1" in place for _, place in reached), reached
"""
    text = three_silos.parent / "text"
    prepare = ["data", "prepare", "--input", str(text), "--iid", "2", "--vocab-size", "300"]
    prepare += ["--out", str(tmp_path / "data")]
    simulate = ["simulate", str(run_file), "--run-dir", str(tmp_path / "run"), "-q"]
    simulate += ["--set", "federation.rounds=1", "--set", "local.steps=1"]
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]
    script = script.replace("COMMANDS", repr([prepare, simulate, export]))
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_time_is_simulated_as_a_clock_says(run_file, tmp_path):
    clock = tmp_path / "clock.toml"
    clock.write_text('[silos."*"]\nstep_s = 2.0\n[silos.red]\nstep_s = 7.0\n')
    words = ("--run-dir", tmp_path / "run", "--set", "federation.rounds=1", "--clock", clock)
    told = photon("simulate", run_file, *words)
    assert told.exit_code == 0, told.output
    assert "simulated time" in told.output
    assert "goodput" in told.output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 3 * 7.0 < summary["simulated_s"] < 3 * 7.0 + 1
    clock.write_text('time_only = true\n[silos.a]\n[silos.b]\nstep_s = "fast"\n')
    refused = photon("simulate", run_file, "--clock", clock)
    assert refused.exit_code == 12
    assert "silos.b.step_s" in refused.output
    clock.write_text("time_only = true\nparameters = 1000\n[silos.a]\n[silos.b]\n")
    told = photon("simulate", run_file, "--clock", clock, "--json")
    assert json.loads(told.stdout)["rounds"] == 3
