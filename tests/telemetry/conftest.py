"""A short run's events, and the records they leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from photon.telemetry.events import (
    CheckpointSaved,
    EnergySpent,
    Evaluated,
    Event,
    KeyMerged,
    LocalFinished,
    LocalProgress,
    ResidualRouted,
    RoundFinished,
    RoundMerged,
    RoundStarted,
    RunStarted,
)

SILOS = ("north", "south")
STEPS, TOKENS = 4, 1000  # Local steps of a round; tokens of one silo's round.


def started(resumed_from_round: int | None = None) -> RunStarted:
    return RunStarted(
        kind="simulate",
        run="short",
        started_at="2026-01-02T03:04:05+00:00",
        photon_version="0.1.0",
        silos=list(SILOS),
        rounds=4,
        local_steps=STEPS,
        participants_per_round=2,
        batch_size=2,
        sequence_length=125,
        parameters=10,
        silo_tokens={"north": 7000, "south": 3000},
        device="cpu",
        precision="fp32",
        threads=1,
        workers=0,
        resumed_from_round=resumed_from_round,
    )


def evaluated(number: int, loss: float, silo: str | None = None) -> Evaluated:
    return Evaluated(
        round=number, silo=silo, loss=loss, perplexity=loss * 10, bits_per_byte=loss / 2,
        tokens=50, eval_s=0.1,
    )  # fmt: skip


def round_events(number: int, shift: float = 0.0) -> Iterator[Event]:
    """All of one round; `shift` tells a second attempt from the first."""
    before = (number - 1) * STEPS
    yield RoundStarted(round=number, global_step=before, participants=list(SILOS))
    for silo in SILOS:
        for step in range(1, STEPS + 1):
            yield LocalProgress(
                round=number, silo=silo, step=step, global_step=before + step,
                loss=10 - number + shift, lr=0.1 / (before + step), gradient_norm=1.0,
                tokens_per_s=500.0,
            )  # fmt: skip
        yield LocalFinished(
            round=number, silo=silo, loss=10 - number + shift, first_loss=9.0, last_loss=8.0,
            tokens=TOKENS, update_norm=0.5, train_s=2.0, load_s=0.1, publish_s=0.1,
            bytes_down=40, bytes_up=40,
        )  # fmt: skip
    yield RoundMerged(
        round=number, participants=list(SILOS), tokens=2 * TOKENS, train_loss=10 - number + shift,
        pseudo_gradient_norm=0.5, merge_s=0.1,
    )  # fmt: skip
    yield KeyMerged(
        round=number, silo="", participants=list(SILOS), shares={"layers.0": [0.6, 0.4]}
    )
    yield ResidualRouted(
        round=number, silo="", at_jurisdiction="UN", module="layers.0", origin="eu/north",
        origin_jurisdiction="EU", to="us", to_jurisdiction="US", cosine=0.25, hops=1, bytes=40,
        outcome="taken",
    )  # fmt: skip
    yield evaluated(number, 9 - number + shift)
    for silo in SILOS:
        yield evaluated(number, 9 - number + shift, silo)
    yield EnergySpent(round=number, silo="north", how="estimated", joules={"training": 12.5})
    yield CheckpointSaved(round=number, bytes=120, save_s=0.1)
    yield RoundFinished(
        round=number, global_step=number * STEPS, round_s=5.0, local_train_s=4.0, eval_s=0.3,
        merge_s=0.1, checkpoint_s=0.1, tokens=2 * TOKENS, total_tokens=number * 2 * TOKENS,
        bytes_up=80, bytes_down=80, total_bytes_up=number * 80, total_bytes_down=number * 80,
        dropped=[],
    )  # fmt: skip


@pytest.fixture
def begin() -> Callable[..., RunStarted]:
    return started


@pytest.fixture
def one_round() -> Callable[..., Iterator[Event]]:
    return round_events


@pytest.fixture
def evaluation() -> Callable[..., Evaluated]:
    return evaluated


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[Iterable[Event]], Path]:
    """Appends events to events.jsonl of a run folder, and returns the folder."""

    def write(events: Iterable[Event]) -> Path:
        with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
            for event in events:
                record = {"event": event.name, **event.model_dump(mode="json")}
                file.write(json.dumps(record) + "\n")
        return tmp_path

    return write
