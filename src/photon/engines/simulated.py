"""Real learning on simulated time: who answers when is worked out, not waited for.

A task takes its silo's latency and line for the version, its steps, and the line again for the
update; where the silo fails meanwhile, the task is begun anew once it is up. Time is a number that
`arrivals` moves to the next answer. The same clock gives the same times, so a run is deterministic.
"""

from __future__ import annotations

import csv
import math
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from photon.config.clock import ClockConfig
from photon.errors import ConfigError
from photon.federation import (
    Answer,
    Candidates,
    Engine,
    EvalReceipt,
    FitTask,
    Mailbox,
    Task,
    Update,
    Version,
)
from photon.link import TensorFile, write_tensors

_MBIT = 1e6 / 8

#: Updates of so many bytes wait in memory, larger ones on disk.
_SMALL = 1 << 20


@dataclass(frozen=True)
class Times:
    """Of a task, in simulated seconds.

    Attributes:
        due_s: when its answer is here.
        down_s, train_s, up_s: of the attempt that came through.
        lost_s: trained in attempts that failures ended.
    """

    due_s: float
    down_s: float
    train_s: float
    up_s: float
    lost_s: float


class Failures:
    """When each silo is down: [begin, end) in simulated seconds, in order.

    Args:
        clock: what they are drawn from, or the trace's file.
    """

    def __init__(self, clock: ClockConfig) -> None:
        self._clock = clock
        self._trace = _read_trace(clock.failures.trace) if clock.failures.trace else None
        self._drawn: dict[str, tuple[Iterator[tuple[float, float]], list[tuple[float, float]]]] = {}

    def after(self, silo: str, time_s: float) -> tuple[float, float]:
        """The first failure that ends after this time; (inf, inf) where there is none."""
        if silo not in self._drawn:
            self._drawn[silo] = (self._of(silo), [])
        coming, known = self._drawn[silo]
        while not known or known[-1][1] <= time_s:
            known.append(next(coming, (math.inf, math.inf)))
        return known[bisect_right(known, time_s, key=lambda failure: failure[1])]

    def until(self, silo: str, time_s: float) -> Iterator[tuple[float, float]]:
        """The failures that begin before this time."""
        return takewhile(lambda failure: failure[0] < time_s, self._of(silo))

    def _of(self, silo: str) -> Iterator[tuple[float, float]]:
        own = self._clock.of(silo)
        last_s = math.inf if own.until_s is None else own.until_s
        if own.from_s:
            yield 0.0, own.from_s
        for begin_s, end_s in self._failing(silo):
            if begin_s >= last_s:
                break
            if end_s > own.from_s:
                yield max(begin_s, own.from_s), end_s
        if last_s < math.inf:
            yield last_s, math.inf

    def _failing(self, silo: str) -> Iterator[tuple[float, float]]:
        failures = self._clock.failures
        if self._trace is not None:
            yield from self._trace.get(silo, [])
        elif failures.mean_up_s is not None:
            draw = np.random.default_rng([failures.seed, zlib.crc32(silo.encode())])
            time_s = 0.0
            while True:
                time_s += draw.exponential(failures.mean_up_s)
                length_s = draw.exponential(failures.mean_down_s)
                yield time_s, time_s + length_s
                time_s += length_s


class SimulatedEngine:
    """Another engine's answers, each when its time has come.

    Args:
        engine: does what is asked; scores take no simulated time.
        clock: of the silos.
        silos: all that may take part.
        spool: folder of updates that wait for their turn; removed at the end.
        state: what `clock` said when a checkpoint was written.
    """

    def __init__(
        self,
        engine: Engine,
        clock: ClockConfig,
        silos: Sequence[str],
        spool: Path,
        state: dict[str, Any],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._failures = Failures(clock)
        self._silos = silos
        self._spool = spool
        shutil.rmtree(spool, ignore_errors=True)
        self.processes = len(silos)
        #: Trained in attempts that failures ended, of tasks that came through all the same.
        self.lost_s: float = state.get("lost_s", 0.0)
        self.now_s: float = state.get("now_s", 0.0)
        self._bytes_up: int = state.get("bytes_up", 0)
        self._begun = {tuple(key): Times(**times) for key, times in state.get("begun", [])}
        self._held: dict[str, int] = state.get("held", {})
        self._going: dict[Task, tuple[Version, Times]] = {}
        self._mailbox = Mailbox(engine)
        self._scoring = 0

    def clock(self) -> dict[str, Any]:
        """What a resume needs: the time, and who answers when."""
        begun = [
            [[task.round, task.silo], asdict(times)] for task, (_, times) in self._going.items()
        ]
        return {
            "now_s": self.now_s,
            "bytes_up": self._bytes_up,
            "begun": begun,
            "held": self._held,
            "lost_s": self.lost_s,
        }

    def up(self, silo: str) -> bool:
        """Whether a silo is there now."""
        return self._failures.after(silo, self.now_s)[0] > self.now_s

    def wait(self, silos: Sequence[str]) -> bool:
        """Let time pass until another of these silos is up; whether one ever is."""
        ends = (self._failures.after(silo, self.now_s) for silo in silos)
        next_s = min((end for begin, end in ends if begin <= self.now_s), default=math.inf)
        self.now_s = max(self.now_s, next_s) if next_s < math.inf else self.now_s
        return next_s < math.inf

    def up_share(self) -> float:
        """Of all silos' time until now, in which they were up."""
        down_s = sum(
            min(end, self.now_s) - begin
            for silo in self._silos
            for begin, end in self._failures.until(silo, self.now_s)
        )
        return 1 - down_s / max(len(self._silos) * self.now_s, 1e-9)

    def submit(self, task: Task, version: Version) -> None:
        if not isinstance(task, FitTask):
            self._engine.submit(task, version)
            self._scoring += 1
            return
        times = self._begun.pop((task.round, task.silo), None) or self._times(task, version)
        self._going[task] = (version, times)
        if self._engine.processes > 1:  # they may as well begin
            self._engine.submit(task, version)

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        if self._scoring:
            came = self._engine.arrivals()
            self._scoring -= len(came)
            # What this machine took says nothing of machines that the clock makes up.
            return [
                (task, replace(at, energy=None) if isinstance(at, EvalReceipt) else at)
                for task, at in came
            ]
        first = min(self._going, key=lambda task: self._going[task][1].due_s, default=None)
        last_s = math.inf if timeout_s is None else self.now_s + timeout_s
        due_s = self._going[first][1].due_s if first is not None else math.inf
        if due_s > last_s or due_s == math.inf:
            self.now_s = last_s if last_s < math.inf else self.now_s
            return []
        assert first is not None
        self.now_s = max(self.now_s, due_s)
        version, times = self._going.pop(first)
        self.lost_s += times.lost_s
        answer = self._answer(first, version)
        if self._going and answer.receipt.failure is None:
            answer = self._kept(first, version, answer)
        simulated = {"train_s": times.train_s, "load_s": times.down_s, "publish_s": times.up_s}
        receipt = replace(answer.receipt, **simulated, energy=None)
        self._bytes_up = receipt.bytes_up or self._bytes_up
        return [(first, replace(answer, receipt=receipt))]

    def cancel(self, task: Task) -> str:
        self._going.pop(task, None)
        self._engine.cancel(task)
        return ""

    def settle(self) -> None:
        self._engine.settle()
        self.now_s += self._clock.merge_s

    def close(self) -> None:
        self._engine.close()
        shutil.rmtree(self._spool, ignore_errors=True)

    def _kept(self, task: Task, version: Version, update: Update) -> Update:
        """A copy: it may have to wait for its turn while others train in the same memory."""
        if sum(tensor.nbytes for tensor in version.tensors.values()) <= _SMALL:
            here = [(name, tensor.clone()) for name, tensor in update.tensors()]
            return replace(update, tensors=lambda: iter(here), packed=None)
        path = self._spool / f"{task.round}-{task.silo}.safetensors"
        self._spool.mkdir(parents=True, exist_ok=True)
        write_tensors(path, dict(update.tensors()), durable=False)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            with TensorFile(path) as file:
                yield from file.named_tensors()

        def let_go() -> None:
            path.unlink(missing_ok=True)
            update.let_go()

        return replace(update, tensors=tensors, packed=None, let_go=let_go)

    def _answer(self, task: Task, version: Version) -> Update:
        if self._engine.processes <= 1:
            self._engine.submit(task, version)
        ((_, answer),) = self._mailbox.take([task])
        assert isinstance(answer, Update)
        return answer

    def _times(self, task: FitTask, version: Version) -> Times:
        own, silo = self._clock.of(task.silo), task.silo
        down_s = own.latency_s + version.bytes_down(self._held.get(silo)) / own.down_mbit_s / _MBIT
        self._held[silo] = version.number
        up_bytes = self._bytes_up or version.bytes_down(None)
        up_s = own.latency_s + up_bytes / own.up_mbit_s / _MBIT
        train_s, begin_s, lost_s = task.steps * own.step_s, self.now_s, 0.0
        while True:
            fails_s, again_s = self._failures.after(silo, begin_s)
            due_s = max(begin_s, 0.0) + down_s + train_s + up_s
            if fails_s >= due_s:
                return Times(due_s, down_s, train_s, up_s, lost_s)
            lost_s += min(max(0.0, fails_s - begin_s - down_s), train_s)
            begin_s = again_s
            if begin_s == math.inf:
                return Times(math.inf, down_s, train_s, up_s, lost_s)


@dataclass(frozen=True)
class SimulatedFleet:
    """Silos that come and go with a clock.

    Attributes:
        tokens: to train on, by silo.
        needed: fewest that a round begins with; others are waited for.
    """

    tokens: dict[str, int]
    needed: int
    engine: SimulatedEngine
    clock: ClockConfig

    def drawn_from(self, round_number: int) -> Candidates | None:
        while True:
            if self.clock.failures.asked == "all":
                return Candidates(self.tokens)
            up = {silo: count for silo, count in self.tokens.items() if self.engine.up(silo)}
            if len(up) >= self.needed:
                return Candidates(up)
            if not self.engine.wait([silo for silo in self.tokens if silo not in up]):
                return None

    def ended(self) -> bool:
        """Whether the clock's own end has come."""
        return self.clock.until_s is not None and self.engine.now_s >= self.clock.until_s

    def lost(self, round_number: int) -> bool:
        return False

    def present(self) -> list[str]:
        return sorted(self.tokens)


def _read_trace(path: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                begin_s, end_s = float(row["down_s"]), float(row["up_s"])
                if not 0 <= begin_s < end_s:
                    raise ValueError(f"line {row} does not end after it begins")
                found.setdefault(row["silo"], []).append((begin_s, end_s))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the failure trace {path} can't be read: {error!r}",
            hint="It has the columns silo, down_s, up_s: seconds since the run began.",
        ) from error
    return {silo: sorted(spans) for silo, spans in found.items()}
