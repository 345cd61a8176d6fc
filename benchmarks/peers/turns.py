"""The contestant's side: train when told to, say how long it took, sleep meanwhile.

Lines come on standard input: `run N`, `report`, `quit`. One line of JSON answers each of the first
two on what was standard output; anything that a library prints goes to standard error instead.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What every contestant trains, read from the JSON file that its command line names.

    Attributes:
        data: prepared folder; only Photon reads it, by its own stream.
        windows: .npy of [windows, sequence_length + 1] tokens in the order of Photon's stream.
        model: Hugging Face folder with the initial weights.
        compile: torch.compile, each contestant's own way; None leaves it as each is shipped.
        total_steps: of all turns together.
    """

    data: str
    windows: str
    model: str
    sequence_length: int
    batch_size: int
    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    threads: int
    device: str
    precision: str
    compile: bool | None
    total_steps: int
    scratch: str
    seed: int = 0

    @classmethod
    def from_command_line(cls) -> Work:
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


class Turns:
    """Where a contestant waits for its turn.

    A loop that is its own master (a framework's) calls `step_done` after each step and is held in
    there; one that can be called for N steps asks `wait` how many and says `finished`. Make one
    after all imports and before the model exists: memory until then is the imports'.

    Args:
        work: what is trained.
        imports: what is imported besides torch and numpy, for the report.
    """

    def __init__(self, work: Work, imports: str) -> None:
        self._replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._cuda = work.device == "cuda"
        self._left = 0
        self._started = self._cpu_started = 0.0
        self._first: Any = None
        self.last_loss: Any = None
        self.parameters = 0
        self._about = {"imports": imports, "imports_bytes": resident_bytes("VmRSS")}

    def wait(self) -> int:
        """Sleep until the next turn and start the clock.

        Returns:
            Steps of that turn.
        """
        for line in sys.stdin:
            word, *rest = line.split()
            if word == "run":
                self._left = int(rest[0])
                self._synchronize()
                self._started, self._cpu_started = time.perf_counter(), time.process_time()
                return self._left
            if word == "report":
                self._reply(self._report())
            else:
                break
        # From inside a framework's loop there is no other way out that saves and evaluates nothing.
        os._exit(0)

    def finished(self) -> None:
        """Stop the clock and tell it."""
        self._synchronize()
        seconds = time.perf_counter() - self._started
        cpu_seconds = time.process_time() - self._cpu_started
        if self._first is None:
            self._first = self.last_loss
        self._reply({"seconds": seconds, "cpu_seconds": cpu_seconds})

    def step_done(self) -> None:
        """Count a step; at the turn's last one, tell the time and sleep until the next turn."""
        if self._first is None:
            self._first = self.last_loss
        self._left -= 1
        if self._left == 0:
            self.finished()
            self.wait()

    def first_loss(self, loss: float) -> None:
        """For a loop that is called for N steps: the loss of its very first one."""
        if self._first is None:
            self._first = loss

    def _report(self) -> dict[str, Any]:
        peak = resident_bytes("VmHWM")
        if self._cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
        return self._about | {
            "peak_bytes": peak,
            "first_loss": float(self._first),
            "last_loss": float(self.last_loss),
            "parameters": self.parameters,
        }

    def _reply(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._replies, flush=True)

    def _synchronize(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM (the peak) of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage first: on Linux ru_maxrss starts at the peak of the process that forked.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parameter_count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
