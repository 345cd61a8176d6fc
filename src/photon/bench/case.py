"""One run of a method, or of a local one each silo's; what decides it, and what it came to."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from photon.bench.search import Point
from photon.bench.suite import Kind
from photon.config import RunConfig
from photon.errors import RunError
from photon.federation.layout import empty_model
from photon.models import hidden_matrices
from photon.runs.folder import versions
from photon.telemetry import read_history
from photon.telemetry.baselines import all_reduce_bytes
from photon.telemetry.events import Evaluated, LocalFinished
from photon.training.flops import count_flops

#: Bumped where the same run file comes to another result than in the Photon before, and where a
#: key's default changes.
FORMAT = 2
#: Of a run file: where things are, and how many run at a time, decide nothing.
_UNDECIDED = {"run": ("name",), "data": ("path",), "serve": None, "comply": None}
#: Iterations of Newton-Schulz, torch's default.
_NEWTON_SCHULZ = 5


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        method: its name. point: of its grid.
        silos: of the prepared data, whose hash is data_sha256.
    """

    method: str
    kind: Kind
    point: Point
    seed: int
    config: RunConfig
    silos: tuple[str, ...]
    data_sha256: str

    @cached_property
    def key(self) -> str:
        """Of all that decides the result, but for keys at their default: there may be new ones."""
        tree = self.config.model_dump(mode="json", exclude_defaults=True)
        for table, keys in _UNDECIDED.items():
            there = tree.pop(table, {})
            if keys:
                tree[table] = {key: value for key, value in there.items() if key not in keys}
        told = [FORMAT, self.kind, self.silos, self.data_sha256, tree]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def runs(self, work: Path) -> list[tuple[Path, tuple[str, ...] | None]]:
        """Folder of each run, and whose text it reads, pooled; None: the federation's."""
        if self.kind == "local":
            return [(work / f"{self.key}-{silo}", (silo,)) for silo in self.silos]
        return [(work / self.key, None if self.kind == "federated" else self.silos)]

    def record(self, work: Path) -> dict[str, Any]:
        """What its finished runs came to, for the results.

        `curve` is [tokens, loss] after each round, tokens of all silos; `flops` are the model's and
        the inner optimizer's; `bytes` those on the wire, of a centralised run what an all-reduce
        of fp32 gradients at each step sends. `exchanges` is how often a model's gradients were
        exchanged by each participant, in all-reduces of the same bytes. `step_tokens` are those of
        a step of all who are at work at a time.

        Raises:
            RunError: one is not finished.
        """
        told = [_read(folder) for folder, _ in self.runs(work)]
        parts = len(self.silos)  # that are at work at a time
        if self.kind == "federated":
            parts = min(parts, self.config.federation.sample or parts)
        curves = [one["curve"] for one in told]
        curve = [
            [sum(point[0] for point in points), sum(point[1] for point in points) / len(points)]
            for points in zip(*curves, strict=True)
        ]
        tokens, steps = sum(one["tokens"] for one in told), sum(one["steps"] for one in told)
        model = empty_model(self.config, vocab_size=told[0]["vocab_size"], eos_id=0)
        size = sum(one.numel() for one in model.parameters())
        per_token = count_flops(model, self.config.data.sequence_length).per_token
        sent = {
            "federated": sum(one["bytes"] for one in told),
            "centralised": all_reduce_bytes(size, steps, parts),
            "local": 0,
        }[self.kind]
        return {
            "method": self.method,
            "kind": self.kind,
            "point": dict(self.point),
            "seed": self.seed,
            "key": self.key,
            "loss": curve[-1][1],
            "tokens": tokens,
            "steps": steps,
            "curve": curve,
            "flops": per_token * tokens + steps * optimizer_flops(model, self.config),
            "bytes": sent,
            "exchanges": sent / parts / all_reduce_bytes(size, 1, 1),
            "parameters": size,
            "step_tokens": self.config.local.batch_size * self.config.data.sequence_length * parts,
            "wall_s": sum(one["wall_s"] for one in told),
            "device": told[0]["device"],
            "versions": versions(),
            "config": self.config.model_dump(
                mode="json", exclude={"serve": True, "comply": True, "data": {"path"}}
            ),
        }


def _read(folder: Path) -> dict[str, Any]:
    history = read_history(folder)
    summary, started = history.summary, history.started
    if summary is None:
        raise RunError(f"{folder} is not finished", hint="Run the same command again.")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    tokens, curve = {0: 0}, []
    for one in history.of(LocalFinished):
        tokens[one.round] = tokens.get(one.round, 0) + one.tokens
    for one in history.of(Evaluated):
        if one.silo is None:
            seen = sum(number for at, number in tokens.items() if at <= one.round)
            curve.append([seen, math.inf if one.loss is None else one.loss])
    return {
        "curve": curve,
        "tokens": curve[-1][0],
        "steps": curve[-1][0] // (started.batch_size * started.sequence_length),
        "bytes": summary["bytes_up"] + summary["bytes_down"],
        "wall_s": summary["wall_s"],
        "vocab_size": record["vocab_size"],
        "device": started.device,
    }


def optimizer_flops(model: nn.Module, config: RunConfig) -> int:
    """Of an inner step's matrix products: Muon's Newton-Schulz; what others do is not counted.

    An iteration on m x n, m <= n: x x^T and the last product, 2 m m n each, and the square of the
    gram matrix, 2 m m m.
    """
    if config.local.optimizer != "muon":
        return 0
    shapes = [sorted(model.get_parameter(name).shape) for name in hidden_matrices(model)]
    return sum(_NEWTON_SCHULZ * (4 * m * m * n + 2 * m * m * m) for m, n in shapes)


def loss_at(curve: Sequence[Sequence[float]], tokens: float) -> float:
    """Held-out loss after so many tokens, between two evaluations on a straight line."""
    seen = [point[0] for point in curve]
    right = min(max(1, bisect.bisect_left(seen, tokens)), len(curve) - 1)
    (before, high), (after, low) = curve[right - 1], curve[right]
    if tokens >= after or after == before:
        return low
    return high + (low - high) * (tokens - before) / (after - before)


def tokens_to(curve: Sequence[Sequence[float]], loss: float) -> float:
    """Tokens after which the held-out loss is first that low; infinite if it never is."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            share = (high - loss) / (high - low) if high > low else 1.0
            return before + (after - before) * max(0.0, share)
    return math.inf


def time_of(record: dict[str, Any], exchange_steps: float) -> float:
    """In centralised steps' time: its own compute on the same hardware in all, and exchanges.

    The wall-time model of the paper (arXiv 2411.02908, section 5) in a unit of its own.
    """
    return record["tokens"] / record["step_tokens"] + exchange_steps * record["exchanges"]
