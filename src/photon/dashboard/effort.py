"""How each silo trained: what its steps' time went into, its speed, memory and bytes."""

from __future__ import annotations

import statistics
from typing import Any

from photon.dashboard import palette, wording
from photon.dashboard.digest import RunDigest, SiloDigest

#: What a step does, in its order; the rest of the training time is the last one.
STEP_PARTS = ("data", "forward", "backward", "optimizer", "other")


def effort_rows(digest: RunDigest) -> list[dict[str, Any]]:
    """A row, in words, for each silo that finished a task with its times told.

    parts are of the step's bar: width in percent, CSS colour, share in words. exchange is the share
    of the training time that its ranks' collectives took; speed and mfu (model FLOPs utilisation)
    are medians over tasks, up and down bytes a task, memory and micro_batch those of one rank.
    """
    rows = []
    for index, silo in enumerate(digest.silos.values()):
        spent_s = {part: _sum(silo, f"{part}_s") for part in STEP_PARTS[:-1]}
        if sum(spent_s.values()) > 0:
            colour = palette.silo_variable(index, len(digest.silos))
            rows.append({"colour": colour} | _row(silo, spent_s))
    return rows


def step_legend() -> list[tuple[str, str]]:
    """Names of a step's parts with their CSS colours."""
    return [(name, f"var(--phase-{i})") for i, name in enumerate(STEP_PARTS)]


def _row(silo: SiloDigest, spent_s: dict[str, float]) -> dict[str, Any]:
    whole_s = max(_sum(silo, "train_s"), sum(spent_s.values()))
    shares = [seconds / whole_s for seconds in spent_s.values()]
    shares.append((whole_s - sum(spent_s.values())) / whole_s)
    exchange = _sum(silo, "communication_s") / whole_s
    mfu = [task.mfu for task in silo.tasks if task.mfu is not None]
    memory = max(task.peak_memory_bytes for task in silo.tasks)
    return {
        "name": wording.one_line(silo.name),
        "parts": [
            (f"{share * 100:.2f}", css, wording.percent(share))
            for share, (_, css) in zip(shares, step_legend(), strict=True)
        ],
        "speed": wording.count(statistics.median(silo.throughput)) if silo.throughput else "–",
        "exchange": wording.percent(exchange) if exchange else "–",
        "mfu": wording.percent(statistics.median(mfu), 1) if mfu else "–",
        "memory": wording.size(memory) if memory else "–",
        "micro_batch": str(silo.tasks[-1].micro_batch_size or "–"),
        "up": wording.size(_sum(silo, "bytes_up") / len(silo.tasks)),
        "down": wording.size((_sum(silo, "bytes_down") + silo.scoring_bytes) / len(silo.tasks)),
    }


def _sum(silo: SiloDigest, figure: str) -> float:
    """Of a figure of all its tasks; what is not known counts as none."""
    return sum(getattr(task, figure) or 0 for task in silo.tasks)
