"""Counters of energy that this machine has: RAPL of its CPU packages, NVML of an NVIDIA device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

POWERCAP, STAT = Path("/sys/class/powercap"), Path("/proc/stat")


class Packages:
    """All CPU packages of this machine and their memory.

    Args:
        root: of intel-rapl:N/{name,energy_uj,max_energy_range_uj}; AMD's are called so too.
        stat: of the time that all its cores were busy.

    Attributes:
        readable, hidden: names of counters, and of those that only root may read.
    """

    def __init__(self, root: Path = POWERCAP, stat: Path = STAT) -> None:
        self.readable, self.hidden = list[str](), list[str]()
        self._stat, self._total_uj = stat, 0
        self._last: dict[Path, tuple[int, int]] = {}
        for zone in sorted(root.glob("intel-rapl:*")):
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):  # core and uncore are part of a package
                continue
            try:
                most_uj = int((zone / "max_energy_range_uj").read_text())
                self._last[zone / "energy_uj"] = int((zone / "energy_uj").read_text()), most_uj
                self.readable.append(name)
            except OSError:
                self.hidden.append(name)

    def joules(self) -> float:
        """Since this object was made; to be asked before a counter turns over twice."""
        for path, (last_uj, most_uj) in self._last.items():
            now_uj = int(path.read_text())
            self._total_uj += now_uj - last_uj + (most_uj if now_uj < last_uj else 0)
            self._last[path] = now_uj, most_uj
        return self._total_uj / 1e6

    def busy_s(self) -> float:
        """Core-seconds that all processes of this machine worked; 0 without counters."""
        if not self.readable:
            return 0.0
        *busy, _idle, _waits, irq, softirq = map(int, self._stat.read_text().split()[1:8])
        return sum([*busy, irq, softirq]) / os.sysconf("SC_CLK_TCK")


def device_counter(
    uuid: str, load: Callable[[str], ctypes.CDLL] = ctypes.CDLL
) -> Callable[[], float] | None:
    """Joules of an NVIDIA device ("GPU-...") since its driver was loaded; None: it can't tell."""
    device, total_mj = ctypes.c_void_p(), ctypes.c_ulonglong()
    with suppress(OSError, AttributeError):  # no driver, or one that knows no such function
        nvml = load("libnvidia-ml.so.1")
        read, nothing = nvml.nvmlDeviceGetTotalEnergyConsumption, nvml.nvmlInit_v2()
        nothing = nothing or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device))
        if not nothing and not read(device, ctypes.byref(total_mj)):
            return lambda: (read(device, ctypes.byref(total_mj)), total_mj.value / 1e3)[1]
    return None


def counters_here(devices: Iterable[str]) -> dict[str, list[str]]:
    """What can be read, of packages and these devices, and what only root may read."""
    packages, counted = Packages(), [one for one in devices if device_counter(one)]
    return {"counted": packages.readable + counted, "hidden": packages.hidden}
