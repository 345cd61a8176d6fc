"""What a run will take, before any of it is trained: bytes by level, hours, memory, what binds.

The wall-time model is the paper's (Photon, arXiv 2411.02908, section 5): rounds x (tau / nu + what
the topology takes to exchange S bytes among K participants over the slowest link of B bytes/s).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from photon.compression import build_codec
from photon.config import RunConfig
from photon.config.children import inside, participants, whose_turn
from photon.federation.layout import empty_model, layout_of
from photon.federation.tasks import OPTIMIZER, WEIGHTS, parcel_header
from photon.link import Entry, entries_bytes
from photon.telemetry.baselines import all_reduce_bytes
from photon.training import InnerOptimizer, Seat, plan_compute, plan_fit
from photon.training.flops import count_flops

#: Values of a tensor that are encoded to learn how many bytes a codec makes of one.
_SAMPLE = 1 << 18

Topology = Literal["ps", "ar", "rar"]


def exchange_s(topology: Topology, participants: int, size: float, bytes_per_s: float) -> float:
    """Seconds to exchange and merge a model among participants, over the slowest link.

    Args:
        topology: ps, a parameter server that collects and broadcasts; ar, all-reduce by peers that
            each send all they have to all others; rar, ring all-reduce.
        size: S, bytes of one update.
    """
    passes = {
        "ps": 2 * participants,
        "ar": participants - 1,
        "rar": 2 * (participants - 1) / participants,
    }
    return passes[topology] * size / bytes_per_s


def wall_s(
    topology: Topology,
    participants: int,
    size: float,
    bytes_per_s: float,
    *,
    rounds: int,
    steps: int,
    steps_per_s: float,
) -> float:
    """Seconds of a flat run; data parallelism that exchanges each step has steps = 1."""
    exchange = exchange_s(topology, participants, size, bytes_per_s)
    return rounds * (steps / steps_per_s + exchange)


@dataclass(frozen=True)
class Level:
    """One federation of a run.

    Attributes:
        name: the run's own for the outermost.
        inside: names of the federations around it, the outermost first.
        members: who take part in a round of it, silos and federations.
        rounds: of its own, in the whole run.
        steps: tau, global steps from one of its merges to the next.
        bytes_up, bytes_down: of one member in one round, the mean of all.
        bytes: all that goes over its members' links in the run.
    """

    name: str
    inside: tuple[str, ...]
    members: int
    rounds: int
    steps: int
    bytes_up: float
    bytes_down: float
    bytes: float

    def link_s(self, bytes_per_s: float) -> float:
        """Of the whole run, all its members through the link of its aggregator."""
        return self.bytes / bytes_per_s

    def is_within(self, other: Level) -> bool:
        """Whether it is the other one, or inside it."""
        return other.name in (*self.inside, self.name)


def plan(
    config: RunConfig,
    silo_tokens: Mapping[str, int],
    *,
    vocab_size: int,
    bytes_per_s: float,
    steps_per_s: float | None = None,
) -> dict[str, Any]:
    """What a run will take. Nothing is built but the model's shapes.

    Args:
        silo_tokens: by silo; only names matter.
        bytes_per_s: B, of each aggregator's link.
        steps_per_s: nu, local steps a silo takes in a second (`photon profile`); None: unknown.

    Returns:
        for --json. memory_bytes is of one device that takes one sequence at a time; link_s is that
        of the longest way from a silo to the outermost aggregator, each level in turn.
    """
    model = empty_model(config, vocab_size=vocab_size, eos_id=0)
    levels = list(_levels(config, silo_tokens, _sizes(config, model), (config.run.name,)))
    root = levels[0]
    fit = plan_fit(model, config, plan_compute(config.compute), Seat(), scores_only=True)
    flops = count_flops(model, config.data.sequence_length).per_token
    step_tokens = config.local.batch_size * config.data.sequence_length
    merged = sum(model.get_parameter(name).numel() for name in layout_of(model).merged)
    size, steps = 4 * merged, config.total_steps
    link_s = max(
        sum(other.link_s(bytes_per_s) for other in levels if one.is_within(other)) for one in levels
    )
    per_step = all_reduce_bytes(merged, steps, root.members)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "update_bytes_fp32": size,
        "levels": [asdict(one) for one in levels],
        "bytes": sum(one.bytes for one in levels),
        "all_reduce_bytes": per_step,
        "fewer_bytes": per_step / max(1.0, sum(one.bytes for one in levels)),
        "steps": steps,
        "tokens_per_silo": steps * step_tokens,
        "flops_per_step": flops * step_tokens,
        "memory_bytes": fit.estimate(model, 1).total_bytes,
        "bytes_per_s": bytes_per_s,
        "link_s": link_s,
        "even_at_steps_per_s": steps / link_s if link_s else None,
        "steps_per_s": steps_per_s,
        "topology_s": {
            one: root.rounds * exchange_s(one, root.members, root.bytes_up, bytes_per_s)
            for one in ("ps", "ar", "rar")
        },
    }
    if steps_per_s is not None:
        train_s = steps / steps_per_s
        found["train_s"], found["wall_s"] = train_s, train_s + link_s
        found["data_parallel_wall_s"] = wall_s(
            "rar", root.members, size, bytes_per_s, rounds=steps, steps=1, steps_per_s=steps_per_s
        )
        found["bottleneck"] = "link" if link_s > train_s else "training"
    return found


def _levels(
    config: RunConfig,
    silo_tokens: Mapping[str, int],
    sizes: Callable[[str], int],
    way: tuple[str, ...],
    taken: float = 1.0,
) -> Iterator[Level]:
    """A federation and those in it, the outermost first.

    Args:
        taken: the share of rounds of those around it that it is drawn for, and has the turn.
        config: the run file as its members have it; its rounds are all that it merges.
        way: the names of those around it, and its own.
    """
    federation, link, outermost = config.federation, config.link, len(way) == 1
    members = list(participants(federation.children, silo_tokens))
    turns = [turn for number in (1, 2) if (turn := whose_turn(federation, members, number))]
    drawn = [min(len(turn), federation.sample or len(turn)) for turn in turns]
    shares = dict.fromkeys(members, 0.0)
    for turn, count in zip(turns, drawn, strict=True):
        shares |= {name: shares[name] + count / len(turn) / len(turns) for name in turn}
    asked, rounds = sum(drawn) / len(turns), round(federation.rounds * taken)
    by_group = {name: sizes(child.update_codec) for name, child in federation.children.items()}
    codec = sizes(link.update_codec)
    up = sum(by_group.get(name, codec) * shares[name] for name in members) / asked
    # The first state is sent whole; silos are scored with the last one.
    versions = rounds + (config.eval.per_silo and outermost)
    down = float(sizes("fp32"))
    if link.lossy_broadcast:
        down = (down + (versions - 1) * sizes(link.broadcast_codec)) / versions
    yield Level(
        name=way[-1],
        inside=way[:-1],
        members=round(asked),
        rounds=rounds,
        steps=config.local.steps,
        bytes_up=up,
        bytes_down=down,
        bytes=asked * rounds * (up + down) + len(members) * (versions - rounds) * down,
    )
    for name, child in federation.children.items():
        tokens = {silo: silo_tokens[silo] for silo in child.silos_of(name) if silo in silo_tokens}
        if child.nodes is not None:
            tokens = {f"{name}.{index}": 1 for index in range(child.nodes)}
        if tokens:
            below = taken * shares.get(name, 0.0)
            yield from _levels(inside(config, child), tokens, sizes, (*way, name), below)


def _sizes(config: RunConfig, model: nn.Module) -> Callable[[str], int]:
    """Bytes of a state or update on the wire, manifest and all, by the codec's name."""
    shapes = {WEIGHTS + name: model.get_parameter(name).shape for name in layout_of(model).merged}
    as_it_is = []
    if config.federation.optimizer_state == "average":
        for name, one in InnerOptimizer(model, config.local).initial_state().items():
            values = {"values": torch.empty(one.shape, device="meta")}
            as_it_is.append(Entry(OPTIMIZER + name, one.shape, "fp32", values))

    @cache
    def size(text: str) -> int:
        made = {shape: _parts(text, shape) for shape in set(shapes.values())}
        entries = [Entry(name, one, text, made[one]) for name, one in shapes.items()]
        header = parcel_header("update", config.run.name, 1, shapes, silo="a-silo")
        return entries_bytes(header, entries + as_it_is, config.link.chunk_bytes)

    return size


def _parts(text: str, shape: torch.Size) -> dict[str, Tensor]:
    """As a codec makes them, without values; of a large tensor, by what it makes of some rows."""
    codec, rows = build_codec(text), shape
    if shape.numel() > _SAMPLE and len(shape) > 1:
        rows = torch.Size([max(1, _SAMPLE // shape[1:].numel()), *shape[1:]])
    sample = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    parts = codec.fitted(lambda: [("sample", sample)]).encode(sample, {})
    share = shape.numel() / rows.numel()
    return {
        name: torch.empty(round(part.numel() * share), dtype=part.dtype, device="meta")
        for name, part in parts.items()
    }
