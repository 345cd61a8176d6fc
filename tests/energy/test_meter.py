"""Phases of a process, and what they come to."""

from __future__ import annotations

import os
import threading
import time

import pytest

from photon.config.compute import PowerConfig
from photon.energy.account import JOULES, Power, Spent, process_times
from photon.energy.meter import Meter

WATTS = PowerConfig(core_busy_w=3.0, core_idle_w=1.0, device_busy_w=100.0, device_idle_w=10.0)


def _work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))


def _meter(machine) -> Meter:
    return Meter(machine.packages)


def test_phases_are_all_that_the_process_used(machine):
    meter = _meter(machine)
    meter.take()
    began_s, clock_s = time.process_time(), time.perf_counter()
    with meter.phase("training"):
        _work(0.05)
        with meter.phase("merging"):
            _work(0.1)
        helper = threading.Thread(target=_work, args=(0.05,))
        helper.start()
        helper.join()
    _work(0.03)
    used = meter.take()
    cpu_s, wall_s = time.process_time() - began_s, time.perf_counter() - clock_s
    assert set(used) == {"training", "merging", "other"}
    assert sum(one.cpu_s for one in used.values()) == pytest.approx(cpu_s, abs=2e-3)
    assert sum(one.wall_s for one in used.values()) == pytest.approx(wall_s, abs=5e-3)
    assert used["training"].cpu_s >= 0.1  # with its thread's, without what was inside
    assert used["merging"].cpu_s >= 0.1
    assert used["other"].cpu_s >= 0.03


def test_what_is_taken_is_gone_and_the_rest_stays(machine):
    meter = _meter(machine)
    with meter.phase("training"):
        _work(0.01)
    with meter.phase("idle"):
        pass
    assert set(meter.take("training", "evaluation")) == {"training"}
    assert meter.take("training") == {}
    assert set(meter.take()) == {"idle", "other"}


def test_an_error_leaves_the_phase(machine):
    meter = _meter(machine)
    with pytest.raises(ValueError, match="inside"), meter.phase("training"):
        raise ValueError("inside")
    meter.take()
    _work(0.01)
    assert set(meter.take()) == {"other"}


def test_a_forked_process_begins_with_nothing(machine):
    """Workers are forked from a process that may have used much: none of that is theirs."""
    from photon.energy.meter import METER

    read, write = os.pipe()
    with METER.phase("evaluation"):
        _work(0.05)
        if (child := os.fork()) == 0:
            _work(0.02)
            used = METER.take()
            os.write(write, repr((sorted(used), used["other"].cpu_s < 0.04)).encode())
            os._exit(0)
        os.waitpid(child, 0)
    assert os.read(read, 100) == b"(['other'], True)"
    METER.take()


def test_watts_of_cores_that_work_and_that_wait(machine):
    meter = _meter(machine)
    meter.take()
    with meter.phase("training"):
        _work(0.1)
    with meter.phase("idle"):
        time.sleep(0.1)
    used = {name: meter.take(name)[name] for name in ("training", "idle")}
    meter._charged.update(used)
    spent = Power(WATTS, cores=4).taken("training", "idle", meter=meter)
    assert spent.how == "estimated"
    for name, joules in (("training", spent.training_j), ("idle", spent.idle_j)):
        one = used[name]
        assert joules == pytest.approx(3 * one.cpu_s + 1 * (4 * one.wall_s - one.cpu_s))
    assert spent.training_j > spent.idle_j > 0.39


def test_a_package_is_shared_by_who_works_on_it(machine):
    """Half of the machine's work is another process's: so is that part of the counter."""
    machine.zone("0", "package-0", 100)
    meter = _meter(machine)
    power = Power(WATTS, cores=1, machine_cores=2)
    meter.take()
    with meter.phase("training"):
        _work(0.2)
        machine.zone("0", "package-0", 150)
        machine.work(0.4)
    meter._charged["training"] = used = meter.take()["training"]._replace(cpu_s=0.2, wall_s=0.2)
    assert (used.package_j, used.busy_s) == (pytest.approx(50), pytest.approx(0.4))
    spent = power.taken("training", meter=meter)
    assert spent.how == "measured"
    assert spent.training_j == pytest.approx(25)
    # One that waits for half of that time takes less, by its share of the stated watts.
    meter._charged["training"] = used._replace(cpu_s=0.1)
    assert power.taken("training", meter=meter).training_j == pytest.approx(50 * 0.4 / 1.2)


def test_a_device_is_counted_or_its_watts_are_stated(machine):
    meter = _meter(machine)
    power = Power(WATTS, cores=0, device=0.5)
    meter.take()
    with meter.phase("training"):
        time.sleep(0.05)
    with meter.phase("merging"):
        time.sleep(0.05)
    spent = power.taken(meter=meter)
    assert spent.training_j == pytest.approx(0.5 * 100 * 0.05, rel=0.5)
    assert spent.merging_j == pytest.approx(0.5 * 10 * 0.05, rel=0.5)
    device_j = [1000.0]
    meter.device = lambda: device_j[0]
    meter.take()
    with meter.phase("training"):
        device_j[0] += 40
    spent = power.taken(meter=meter)
    assert spent.training_j == pytest.approx(20, rel=1e-3)
    assert spent.how == "estimated"  # its cores are
    machine.zone("0", "package-0", 0)
    meter.begin_anew()
    meter.device = lambda: device_j[0]
    assert power.taken(meter=meter).how == "measured"


def test_sums_are_as_good_as_their_weakest_part():
    parts = [Spent(how="measured", training_j=1.0), None, Spent(how="estimated", idle_j=2.0)]
    assert Spent.sum(parts) == Spent(how="estimated", training_j=1.0, idle_j=2.0)
    assert Spent.sum([None]) is None
    most = Spent(how="measured", training_j=1e15)
    assert Spent.sum([most, most]) == most
    assert [f"{name}_j" for name in most.by_phase] == list(JOULES)


def test_the_kernel_has_the_same_times_of_this_process():
    cpu_s, age_s = process_times(os.getpid())
    assert cpu_s == pytest.approx(sum(os.times()[:4]), abs=0.05)
    assert age_s >= cpu_s / (os.cpu_count() or 1) - 0.05
    assert process_times(2**22 + 1) == (0.0, 0.0)
