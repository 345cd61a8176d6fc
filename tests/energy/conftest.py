"""A machine's counters, made of files that a test sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.energy.counters import Packages


class Machine:
    """Folders as /sys/class/powercap has them, and /proc/stat of two cores.

    Attributes:
        packages: opens counters of it.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.stat = root / "powercap", root / "stat"
        self.root.mkdir()
        self.work(0)

    def zone(self, number: str, name: str, joules: float, most_j: float = 1000.0) -> Path:
        """Sets a counter."""
        zone = self.root / f"intel-rapl:{number}"
        zone.mkdir(exist_ok=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{round(most_j * 1e6)}\n")
        (zone / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
        return zone

    def work(self, busy_s: float) -> None:
        """Sets for how long all cores have worked: user, nice, system, idle, iowait, irq, soft."""
        ticks = round(busy_s * 100)
        told = [ticks - 3, 0, 1, 999, 888, 1, 1, 0, 0, 0] if ticks else [0, 0, 0, 999, 888, 0, 0, 0]
        self.stat.write_text(f"cpu  {' '.join(map(str, told))}\ncpu0 1 2 3\n")

    def packages(self) -> Packages:
        return Packages(self.root, self.stat)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)
