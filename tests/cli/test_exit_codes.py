"""Bad input: the numbered exit, the culprit named, and no folder left half-made."""

import json
import os
import resource
import shutil

import pytest
import torch
from typer.testing import CliRunner

from photon.cli.main import app
from photon.link import write_tensors
from photon.training.hardware import memory_of

RUN = """
[run]
name = "codes"
seed = 2
[compute]
threads = 1

[model]
preset = "tiny"
[data]
path = "{data}"
sequence_length = 32
[federation]
rounds = 2
[local]
steps = 2
batch_size = 2
[eval]
max_tokens = 500
"""


@pytest.fixture
def run_file(three_silos, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(data=three_silos))
    return path


@pytest.fixture(scope="module")
def finished(three_silos, tmp_path_factory):
    """A finished run; tests work on copies of it."""
    root = tmp_path_factory.mktemp("finished")
    (root / "run.toml").write_text(RUN.format(data=three_silos))
    result = photon("simulate", root / "run.toml", "--run-dir", root / "run", "--quiet")
    assert result.exit_code == 0, result.output
    return root / "run"


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy with its last round to be run again."""
    folder = tmp_path / "unfinished"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints/round-000002")
    (folder / "summary.json").unlink()
    return folder


def photon(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def places(tmp_path):
    """Names that no run folder can have."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    return {
        "a file": tmp_path / "file",
        "in a file": tmp_path / "file" / "run",
        "a dangling link": tmp_path / "link",
        "over-long": tmp_path / ("x" * 300),
        "not UTF-8": tmp_path / os.fsdecode(b"caf\xe9"),
    }


@pytest.mark.parametrize(
    "kind", ["a file", "in a file", "a dangling link", "over-long", "not UTF-8"]
)
def test_a_run_folder_that_can_not_be_is_told_before_the_work(places, kind, run_file):
    result = photon("simulate", run_file, "--run-dir", places[kind], "--quiet")
    assert result.exit_code == 40, result.output
    assert "can't be a run folder: " in result.stderr
    assert "--run-dir" in result.stderr
    assert str(places[kind]).encode(errors="backslashreplace").decode() in result.stderr


@pytest.mark.parametrize("out", [".", "/", "folder"])
def test_a_report_is_no_folder(finished, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    result = photon("report", finished, "--out", out)
    assert result.exit_code == 50
    assert result.stderr.startswith(f"error: {out}: Is a directory")


def test_a_pipe_or_device_is_not_replaced_by_a_report(finished, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = photon("report", finished, "--out", pipe)
    assert result.exit_code == 50
    assert result.stderr.startswith(f"error: {pipe}: Not a regular file")
    assert pipe.is_fifo()


def test_what_the_system_refuses_is_one_sentence_unless_asked_for_more(finished):
    words = ("report", finished, "--out", "/proc/report.html")
    result = photon(*words)
    assert result.exit_code == 50
    assert result.stderr.startswith("error: /proc/")
    assert "Traceback" not in result.stderr
    assert "Traceback" in photon("--verbose", *words).stderr
    assert "Traceback" in photon("--verbose", "resume", "nowhere").stderr


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("local.step=3", 11, ["local.step", "Did you mean local.steps?"]),
        ("steps=3", 11, ["steps", "local.steps"]),
        ("local.steps=0", 12, ["local.steps", "0", "greater than or equal to 1"]),
        ("local.lr=fast", 12, ["local.lr", "fast", "number"]),
        ("outer.name=fedavgg", 12, ["outer.name", "fedavgg", "fedyogi"]),
        ("federation.sample=4", 13, ["federation.sample = 4", "3 silos"]),
        ("federation.quorum=4", 13, ["federation.quorum = 4", "3"]),
        ("compute.micro_batch_size=3", 13, ["micro_batch_size = 3", "batch_size = 2"]),
        ("local.warmup_steps=4", 13, ["warmup_steps = 4", "4 global steps"]),
        ("data.path=nowhere", 21, ["nowhere", "photon data prepare"]),
        ("data.sequence_length=1000000", 23, ["blue", "data.sequence_length = 1000000"]),
        ("data.mixture.prose=1.0", 13, ["prose", "text"]),
        ("run.keep_checkpoints=1000000000", 51, ["GB", "free"]),
        ("compute.processes=3", 13, ["a batch of 2 sequences", "3 ranks"]),
        ("compute.strategy=fsdp", 13, ['"fsdp" needs more than one rank', "compute.processes"]),
        ("local.no_decay=['*nothing*']", 13, ["*nothing*", "no parameter"]),
    ],
)
def test_a_wrong_key_or_value(run_file, tmp_path, override, code, words):
    result = photon("simulate", run_file, "--run-dir", tmp_path / "run", "--set", override)
    output = " ".join(result.output.split())
    assert result.exit_code == code, output
    for word in words:
        assert word in output, (word, output)
    assert not (tmp_path / "run").exists()


def test_a_missing_or_broken_run_file(tmp_path):
    assert photon("simulate", tmp_path / "no.toml").exit_code == 10
    (tmp_path / "broken.toml").write_text("[run\n")
    assert photon("simulate", tmp_path / "broken.toml").exit_code == 10
    assert photon("simulate").exit_code == 2
    assert photon("simulat").exit_code == 2


def test_a_corrupt_shard_is_refused_before_training(run_file, three_silos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(three_silos, data)
    shard = next((data / "silos/green").glob("train*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[7] ^= 64
    shard.write_bytes(bytes(raw))
    words = ["simulate", run_file, "--run-dir", tmp_path / "run", "--set", f"data.path={data}"]
    result = photon(*words)
    assert result.exit_code == 24
    assert "green" in result.output
    assert shard.name in result.output.replace("\n", "")
    assert not (tmp_path / "run").exists()


def test_a_model_with_too_small_a_vocabulary(run_file, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(
        vocab_size=100,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    run_file.write_text(
        run_file.read_text().replace('preset = "tiny"', f'path = "{tmp_path / "gpt2"}"')
    )
    result = photon("simulate", run_file, "--run-dir", tmp_path / "run")
    assert result.exit_code == 25, result.output
    assert "100" in result.output
    assert "300" in result.output


def test_runs_that_exist_or_do_not(run_file, finished, tmp_path):
    again = photon("simulate", run_file, "--run-dir", finished)
    assert "Loading PyTorch" not in again.stderr
    assert again.exit_code == 41
    assert "photon resume" in again.output
    for command in ("resume", "report"):
        missing = photon(command, tmp_path / "nothing")
        assert missing.exit_code == 42, command
        assert "nothing" in missing.output
    assert photon("export", tmp_path / "nothing", "--out", tmp_path / "hf").exit_code == 42


def test_text_cut_by_another_tokenizer_is_not_scored(finished, one_silo, tmp_path):
    """Of the same size, as by default: the figures would look fine."""
    exported = tmp_path / "hf"
    assert photon("export", finished, "--out", exported).exit_code == 0
    for model in (finished, exported):
        result = photon("eval", model, "--data", one_silo, "--max-tokens", "100")
        assert result.exit_code == 25, result.output
        assert "another tokenizer" in result.output


def test_a_misspelt_folder_is_never_looked_up_on_the_hub(three_silos, monkeypatch):
    def looked_up(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", looked_up)
    for words in (["eval", "runs/frist", "--data", three_silos], ["generate", "runs/frist"]):
        result = photon(*words)
        assert result.exit_code == 30, result.output
        assert "no run or model in runs/frist" in result.output


def test_resume_of_a_finished_run_says_what_it_reached(finished):
    before = (finished / "events.jsonl").read_bytes()
    result = photon("resume", finished, "--json", "--quiet")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["rounds"] == 2
    assert (finished / "events.jsonl").read_bytes() == before


def test_resume_with_a_changed_model(unfinished):
    config = unfinished / "config.resolved.toml"
    config.write_text(config.read_text().replace('family = "llama"', 'family = "mpt"'))
    result = photon("resume", unfinished)
    assert result.exit_code == 31
    assert "another model" in result.output


def test_resume_with_changed_data(unfinished, one_silo, three_silos, tmp_path):
    result = photon("resume", unfinished, "--set", f"data.path={one_silo}")
    assert result.exit_code in (22, 45), result.output
    other = tmp_path / "other"
    shutil.copytree(three_silos, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    result = photon("resume", unfinished, "--set", f"data.path={other}")
    assert result.exit_code == 45
    assert "is not what this run started with" in " ".join(result.output.split())


def test_resume_may_not_change_the_maths(unfinished):
    result = photon("resume", unfinished, "--set", "local.optimizer=sgd")
    assert result.exit_code == 45
    assert "local.optimizer can't change" in " ".join(result.output.split())


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(finished, unfinished):
    expected = json.loads((finished / "summary.json").read_text())
    newest = unfinished / "checkpoints/round-000002"
    shutil.copytree(finished / "checkpoints/round-000002", newest)
    write_tensors(newest / "global.safetensors", {"x": torch.zeros(3)})
    result = photon("resume", unfinished, "--quiet", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert "sha256" in (unfinished / "events.jsonl").read_text()


def test_without_a_good_checkpoint_the_run_is_lost_and_says_so(unfinished):
    for state in unfinished.glob("checkpoints/*/state.json"):
        state.write_text("{")
    result = photon("resume", unfinished)
    assert result.exit_code == 43
    assert "state.json" in result.output


def test_a_silo_that_is_not_there(run_file, tmp_path):
    words = ["train", run_file, "--run-dir", tmp_path / "run", "--silo", "purple"]
    result = photon(*words)
    assert result.exit_code == 22
    assert "purple" in result.output
    assert "blue" in result.output
    assert not (tmp_path / "run").exists()


def test_text_with_a_single_document_can_not_be_a_silo(tmp_path):
    (tmp_path / "one.txt").write_text("Only one document here.")
    out = tmp_path / "data"
    result = photon("data", "prepare", "--input", tmp_path / "one.txt", "--out", out)
    assert result.exit_code == 22
    assert "holds a single document" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(run_file, tmp_path):
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = photon(
        "simulate",
        run_file,
        "--run-dir",
        tmp_path / "run",
        "--set",
        "model.preset=7b",
    )
    output = " ".join(result.output.split())
    _, free = memory_of(torch.device("cpu"))
    if free > 80e9:
        pytest.skip(f"7b fits into the {free / 1e9:.0f} GB that are free here")
    assert result.exit_code == 53, output
    assert "too much" in output
    assert "model.preset" in output
    assert not (tmp_path / "run").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 1_000_000  # KiB
