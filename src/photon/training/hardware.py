"""What this machine is: cores, memory, devices and their peaks, and what is there to use them."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from photon.main_memory import main_memory
from photon.training.device import cores
from photon.version import photon_version


@dataclass(frozen=True)
class StatedPeak:
    """Dense TFLOP/s of a device as its data sheet states them (no sparsity, fp32 accumulation).

    Attributes:
        name: the product, as matched.
        half: tensor cores, in fp16; in bf16 too from Ampere on.
        tf32: None before Ampere.
        fp32: outside tensor cores.
    """

    name: str
    half: float
    tf32: float | None
    fp32: float

    def flops(self, precision: str) -> float | None:
        """FLOP/s in "bf16", "fp16", "tf32" or "fp32"; None where it has no such tensor cores."""
        bf16 = self.half if self.tf32 else None
        known = {"bf16": bf16, "fp16": self.half, "tf32": self.tf32, "fp32": self.fp32}
        tera = known[precision]
        return tera and tera * 1e12


#: NVIDIA's data sheets, half of the figure "with sparsity" where only that is printed. GeForce:
#: the architecture white papers' figures with fp32 accumulation.
STATED_PEAKS: tuple[StatedPeak, ...] = (
    StatedPeak("B200", 2250, 1125, 75),
    StatedPeak("GH200", 989.4, 494.7, 66.9),
    StatedPeak("H200 NVL", 835.5, 417.5, 60),
    StatedPeak("H200", 989.4, 494.7, 66.9),
    StatedPeak("H100 PCIe", 756, 378, 51),
    StatedPeak("H100 NVL", 835.5, 417.5, 60),
    StatedPeak("H100", 989.4, 494.7, 66.9),
    StatedPeak("H800 PCIe", 756, 378, 51),
    StatedPeak("H800", 989.4, 494.7, 66.9),
    StatedPeak("A100", 312, 156, 19.5),
    StatedPeak("A800", 312, 156, 19.5),
    StatedPeak("L40S", 362, 183, 91.6),
    StatedPeak("L40", 181, 90.5, 90.5),
    StatedPeak("L4", 121, 60, 30.3),
    StatedPeak("RTX 6000 Ada", 364.2, 182.1, 91.1),
    StatedPeak("RTX A6000", 154.8, 77.4, 38.7),
    StatedPeak("A10G", 70, 35, 31.5),
    StatedPeak("A10", 125, 62.5, 31.2),
    StatedPeak("RTX 5090", 209.5, 104.8, 104.8),
    StatedPeak("RTX 4090", 165.2, 82.6, 82.6),
    StatedPeak("RTX 3090", 71, 35.6, 35.6),
    StatedPeak("V100-PCIE", 112, None, 14),
    StatedPeak("V100", 125, None, 15.7),
    StatedPeak("T4", 65, None, 8.1),
)

# Products of the same number on another chip, and slices of one.
_OTHER_CHIPS = re.compile(r"laptop|max-q|\bmobile\b|\bMIG\b|4090 D|5090 D|3090 Ti", re.IGNORECASE)


def stated_peak(device_name: str) -> StatedPeak | None:
    """The data sheet of a device by the name that torch.cuda.get_device_name gives; None unknown.

    The most specific product wins: "NVIDIA H100 PCIe" is not the SXM module, which calls itself
    "NVIDIA H100 80GB HBM3". Laptop chips and MIG slices are unknown, not guessed.
    """
    if _OTHER_CHIPS.search(device_name):
        return None
    for peak in sorted(STATED_PEAKS, key=lambda peak: -len(peak.name)):
        # Whole words: A10 is not A100, L4 is not L40.
        if re.search(rf"(?<!\w){re.escape(peak.name)}(?!\w)", device_name, re.IGNORECASE):
            return peak
    return None


def measure_peak(
    device: torch.device | str, dtype: torch.dtype = torch.float32, *, seconds: float = 0.2
) -> float:
    """FLOP/s of the fastest of some square matrix products: measured, not stated.

    On a CPU it uses the threads that torch is set to, and other processes' load lowers it. It takes
    roughly so many seconds; products grow as far as they allow.
    """
    device = torch.device(device)
    size = 1024 if device.type == "cuda" else 128
    largest = 8192 if device.type == "cuda" else 1024
    best, until = 0.0, time.perf_counter() + seconds
    while True:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.matmul(left, right)
        took_s = min(_product_s(left, right) for _ in range(3))
        best = max(best, 2 * size**3 / took_s)
        # Emulated bf16 is so slow that a larger product would take seconds; it would tell no more.
        if size < largest and 32 * took_s < seconds:
            size *= 2
        if time.perf_counter() > until:
            return best


def _product_s(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    torch.matmul(left, right)
    _wait(left.device)
    return time.perf_counter() - started


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of peak that model FLOPs (training/flops.py) reach.

    Args:
        tokens_per_s: trained, of all the devices that `peak_flops` adds up.
        peak_flops: FLOP/s in the arithmetic that is used.
    """
    return tokens_per_s * flops_per_token / peak_flops


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU as the place where training runs.

    Attributes:
        memory_total_bytes, memory_free_bytes: its own memory; the machine's for cpu and mps.
        has_bf16: whether bf16 arithmetic is in hardware and pays.
        capability: of CUDA, e.g. "9.0"; None elsewhere.
    """

    type: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    has_bf16: bool
    capability: str | None = None


@dataclass(frozen=True)
class Machine:
    """What `inspect_machine` found.

    Attributes:
        cores: that this process may use.
        ram_total_bytes, ram_available_bytes: of the machine, or of the cgroup where it is less.
        disk_free_bytes: where runs are written, the current folder.
        devices: accelerators; the CPU where there are none.
        interconnect: between CUDA devices, in words; None with fewer than two.
        backends: of torch.distributed.
        compiler: C++ compiler that torch.compile finds for a CPU; None without.
        packages: optional ones, by whether they are installed.
    """

    python: str
    torch: str
    photon: str
    system: str
    cores: int
    ram_total_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    devices: tuple[Device, ...]
    interconnect: str | None
    backends: tuple[str, ...]
    compiler: str | None
    packages: dict[str, bool]


def memory_of(device: torch.device) -> tuple[int, int]:
    """Total and free bytes of a device; of main memory where the device has none of its own."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return main_memory()


def inspect_machine() -> Machine:
    """Look at this machine; takes well under a second and changes nothing."""
    total, available = main_memory()
    return Machine(
        python=platform.python_version(),
        torch=torch.__version__,
        photon=photon_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        ram_total_bytes=total,
        ram_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        devices=_devices(total, available),
        interconnect=_interconnect(),
        backends=tuple(filter(dist.is_backend_available, ("gloo", "nccl", "mpi"))),
        compiler=_compiler(),
        packages={name: find_spec(name) is not None for name in ("flash_attn", "triton")},
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _devices(ram_total: int, ram_available: int) -> tuple[Device, ...]:
    if torch.cuda.is_available():
        return tuple(_cuda_device(index) for index in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        return (Device("mps", "Apple GPU", ram_total, ram_available, has_bf16=False),)
    told = ""
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text()
    # Without AMX or AVX512-BF16 it is emulated, many times slower than fp32.
    has_bf16 = re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", told) is not None
    found = re.search(r"^model name\s*:\s*(.*\S)", told, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return (Device("cpu", name, ram_total, ram_available, has_bf16=has_bf16),)


def _cuda_device(index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    # As torch.cuda.is_bf16_supported(including_emulation=False), but of this very device.
    return Device(
        "cuda", torch.cuda.get_device_name(index), total, free, major >= 8, f"{major}.{minor}"
    )


def _interconnect() -> str | None:
    count = torch.cuda.device_count()
    if count < 2:
        return None
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    peers = sum(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
    direct = "all pairs" if peers == len(pairs) else f"{peers} of {len(pairs)} pairs"
    links = _nvlinks(shutil.which("nvidia-smi"))
    return f"{'NVLink' if links else 'PCIe'}, direct access between {direct if peers else 'none'}"


def _nvlinks(program: str | None) -> bool:
    if program is None:
        return False
    asked = [program, "topo", "-m"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    # A cell NV18 means eighteen links; the legend says NV#.
    return re.search(r"\bNV\d+\b", done.stdout) is not None


def _compiler() -> str | None:
    names = (os.environ.get("CXX") or "g++", "g++", "clang++")
    return next(filter(None, map(shutil.which, names)), None)
