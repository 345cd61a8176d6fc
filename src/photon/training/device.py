"""Which device trains, in which arithmetic, on how many threads: [compute] on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from photon.config import ComputeConfig
from photon.config.compute import PowerConfig
from photon.energy.account import Power
from photon.energy.meter import METER
from photon.errors import DeviceError, IncompatibleConfigError
from photon.freed_memory import keep_freed_memory
from photon.training.ranks import Seat


@dataclass(frozen=True)
class ComputePlan:
    """Where and how one process trains.

    Attributes:
        device: "cpu", "cuda:0" or "mps".
        autocast_dtype: dtype of forward and backward; None computes in fp32.
        threads: CPU threads of this process.
        config: the rest of [compute], as it was asked for.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    threads: int
    config: ComputeConfig = field(default_factory=ComputeConfig)

    @property
    def precision(self) -> str:
        return "fp32" if self.autocast_dtype is None else "bf16"

    @property
    def compiles(self) -> bool:
        """Whether blocks, or the whole model, are compiled."""
        wanted = self.config.compile
        return wanted in ("on", "whole") or (wanted == "auto" and self.device.type == "cuda")

    def apply(self) -> None:
        """Set this process's thread count; on a CPU, let it keep memory between steps."""
        torch.set_num_threads(self.threads)
        if self.device.type == "cpu":
            keep_freed_memory()


def plan_compute(
    section: ComputeConfig, *, processes: int = 1, seat: Seat | None = None
) -> ComputePlan:
    """Resolve [compute] on this machine.

    Args:
        processes: training processes that share the machine's cores.
        seat: this process's place among a node's ranks; on CUDA it picks the device.

    Raises:
        DeviceError: the named device is not here.
        IncompatibleConfigError: bf16 asked of a device that has none.
    """
    device = _device(section.device)
    threads = section.threads or max(1, cores() // max(1, processes))
    if device.type == "cuda":
        device = _cuda_device(seat or Seat())
    return ComputePlan(device, _autocast_dtype(section.precision, device), threads, section)


def nvml_name(device: torch.device | int) -> str:
    """What NVML calls a CUDA device."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def power_of(watts: PowerConfig, plan: ComputePlan, *, sharing: int = 1) -> Power:
    """Of a process with this plan, one of so many that share this machine's devices."""
    if plan.device.type == "cuda":
        METER.watch_device(nvml_name(plan.device))
    devices = max(1, torch.cuda.device_count()) if plan.device.type != "cpu" else 0
    return Power(watts, plan.threads, min(1.0, devices / sharing))


def ranks_of_a_node(section: ComputeConfig, *, workers: int) -> int:
    """Processes that each node trains with: compute.processes, or one for each CUDA device left.

    Args:
        workers: nodes on this machine; 0 and 1 alike have it to themselves.

    Raises:
        DeviceError: the named device is not here.
    """
    if section.processes:
        return section.processes
    if section.strategy == "single" or _device(section.device).type != "cuda":
        return 1
    return max(1, torch.cuda.device_count() // max(1, workers))


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str) -> torch.device:
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(candidate for candidate, present in here.items() if present)
    if not here[name]:
        found = ", ".join(candidate for candidate, present in here.items() if present)
        raise DeviceError(
            f'compute.device = "{name}" is not on this machine (found: {found})',
            hint='Use compute.device = "auto", or install a PyTorch build for that device.',
        )
    return torch.device(name)


def _cuda_device(seat: Seat) -> torch.device:
    count = torch.cuda.device_count()
    if seat.local_rank >= count:
        raise DeviceError(
            f"rank {seat.rank} wants CUDA device {seat.local_rank}, {count} are visible",
            hint="Lower compute.processes or federation.workers, or look at CUDA_VISIBLE_DEVICES.",
        )
    return torch.device("cuda", seat.local_rank)


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    # On CPU, bf16 without matrix units (AMX, AVX512-BF16) is many times slower than fp32.
    gains = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "fp32" or (precision == "auto" and not gains):
        return None
    if device.type == "cuda" and not gains:
        raise IncompatibleConfigError(
            'compute.precision = "bf16": this CUDA device has no bf16 arithmetic',
            hint='Use compute.precision = "auto" or "fp32".',
        )
    return torch.bfloat16
