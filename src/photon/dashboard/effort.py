"""How each silo trained: what its steps' time went into, its speed, memory and bytes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from photon.dashboard import palette, wording
from photon.dashboard.digest import RunDigest, SiloDigest

#: What a step does, in its order; the rest of the training time is the last one.
STEP_PARTS = ("data", "forward", "backward", "optimizer", "other")


@dataclass(frozen=True)
class EffortRow:
    """A silo's row of the table; all in words.

    Attributes:
        parts: of the step's bar: width in percent, CSS colour, share in words.
        exchange: share of the training time that its ranks' collectives took.
        mfu: model FLOPs utilisation, median over rounds.
        up, down: bytes of a round, mean.
    """

    name: str
    colour: str
    parts: list[tuple[str, str, str]]
    speed: str
    exchange: str
    mfu: str
    memory: str
    micro_batch: str
    up: str
    down: str


def effort_rows(digest: RunDigest) -> list[EffortRow]:
    """A row for each silo that finished a task with its times told; none where nobody did."""
    return [
        _row(silo, palette.silo_variable(index, len(digest.silos)))
        for index, silo in enumerate(digest.silos.values())
        if silo.rounds and sum(silo.step_s.values()) > 0
    ]


def step_legend() -> list[tuple[str, str]]:
    """Names of a step's parts with their CSS colours."""
    return [(name, f"var(--phase-{i})") for i, name in enumerate(STEP_PARTS)]


def _row(silo: SiloDigest, colour: str) -> EffortRow:
    spent_s = dict(silo.step_s)
    whole_s = max(silo.train_s, sum(spent_s.values()))
    spent_s["other"] = whole_s - sum(spent_s.values())
    parts = [
        (f"{spent_s[name] / whole_s * 100:.2f}", css, wording.percent(spent_s[name] / whole_s))
        for name, css in step_legend()
    ]
    return EffortRow(
        name=wording.one_line(silo.name),
        colour=colour,
        parts=parts,
        speed=wording.count(statistics.median(silo.throughput)) if silo.throughput else "–",
        exchange=wording.percent(silo.exchange_s / whole_s) if silo.exchange_s else "–",
        mfu=wording.percent(statistics.median(silo.mfu), 1) if silo.mfu else "–",
        memory=wording.size(silo.peak_memory_bytes) if silo.peak_memory_bytes else "–",
        micro_batch=str(silo.micro_batch_size or "–"),
        up=wording.size(silo.bytes_up / silo.rounds),
        down=wording.size(silo.bytes_down / silo.rounds),
    )
