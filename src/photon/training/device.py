"""Which device trains, in which arithmetic, on how many threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from photon.config import ComputeConfig
from photon.errors import DeviceError, IncompatibleConfigError


@dataclass(frozen=True)
class ComputePlan:
    """Where and how local training runs.

    Attributes:
        device: "cpu", "cuda" or "mps".
        autocast_dtype: dtype of forward and backward under autocast; None computes in fp32.
        threads: CPU threads of one training process.
        micro_batch_size: sequences per forward pass; None takes the whole batch.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    threads: int
    micro_batch_size: int | None = None

    @property
    def precision(self) -> str:
        return "fp32" if self.autocast_dtype is None else "bf16"

    def apply(self) -> None:
        """Set this process's thread count."""
        torch.set_num_threads(self.threads)


def plan_compute(section: ComputeConfig, *, processes: int = 1) -> ComputePlan:
    """Resolve compute.device, compute.precision and compute.threads on this machine.

    Args:
        section: the [compute] table.
        processes: training processes that share the machine's cores.

    Raises:
        DeviceError: the named device is not here.
        IncompatibleConfigError: bf16 asked of a device that has none.
    """
    device = _device(section.device)
    threads = section.threads or max(1, _cores() // max(1, processes))
    return ComputePlan(
        device,
        _autocast_dtype(section.precision, device),
        threads,
        section.micro_batch_size,
    )


def _cores() -> int:
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
