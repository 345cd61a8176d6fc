"""Where a run stands, folded from its events: what the live and the plain view show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from photon.telemetry import Event, events

SiloState = Literal["waiting", "training", "done", "dropped"]

#: Finished rounds that the time left is estimated from, and that the history can show.
_REMEMBERED = 16


@dataclass
class SiloProgress:
    """One participant of the current round; loss in nats per token."""

    name: str
    state: SiloState = "waiting"
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    note: str = ""


class RoundRow(NamedTuple):
    """A finished round, as the history shows it."""

    finished: events.RoundFinished
    train_loss: float | None
    perplexity: float | None


@dataclass
class RunProgress:
    """Folds events; every attribute is what the newest event says."""

    started: events.RunStarted | None = None
    phase: str = "starting"
    round: int = 0
    rounds_done: int = 0
    now_s: float = 0.0
    round_began_s: float = 0.0
    silos: dict[str, SiloProgress] = field(default_factory=dict)
    evaluation: events.Evaluated | None = None
    evaluation_before: events.Evaluated | None = None
    history: deque[RoundRow] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    workers_lost: int = 0
    updates_dropped: int = 0
    stopped: events.RunStopped | None = None
    waits_for: str | None = None
    away: frozenset[str] = frozenset()
    finished: bool = False
    _train_loss: float | None = None

    @property
    def rounds(self) -> int:
        return self.started.rounds if self.started else 0

    @property
    def total_tokens(self) -> int:
        return self.history[-1].finished.total_tokens if self.history else 0

    @property
    def local_steps(self) -> int:
        return self.started.local_steps if self.started else 0

    @property
    def left_s(self) -> float | None:
        """Seconds to the end by the mean of the last finished rounds; None before the first."""
        if not self.history or self.finished or self.stopped:
            return None
        per_round_s = sum(row.finished.round_s for row in self.history) / len(self.history)
        # What the current round has already used counts, but never for more than one round.
        used_s = min(per_round_s, self.now_s - self.round_began_s) if self.in_round else 0.0
        return max(0.0, (self.rounds - self.rounds_done) * per_round_s - used_s)

    @property
    def in_round(self) -> bool:
        return self.round > self.rounds_done

    @property
    def share_done(self) -> float:
        """Of the whole run, 0 to 1, counting the steps of the current round."""
        if not self.rounds:
            return 0.0
        within = 0.0
        if self.in_round and self.silos and self.local_steps:
            steps = sum(
                self.local_steps if silo.state in ("done", "dropped") else silo.step
                for silo in self.silos.values()
            )
            # A round is not over when training is: evaluation and merging get its last tenth.
            within = 0.9 * steps / (self.local_steps * len(self.silos))
        return min(1.0, (self.rounds_done + min(within, 0.9)) / self.rounds)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the last finished round; before one, the sum over those who train now."""
        if self.history and (last := self.history[-1].finished).round_s > 0:
            return last.tokens / last.round_s
        speeds = [s.tokens_per_s for s in self.silos.values() if s.state == "training"]
        known = [speed for speed in speeds if speed is not None]
        return sum(known) if known else None

    def fold(self, event: Event) -> None:
        """Takes one event in."""
        if isinstance(event, events.Standing):
            # That it stopped is told until there is something newer.
            if event.waits_for is not None or self.stopped is None:
                self.waits_for = event.waits_for
            self.away = frozenset(event.away)
            return
        self.now_s, self.waits_for = max(self.now_s, event.time_s), None
        match event:
            case events.LocalProgress():
                silo = self._silo(event.silo)
                silo.state, silo.step = "training", event.step
                silo.loss, silo.tokens_per_s = event.loss, event.tokens_per_s
                self.phase = "training"
            case events.LocalFinished():
                silo = self._silo(event.silo)
                silo.state, silo.step = "done", self.local_steps
                silo.loss = event.last_loss
                if event.train_s > 0:
                    silo.tokens_per_s = event.tokens / event.train_s
                if all(s.state in ("done", "dropped") for s in self.silos.values()):
                    self.phase = "merging updates"
            case events.UpdateDropped():
                silo = self._silo(event.silo)
                silo.state, silo.note = "dropped", event.reason
                self.updates_dropped += 1
            case events.WorkerLost():
                silo = self._silo(event.silo)
                silo.state, silo.step, silo.note = "waiting", 0, "worker lost, starting again"
                self.workers_lost += 1
            case events.RoundStarted():
                self.round, self.phase = event.round, "dispatching"
                self.round_began_s = event.time_s
                self.silos = {name: SiloProgress(name) for name in event.participants}
                self._train_loss = None
            case events.RoundMerged():
                self.phase = "merged"
                self._train_loss = event.train_loss
            case events.Evaluated():
                self.phase = "evaluating"
                if event.silo is None:
                    self.evaluation_before, self.evaluation = self.evaluation, event
            case events.CheckpointSaved():
                self.phase = "checkpoint saved"
            case events.RunStarted():
                self.started = event
                self.rounds_done = self.round = event.resumed_from_round or 0
                self.stopped, self.finished, self.phase = None, False, "starting"
                self.silos = {}
            case events.RoundFinished():
                self.rounds_done, self.phase = event.round, "round finished"
                scored = self.evaluation
                perplexity = scored.perplexity if scored and scored.round == event.round else None
                self.history.append(RoundRow(event, self._train_loss, perplexity))
            case events.RunFinished():
                self.finished, self.phase = True, "finished"
            case events.RunStopped():
                self.stopped, self.phase = event, "stopped"

    def _silo(self, name: str) -> SiloProgress:
        return self.silos.setdefault(name, SiloProgress(name))
