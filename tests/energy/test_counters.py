"""RAPL's files as the kernel gives them, and NVML's functions as a driver has them."""

from __future__ import annotations

import ctypes

import pytest

from photon.energy.counters import Packages, device_counter


def test_packages_and_their_memory_are_added_and_parts_of_a_package_are_not(machine):
    machine.zone("0", "package-0", 100)
    machine.zone("0:0", "core", 60)
    machine.zone("0:1", "dram", 10)
    machine.zone("1", "package-1", 40)
    machine.zone("2", "psys", 500)
    packages = machine.packages()
    assert sorted(packages.readable) == ["dram", "package-0", "package-1"]
    assert packages.joules() == 0
    for number, name, joules in (("0", "package-0", 103), ("0:0", "core", 99), ("0:1", "dram", 11)):
        machine.zone(number, name, joules)
    machine.zone("2", "psys", 900)
    assert packages.joules() == pytest.approx(4)


def test_a_counter_that_turned_over_goes_on(machine):
    machine.zone("0", "package-0", 990, most_j=1000)
    packages = machine.packages()
    for joules, since in ((999, 9), (5, 15), (6, 16), (2, 1012)):
        machine.zone("0", "package-0", joules, most_j=1000)
        assert packages.joules() == pytest.approx(since)


def test_a_counter_that_may_not_be_read_is_named(machine):
    zone = machine.zone("0", "package-0", 1)
    (zone / "energy_uj").unlink()
    (zone / "energy_uj").mkdir()  # as root reads all files
    packages = machine.packages()
    assert (packages.readable, packages.hidden) == ([], ["package-0"])
    assert (packages.joules(), packages.busy_s()) == (0, 0)


def test_a_machine_without_counters_says_nothing(tmp_path):
    packages = Packages(tmp_path / "none", tmp_path / "none")
    assert (packages.readable, packages.hidden, packages.joules()) == ([], [], 0)


def test_cores_at_work_are_all_but_idle_and_waiting(machine):
    machine.zone("0", "package-0", 1)
    machine.work(12.5)
    assert machine.packages().busy_s() == pytest.approx(12.5)


class _Nvml:
    """libnvidia-ml as far as it is called; `broken` names the function that fails."""

    def __init__(self, broken: str = "") -> None:
        self.total_mj, self.broken = 5_000, broken

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return int(self.broken == "init")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: object) -> int:  # noqa: N802
        assert uuid == b"GPU-1"
        return int(self.broken == "handle")

    def nvmlDeviceGetTotalEnergyConsumption(self, device: object, total: object) -> int:  # noqa: N802
        ctypes.cast(total, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.total_mj
        return 3 if self.broken == "energy" else 0


def test_a_device_is_asked_for_all_it_took():
    nvml = _Nvml()
    joules = device_counter("GPU-1", lambda _: nvml)
    assert joules is not None
    assert joules() == 5.0
    nvml.total_mj = 7_500
    assert joules() == 7.5


@pytest.mark.parametrize("broken", ["init", "handle", "energy"])
def test_a_device_that_can_not_tell_is_estimated(broken):
    assert device_counter("GPU-1", lambda _: _Nvml(broken)) is None


def test_a_machine_without_a_driver_has_no_device_counter():
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    assert device_counter("GPU-1", missing) is None


def test_a_real_device_counts_upwards():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA device: NVML is only tried against stated functions here")
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    joules = device_counter(uuid)
    if joules is None:
        pytest.skip("this device has no counter of energy: older than Volta, or a part of one")
    before = joules()
    weights = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        weights = torch.tanh(weights @ weights)
    torch.cuda.synchronize()
    assert joules() > before
