import time

import pytest
import torch

from photon.main_memory import main_memory
from photon.training import hardware
from photon.training.hardware import (
    STATED_PEAKS,
    inspect_machine,
    measure_peak,
    mfu,
    stated_peak,
)


@pytest.mark.parametrize(
    ("name", "bf16_tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_most_specific_product_wins(name, bf16_tera):
    peak = stated_peak(name)
    assert peak is not None
    assert peak.flops("bf16") == pytest.approx(bf16_tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H20",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_what_is_unknown_is_not_guessed(name):
    assert stated_peak(name) is None


def test_volta_has_fp16_and_no_bf16():
    peak = stated_peak("Tesla V100-SXM2-16GB")
    assert peak is not None
    assert peak.flops("bf16") is None
    assert peak.flops("tf32") is None
    assert peak.flops("fp16") == 125e12


def test_every_stated_peak_is_plausible():
    assert len({peak.name for peak in STATED_PEAKS}) == len(STATED_PEAKS)
    for peak in STATED_PEAKS:
        assert 1 < peak.fp32 < 200, peak.name
        assert peak.half >= peak.fp32, peak.name
        if peak.tf32:
            assert 0.48 < peak.tf32 / peak.half < 0.52, peak.name


def test_a_measured_peak_is_real_and_quick():
    started = time.process_time()
    flops = measure_peak("cpu", torch.float32, seconds=0.1)
    emulated = measure_peak("cpu", torch.bfloat16, seconds=0.1)
    # Emulated bf16 may be a hundred times slower; the products shrink and the time does not grow.
    assert time.process_time() - started < 5
    assert 1e8 < flops < 1e15
    assert 1e7 < emulated < 1e15


def test_mfu_is_model_flops_over_peak():
    assert mfu(1000, 4e9, 1e13) == pytest.approx(0.4)


def test_this_machine():
    machine = inspect_machine()
    assert machine.torch == torch.__version__
    assert machine.cores >= 1
    assert 0 < machine.ram_available_bytes <= machine.ram_total_bytes
    assert machine.disk_free_bytes > 0
    assert len(machine.devices) >= 1
    assert "gloo" in machine.backends
    for device in machine.devices:
        assert 0 < device.memory_free_bytes <= device.memory_total_bytes


def fake_root(tmp_path, cgroup, files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    800 kB\n"
    )
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return tmp_path


def test_memory_without_a_limit(tmp_path):
    root = fake_root(tmp_path, "0::/\n", {"memory.max": "max\n", "memory.current": "5\n"})
    assert main_memory(root) == (1000 * 1024, 800 * 1024)


def test_a_containers_limit_counts(tmp_path):
    root = fake_root(tmp_path, "0::/\n", {"memory.max": "500000\n", "memory.current": "200000\n"})
    assert main_memory(root) == (500_000, 300_000)


def test_the_tightest_ancestor_counts(tmp_path):
    root = fake_root(
        tmp_path,
        "0::/job/step\n",
        {
            "job/memory.max": "400000\n",
            "job/memory.current": "390000\n",
            "job/step/memory.max": "max\n",
            "job/step/memory.current": "1\n",
        },
    )
    assert main_memory(root) == (400_000, 10_000)


def test_the_older_cgroups_count_too(tmp_path):
    root = fake_root(
        tmp_path,
        "9:name=systemd:/\n4:cpu,memory:/job\n",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "7\n",
            "memory/job/memory.limit_in_bytes": "300000\n",
            "memory/job/memory.usage_in_bytes": "100000\n",
        },
    )
    assert main_memory(root) == (300_000, 200_000)


def test_cxx_names_the_compiler(tmp_path, monkeypatch):
    program = tmp_path / "my-c++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert hardware._compiler() is None
    monkeypatch.setenv("CXX", "my-c++")
    assert hardware._compiler() == str(program)


def test_nvlink_is_read_from_nvidia_smi(tmp_path):
    program = tmp_path / "nvidia-smi"
    for table, found in (("GPU0  X  NV18\nLegend: NV# links", True), ("GPU0 X PHB NV#", False)):
        program.write_text(f"#!/bin/sh\nprintf '{table}'\n")
        program.chmod(0o755)
        assert hardware._nvlinks(str(program)) is found
    assert hardware._nvlinks(None) is False
