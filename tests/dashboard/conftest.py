"""Synthetic event streams: what a run would write, with every number predictable."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from photon.telemetry.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Kind,
    LocalFinished,
    LocalProgress,
    RoundFinished,
    RoundMerged,
    RoundStarted,
    RunFinished,
    RunStarted,
    RunStopped,
    UpdateDropped,
    WorkerLost,
)

POLITICS = ("democratic", "republican", "independent", "judicial")


@dataclass
class Stream:
    """A run of so many rounds; loss falls with the square root of the tokens."""

    silos: Sequence[str] = POLITICS
    rounds: int = 6
    sample: int | None = None
    run: str = "presidents"
    kind: Kind = "simulate"
    local_steps: int = 32
    batch_size: int = 16
    sequence_length: int = 128
    parameters: int = 1_100_000
    evaluate_every: int = 1
    first_loss: float = 6.7
    floor: float = 4.2
    dropped: dict[int, str] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    per_silo: bool = True
    step_s: dict[str, float] = field(default_factory=dict)
    round_s: float = 20.0
    log_every: int = 8
    time_s: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def participants(self) -> int:
        return self.sample or len(self.silos)

    @property
    def tokens_per_task(self) -> int:
        return self.local_steps * self.batch_size * self.sequence_length

    def started(self, resumed_from_round: int | None = None) -> RunStarted:
        return RunStarted(
            time_s=self.time_s,
            kind=self.kind,
            run=self.run,
            started_at="2026-01-02T03:04:05+00:00",
            photon_version="0.1.0",
            silos=list(self.silos),
            rounds=self.rounds,
            local_steps=self.local_steps,
            participants_per_round=self.participants,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            parameters=self.parameters,
            silo_tokens={name: 100_000 * (i + 1) for i, name in enumerate(self.silos)},
            device="cpu",
            precision="fp32",
            threads=2,
            workers=0,
            resumed_from_round=resumed_from_round,
        )

    def loss(self, tokens: float) -> float:
        """Nats per token after so many tokens."""
        scale = self.tokens_per_task * 4
        return self.floor + (self.first_loss - self.floor) / math.sqrt(1 + 3 * tokens / scale)

    def evaluations(self, number: int) -> Iterator[Event]:
        loss = self.loss(self.tokens)
        yield self._evaluated(number, None, loss)
        if self.per_silo:
            for i, name in enumerate(self.silos):
                yield self._evaluated(number, name, loss + 0.1 * (i % 8) - 0.15)

    def round(self, number: int) -> Iterator[Event]:
        start = (number * 3) % len(self.silos) if self.sample else 0
        order = [self.silos[(start + i) % len(self.silos)] for i in range(self.participants)]
        begin_step, began_s = (number - 1) * self.local_steps, self.time_s
        yield RoundStarted(
            time_s=self.time_s, round=number, global_step=begin_step, participants=order
        )
        train_s = self.round_s * 0.8 / len(order)
        if number in self.lost:
            reason = "exit code -9 (killed)"
            yield WorkerLost(
                time_s=self.time_s, round=number, silo=self.lost[number], worker=1, reason=reason
            )
        good = []
        for name in order:
            yield from self._local(number, name, train_s, begin_step)
            if self.dropped.get(number) == name:
                reason = "update has 3 values that are not finite"
                yield UpdateDropped(time_s=self.time_s, round=number, silo=name, reason=reason)
            else:
                good.append(name)
        tokens = self.tokens_per_task * len(good)
        self.tokens += tokens
        self.time_s += self.round_s * 0.02
        yield RoundMerged(
            time_s=self.time_s,
            round=number,
            participants=good,
            tokens=tokens,
            train_loss=self.loss(self.tokens) + 0.05,
            pseudo_gradient_norm=1.5,
            merge_s=self.round_s * 0.02,
        )
        evaluate = self.evaluate_every and number % self.evaluate_every == 0
        if evaluate:
            self.time_s += self.round_s * 0.1
            yield from self.evaluations(number)
        self.time_s += self.round_s * 0.03
        yield CheckpointSaved(
            time_s=self.time_s, round=number, bytes=13_200_000, save_s=self.round_s * 0.03
        )
        moved = self.parameters * 4 * len(order)
        self.bytes += moved
        yield RoundFinished(
            time_s=self.time_s,
            round=number,
            global_step=number * self.local_steps,
            round_s=self.time_s - began_s + 0.02 * self.round_s,
            local_train_s=self.round_s * 0.8,
            eval_s=self.round_s * 0.1 if evaluate else 0.0,
            merge_s=self.round_s * 0.02,
            checkpoint_s=self.round_s * 0.03,
            tokens=tokens,
            total_tokens=self.tokens,
            bytes_up=moved,
            bytes_down=moved,
            total_bytes_up=self.bytes,
            total_bytes_down=self.bytes,
            dropped=[name for name in order if name not in good],
        )

    def whole(self) -> Iterator[Event]:
        """From the first line to the last."""
        yield self.started()
        if self.evaluate_every:
            yield from self.evaluations(0)
        for number in range(1, self.rounds + 1):
            yield from self.round(number)
        yield self.finished()

    def finished(self) -> RunFinished:
        return RunFinished(time_s=self.time_s, summary={"rounds": self.rounds})

    def stopped(self, number: int) -> RunStopped:
        return RunStopped(time_s=self.time_s, round=number, reason="interrupted by Ctrl-C")

    def _local(self, number: int, name: str, train_s: float, begin_step: int) -> Iterator[Event]:
        spread = 0.08 * (self.silos.index(name) % 8)
        losses = []
        for step in range(self.log_every, self.local_steps + 1, self.log_every):
            self.time_s += train_s * self.log_every / self.local_steps
            tokens = (
                self.tokens + self.participants * self.tokens_per_task * step / self.local_steps
            )
            losses.append(self.loss(tokens) + spread)
            yield LocalProgress(
                time_s=self.time_s,
                round=number,
                silo=name,
                step=step,
                global_step=begin_step + step,
                loss=losses[-1],
                lr=1e-3,
                gradient_norm=0.8,
                tokens_per_s=self.tokens_per_task / train_s,
            )
        yield LocalFinished(
            time_s=self.time_s,
            round=number,
            silo=name,
            loss=sum(losses) / len(losses),
            first_loss=losses[0],
            last_loss=losses[-1],
            tokens=self.tokens_per_task,
            update_norm=1.2,
            train_s=train_s,
            load_s=0.01,
            publish_s=0.02,
            bytes_down=self.parameters * 4,
            bytes_up=self.parameters * 4,
            **self.step_s,
        )

    def _evaluated(self, number: int, silo: str | None, loss: float) -> Evaluated:
        return Evaluated(
            time_s=self.time_s,
            round=number,
            silo=silo,
            loss=loss,
            perplexity=math.exp(loss),
            bits_per_byte=loss / math.log(2) / 4.5,
            tokens=20_000,
            eval_s=0.3,
        )

    def resumed(self, stop_in: int) -> Iterator[Event]:
        """Stopped in the middle of a round, then taken up from the checkpoint before it."""
        yield self.started()
        yield from self.evaluations(0)
        for number in range(1, stop_in):
            yield from self.round(number)
        lost = copy.deepcopy(self)
        cut = [e for e in lost.round(stop_in) if isinstance(e, RoundStarted | LocalProgress)]
        yield from cut
        yield self.stopped(stop_in)
        yield self.started(resumed_from_round=stop_in - 1)
        for number in range(stop_in, self.rounds + 1):
            yield from self.round(number)
        yield self.finished()


@pytest.fixture
def stream() -> type[Stream]:
    """Makes event streams."""
    return Stream


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes events into a run folder of their own."""

    def write(events: Iterable[Event], name: str = "run") -> Path:
        return write_events(tmp_path / name, events)

    return write


def write_events(folder: Path, events: Iterable[Event]) -> Path:
    """A run folder that holds these events."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        for event in events:
            file.write(json.dumps({"event": event.name, **event.model_dump(mode="json")}) + "\n")
    return folder
