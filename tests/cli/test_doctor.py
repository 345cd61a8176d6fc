"""`photon doctor`: words for a person, one JSON object for a script."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import typer
from typer.testing import CliRunner

from photon.cli.doctor import ASSUMED_MFU, doctor
from photon.models import SHAPES
from photon.training import hardware, memory
from photon.training.hardware import Device, inspect_machine

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(doctor)

GIB = 2**30
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, has_bf16=True, capability="9.0")


def run(*words):
    # A wide terminal wraps no cell.
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["--sequence-length", "64", "--vocab-size", "512", *words]
    )


def findings(*words):
    result = run("--json", *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


#: A model's trace, which takes a second, is kept as long as the model, so models are kept.
kept_skeleton = cache(memory.preset_skeleton)


@pytest.fixture(autouse=True)
def two_presets(monkeypatch):
    monkeypatch.setattr("photon.models.SHAPES", {name: SHAPES[name] for name in ("tiny", "75m")})
    monkeypatch.setattr(memory, "preset_skeleton", kept_skeleton)


@pytest.fixture
def machine(monkeypatch):
    """Pretend: another machine, measured at once."""
    here = inspect_machine()

    def pretend(**changes):
        monkeypatch.setattr(hardware, "inspect_machine", lambda: replace(here, **changes))
        monkeypatch.setattr(hardware, "measure_peak", lambda *_, **__: 1e11)

    return pretend


def test_json_is_one_object_and_nothing_else():
    found = findings()
    assert set(found) == {
        "machine",
        "energy",
        "devices",
        "precision",
        "compile",
        "strategies",
        "assumptions",
        "presets",
        "missing",
        "warnings",
    }
    assert found["machine"]["cores"] >= 1
    assert found["devices"][0]["peak_flops"] > 0
    tiny = found["presets"][0]
    assert tiny["preset"] == "tiny"
    assert tiny["fits"]
    peak = found["devices"][0]["peak_flops"] * len(found["devices"])
    assert tiny["estimated_tokens_per_s"] == pytest.approx(
        ASSUMED_MFU * peak / tiny["flops_per_token"]
    )


def test_words_say_what_they_assume(machine):
    machine(disk_free_bytes=3_000_000_000)
    result = run("--optimizer", "muon")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "estimated for muon, 512 tokens of vocabulary and sequences of 64" in text
    assert "not a measurement" in text
    assert "Warnings" not in text
    assert "Warning: Only 3.0 GB of disk are free" in text


def test_eight_h100s(machine):
    machine(
        devices=(H100,) * 8,
        interconnect="NVLink, direct access between all pairs",
        backends=("gloo", "nccl"),
        packages={"flash_attn": False, "triton": True},
    )
    # The measuring of a device that is not here is pretended too.
    found = findings()
    assert found["precision"]["auto_takes"] == "bf16"
    assert found["devices"][0]["peak_flops"] == pytest.approx(989.4e12)
    assert found["devices"][0]["peak_origin"] == "stated"
    assert found["strategies"]["possible"] == ["ddp", "fsdp"]
    assert found["presets"][1]["strategy"] == "ddp"
    assert found["compile"]["available"]
    assert not found["warnings"]


def test_a_model_too_large_for_one_device_is_cut(machine):
    tight = replace(H100, memory_free_bytes=600_000_000)
    machine(devices=(tight,) * 8, interconnect="PCIe, direct access between none")
    rows = {row["preset"]: row for row in findings()["presets"]}
    assert rows["tiny"]["strategy"] == "ddp"
    assert rows["75m"]["strategy"] == "fsdp"


def test_what_does_not_fit_is_said(machine):
    cpu = Device("cpu", "small", 10**9, 900_000_000, has_bf16=False)
    machine(devices=(cpu,), ram_available_bytes=900_000_000)
    found = findings()
    assert [row["fits"] for row in found["presets"]] == [True, False]
    assert "memory_bytes" not in found["presets"][1]
    assert "MB without activations" in " ".join(run().stdout.split())


def test_warnings_name_their_cause(machine, monkeypatch):
    volta = replace(H100, name="Tesla V100-SXM2-16GB", has_bf16=False, capability="7.0")
    machine(devices=(volta, H100), interconnect="PCIe, direct access between none", cores=0)
    warnings = " ".join(findings()["warnings"])
    assert "no bf16 arithmetic" in warnings
    assert "Devices differ" in warnings
    assert "no NCCL" in warnings
    assert "threads on 0 cores" in warnings
    machine()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert any("CUDA build" in words for words in findings()["warnings"])


def test_no_compiler_is_missing(machine):
    machine(compiler=None)
    found = findings()
    assert not found["compile"]["available"]
    assert any("C++ compiler" in words for words in found["missing"])


def test_an_unknown_optimizer_is_refused():
    result = run("--optimizer", "lion")
    assert result.exit_code == 2
    assert "adamw" in result.output


@pytest.mark.parametrize(
    ("device", "bf16_flops", "words"),
    [
        (
            "cpu",
            2.3e11,
            "fp32; bf16's matrix products are 2.3 times as fast as fp32's here, so "
            'compute.precision = "bf16" may',
        ),
        (
            "cpu",
            0.9e11,
            "fp32; bf16's matrix products are 0.9 times as fast as fp32's here, so it would gain",
        ),
        ("cuda", 8e11, "bf16, whose matrix products are 8 times as fast"),
    ],
)
def test_the_line_on_precision_does_not_contradict_itself(
    machine, monkeypatch, device, bf16_flops, words
):
    machine(**({"devices": (H100,)} if device == "cuda" else {}))
    monkeypatch.setattr(
        hardware,
        "measure_peak",
        lambda kind, dtype, **_: bf16_flops if dtype is torch.bfloat16 else 1e11,
    )
    assert words in " ".join(run().stdout.split())


def test_tiny_is_judged_as_it_is_used(machine):
    machine()
    found = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    tiny, larger = found["presets"]
    assert (tiny["sequence_length"], tiny["vocab_size"]) == (128, 4096)
    assert (larger["sequence_length"], larger["vocab_size"]) == (2048, 50_368)
    assert tiny["parameters"] < 2e6
    text = " ".join(CliRunner().invoke(app, []).stdout.split())
    assert "50,368 tokens of vocabulary and sequences of 2,048 (tiny: 4,096 and 128);" in text


def test_a_run_files_tensors_are_told_by_their_role(three_silos, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f"[model]\npreset = 'tiny'\n[data]\npath = '{three_silos}'\n"
        "[parts]\npersonal = ['model.embed*']\nkey = ['*norm*']\n"
    )
    roles = {row["role"]: row for row in findings(str(file))}
    assert roles["personal"]["tensors"] == ["model.embed_tokens.weight"]
    assert roles["personal"]["bytes_a_round"] == 0 < roles["personal"]["bytes_once"]
    assert roles["key"]["bytes_a_round"] == 8 * roles["key"]["parameters"] > 0
    assert roles["frozen"]["tensors"] == []
    shown = run(str(file)).stdout
    assert "model.embed_tokens.weight" in shown
    assert "bytes a round" in shown
