"""Time alone: rounds, paces and failures of a federation in which nothing is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from photon.config import LinkConfig, RunConfig
from photon.config.clock import ClockConfig
from photon.engines.local import LocalEngine
from photon.engines.simulated import SimulatedEngine, SimulatedFleet
from photon.errors import ConfigError
from photon.federation import (
    EvalReceipt,
    EvalTask,
    Federation,
    FitTask,
    Receipt,
    RunState,
    SecureReceipt,
    SecureTask,
    Server,
    Update,
    Version,
)
from photon.federation.tasks import WEIGHTS
from photon.runs.summary import shares_of_time


class _Idle:
    """A participant that learns nothing, at once."""

    def __init__(self, config: RunConfig, bytes_up: int) -> None:
        self._step_tokens = config.local.batch_size * config.data.sequence_length
        self._bytes_up = bytes_up

    def fit(self, task: FitTask, version: Version) -> Update:
        tokens = task.steps * self._step_tokens
        receipt = Receipt(task.round, task.silo, tokens=tokens, bytes_up=self._bytes_up)
        return Update(receipt, lambda: iter([(WEIGHTS + "none", torch.zeros(1))]))

    def evaluate(self, task: EvalTask, version: Version) -> EvalReceipt:
        raise NotImplementedError("nothing was trained, so nothing is scored")

    def agree(self, task: SecureTask) -> SecureReceipt:
        raise NotImplementedError("nothing is learned, so nothing is masked")

    def settle(self) -> None:
        """It keeps nothing."""

    def close(self) -> None:
        """It holds nothing."""


class _Sized(Server):
    """A server of one number that is sent as if it were a whole model."""

    bytes = 0

    def _bytes_down(self, number: int, held: int | None) -> int:
        return 0 if held == number else self.bytes


def study_time(config: RunConfig, clock: ClockConfig) -> dict[str, Any]:
    """Run the rounds of a run file on a clock's time, without learning, data or a run folder.

    Args:
        config: the run file; its [federation] and [local] decide.
        clock: with time_only; names the silos.

    Returns:
        as summary.json has them: rounds, simulated_s, goodput, utilisation, tokens, tokens_lost;
        up_share, the share of time that silos were up, and lost_share, of which was trained in
        attempts that failures ended; updates, merged in all.

    Raises:
        ConfigError: the clock names no silos.
        QuorumLostError: a round had too few updates.
    """
    silos = sorted(name for name in clock.silos if name != "*")
    if not silos:
        raise ConfigError(
            "a clock with time_only names its silos", hint="One table each: [silos.a], [silos.b]."
        )
    size = 4 * clock.parameters
    settings = {"max_update_norm": "none", "merging_rule": "mean", "optimizer_state": "reset"}
    plain = config.having(federation=settings, link=LinkConfig())
    with tempfile.TemporaryDirectory(prefix="photon-study-") as folder:
        state = RunState()
        server = _Sized(plain, Path(folder), {"global": {WEIGHTS + "none": torch.zeros(1)}}, state)
        server.bytes = size
        inner = LocalEngine(_Idle(plain, size))
        engine = SimulatedEngine(inner, clock, silos, Path(folder) / "arrivals", {})
        needed = plain.federation.sample or plain.quorum_of(len(silos))
        fleet = SimulatedFleet(dict.fromkeys(silos, 1), needed, engine, clock)
        loop = Federation(plain, fleet, engine, server, lambda event: None)
        tokens = lost = updates = 0
        while state.global_step < plain.total_steps and not fleet.ended():
            candidates = fleet.drawn_from(state.round + 1)
            if candidates is None:
                break
            closed = loop.round(state, candidates)
            state, costs = closed.after, closed.costs
            tokens, lost = tokens + costs.tokens, lost + costs.tokens_lost
            updates += len(closed.receipts)
    time_s = max(engine.now_s, 1e-9)
    return {
        "rounds": state.round,
        "simulated_s": engine.now_s,
        "tokens": tokens,
        "tokens_lost": lost,
        **shares_of_time(state, time_s, len(silos)),
        "up_share": engine.up_share(),
        "lost_share": engine.lost_s / (len(silos) * time_s),
        "updates": updates,
    }
