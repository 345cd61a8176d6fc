"""Joules of what was used, and a run's account of them. docs/energy.md has the formulas."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from photon.config.compute import EnergyConfig, PowerConfig
from photon.energy.counters import Packages
from photon.energy.meter import METER, Meter, Used
from photon.telemetry.events import How

KWH_J = 3.6e6

#: From the best word to the weakest; a sum is as good as its weakest part.
_HOW: tuple[How, ...] = ("measured", "estimated", "modelled")
#: More than a power station gives in a week.
_MOST_J = 1e15
Joules = Annotated[float, Field(ge=0, le=_MOST_J, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Joules by phase: local steps; held-out text; clip, noise and codec; updates into a version;
    waiting for others; all else.

    Attributes:
        how: "measured" if all of it comes from counters, "estimated" from stated watts and the
            time that processes used; "modelled" from neither.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    how: How
    training_j: Joules = 0.0
    evaluation_j: Joules = 0.0
    privacy_j: Joules = 0.0
    merging_j: Joules = 0.0
    idle_j: Joules = 0.0
    other_j: Joules = 0.0

    @property
    def by_phase(self) -> dict[str, float]:
        return {name.removesuffix("_j"): vars(self)[name] for name in JOULES}

    @classmethod
    def sum(cls, parts: Iterable[Spent | None]) -> Spent | None:
        """Of those that are known; None where none is."""
        known = [vars(one) for one in parts if one is not None]
        sums = {name: min(_MOST_J, sum(one[name] for one in known)) for name in JOULES}
        how = max((one["how"] for one in known), key=_HOW.index, default=None)
        return cls(how=how, **sums) if how is not None else None


JOULES = tuple(name for name in vars(Spent(how="modelled")) if name != "how")


@dataclass(frozen=True)
class Power:
    """What a process's use comes to.

    Attributes:
        cores: that the process has for itself, busy or not; 0 where they are other processes'.
        device: the share of a device that it has.
        machine_cores: of the whole machine, which a package's counter counts.
    """

    watts: PowerConfig
    cores: float
    device: float = 0.0
    machine_cores: int = os.cpu_count() or 1

    def taken(self, *phases: str, meter: Meter = METER) -> Spent:
        """What the meter has of these phases, or of all; it begins anew."""
        counted, joules = bool(meter.packages.readable), dict[str, float]()
        for name, used in meter.take(*phases).items():
            busy, watts = name in ("training", "evaluation"), self.watts
            device_j = used.wall_s * (watts.device_busy_w if busy else watts.device_idle_w)
            device_j = self.device * (used.device_j if meter.device else device_j)
            joules[f"{name}_j"] = device_j + self.cores_j(used, used.wall_s * self.cores, counted)
        counted &= meter.device is not None or not self.device
        return Spent(how="measured" if counted else "estimated", **joules)

    def cores_j(self, used: Used, core_s: float, counted: bool) -> float:
        """Of core_s core-seconds, used.cpu_s at work, by stated watts; these only say what part of
        it is ours where packages are counted."""
        busy_w, idle_w = self.watts.core_busy_w, self.watts.core_idle_w
        own_j = max(0.0, (busy_w - idle_w) * used.cpu_s + idle_w * core_s)
        if not counted:
            return own_j
        all_j = (busy_w - idle_w) * used.busy_s + idle_w * used.wall_s * self.machine_cores
        return used.package_j * min(1.0, own_j / all_j if all_j > 0 else 1.0)


def figures(state: Mapping[str, Any], config: EnergyConfig) -> dict[str, Any]:
    """What a run took, as summary.json has it, from what its RunState has: kWh in all and by phase,
    how known, carbon."""
    untold = state["energy_untold"]
    moved = sum(state[f"bytes_{way}"] for way in ("up", "down", "inside"))
    words = [state["energy"]["how"], *(["communication modelled"] if moved else [])]
    words += [f"{untold} answers came without figures"] if untold else []
    kwh = {name: joules / KWH_J for name, joules in Spent(**state["energy"]).by_phase.items()}
    kwh["communication"] = moved / 1e9 * config.network_kwh_per_gb
    total, carbon = sum(kwh.values()), config.carbon_g_per_kwh
    said = {"kwh": total, "how": ", ".join(words), "kwh_by_phase": kwh}
    return said if carbon is None else {**said, "carbon_g": total * carbon}


def witness() -> Callable[[Power, Iterable[int], int], float]:
    """A run's joules counted another way, from now on: by the kernel's account of its processes,
    from outside and at once, where phases are charged one by one by the processes themselves.

    Returns:
        To be asked with this process's power, ids of its others, and how many cores each has.
    """
    packages = Packages()

    def now() -> Used:
        each = [resource.getrusage(one) for one in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu_s = sum(one.ru_utime + one.ru_stime for one in each)
        return Used(cpu_s, time.monotonic(), packages.joules(), packages.busy_s())

    def joules(power: Power, others: Iterable[int], cores: int) -> float:
        lived = [process_times(pid) for pid in others]
        used = now().plus(began, -1).plus(Used(sum(cpu_s for cpu_s, _ in lived)))
        core_s = used.wall_s * power.cores + cores * sum(age_s for _, age_s in lived)
        return power.cores_j(used, core_s, bool(packages.readable))

    began = now()
    return joules


def process_times(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, ended children included, and its age, s; zeros: no /proc has it."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    ticks, now_s = os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME)
    return sum(map(int, told[11:15])) / ticks, now_s - int(told[19]) / ticks
