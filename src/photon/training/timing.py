"""Where the time and memory of local steps go."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field

T = TypeVar("T")

#: No task takes longer, s.
LONGEST_S = 30 * 86_400.0
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True)
class StepTimes:
    """Seconds that some steps spent, by phase; what is left of them is Python between phases.

    Attributes:
        data_s: waiting for text.
        forward_s: model and loss.
        backward_s: gradients, and their exchange among ranks as far as it is not hidden.
        optimizer_s: clipping and the optimizer's step.
    """

    data_s: Seconds = 0.0
    forward_s: Seconds = 0.0
    backward_s: Seconds = 0.0
    optimizer_s: Seconds = 0.0


class PhaseClock:
    """Adds up the time of named phases; on CUDA by events, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`, a field of StepTimes without its unit."""
        if not self._cuda:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
            return
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._pending.append((name, first, last))

    def times(self) -> StepTimes:
        """Totals so far; on CUDA it waits for the last phase to end."""
        for name, first, last in self._pending:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1e3
        self._pending.clear()
        return StepTimes(**{f"{name}_s": seconds for name, seconds in self._seconds.items()})


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held at once: on CUDA by tensors since its statistics were reset, elsewhere by
    this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Not ru_maxrss, which on Linux starts at the peak of the process that forked this one.
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def with_communication_s(step: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `step` gives, and the seconds of its collectives, hidden behind arithmetic or not."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        result = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    microseconds = 0.0
    for event in profile.events() or ():
        if device.type == "cuda" and event.name.startswith("nccl"):
            microseconds += event.device_time_total
        elif device.type != "cuda" and event.name.startswith("gloo:"):
            microseconds += event.cpu_time_total
    return result, microseconds / 1e6
