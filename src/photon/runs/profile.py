"""Where a local step's time and memory go on this machine, before a run is started."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from photon.config import RunConfig
from photon.errors import error_of
from photon.federation import FitTask, Receipt, Version, fitted
from photon.federation.layout import initial_model, layout_of
from photon.runs.session import Session
from photon.telemetry import Event
from photon.telemetry.events import ComputeChosen, Notice
from photon.training import Seat, count_flops
from photon.training.device import cores

#: Steps before the measured ones: kernels are chosen, blocks compiled, optimizer state made.
WARM_UP_STEPS = 3


def profile(
    config: RunConfig,
    *,
    silo: str | None = None,
    steps: int = 20,
) -> dict[str, Any]:
    """Take some local steps as a run would, and measure them; nothing is kept.

    Args:
        config: the run file; one node trains, with the ranks and strategy it would have.
        silo: whose text; the first by name by default.
        steps: measured ones, after WARM_UP_STEPS.

    Returns:
        strategy and its reason, ranks, tokens/s, seconds a step by phase, share of collectives,
        FLOPs a token and their count in words, MFU where the device's peak is stated, peak memory
        and its estimate in bytes. Empty on ranks other than 0.

    Raises:
        PhotonError: as `simulate`.
    """
    config = config.having(federation={"workers": 0})
    with tempfile.TemporaryDirectory(prefix="photon-profile-") as folder:
        session = Session("simulate", config, [silo] if silo else None, Path(folder), None)
        if Seat.from_environment().rank:
            session.follow()
            return {}
        return _measure(session, steps)


def _measure(session: Session, steps: int) -> dict[str, Any]:
    config, nodes = session.config, session.nodes
    told: list[Event] = []
    skeleton = nodes.skeleton()
    fit = nodes.fit(skeleton)
    model = initial_model(config, session.data)
    once = layout_of(model).once_of(model)
    version = Version(0, nodes.initial_state(model), once=once, once_sha256="profile")
    engine = nodes.engine(model, told.append)
    task = FitTask("profile", 1, session.silos[0], 0, WARM_UP_STEPS, None)
    try:
        _only(fitted(engine, [task], version))
        measured = replace(task, steps=steps, round=2, profile=True)
        receipt = _only(fitted(engine, [measured], version))
    finally:
        engine.close()
    chosen = next(event for event in told if isinstance(event, ComputeChosen))
    flops = count_flops(skeleton, config.data.sequence_length)
    parts = vars(receipt.times)
    return {
        "strategy": chosen.strategy,
        "reason": chosen.reason,
        "ranks": chosen.ranks,
        "device": chosen.device,
        "precision": chosen.precision,
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "micro_batch_size": receipt.micro_batch_size,
        "tokens_per_s": receipt.tokens / receipt.train_s,
        "step_s": receipt.train_s / steps,
        "phases_s": {name.removesuffix("_s"): seconds / steps for name, seconds in parts.items()},
        "communication_s": None
        if receipt.communication_s is None
        else receipt.communication_s / steps,
        "flops_per_token": flops.per_token,
        "flops_explained": flops.explain(),
        "mfu": receipt.mfu,
        "peak_memory_bytes": receipt.peak_memory_bytes,
        "estimated_memory_bytes": fit.estimate(skeleton, receipt.micro_batch_size).total_bytes,
        "notices": [event.text for event in told if isinstance(event, Notice)],
        "cores": cores(),
    }


def _only(updates: Any) -> Receipt:
    receipts: Sequence[Receipt] = [update.receipt for update in updates]
    (receipt,) = receipts
    if receipt.failure is not None:
        raise error_of(receipt.failure_code)(receipt.failure, hint=receipt.failure_hint)
    return receipt
