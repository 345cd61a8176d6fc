"""Scores of a version: on the global held-out set, and on each silo's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from photon.config import RunConfig
from photon.config.children import group_of
from photon.federation.engine import Mailbox, Version
from photon.federation.tasks import EvalReceipt, EvalTask


def scores(
    config: RunConfig,
    mailbox: Mailbox,
    version: Version,
    silos: Sequence[str],
    participants: Collection[str],
    node_rounds: Mapping[str, int],
    held: Callable[[str, int], int | None] | None,
) -> Iterator[EvalReceipt]:
    """Score a version.

    Where silos have personal parts nobody has a whole model but for their own text, and the global
    score, which then comes last, is the mean of theirs.

    Args:
        silos: on whose held-out text, besides the global set.
        participants: of the round that led to the version, who hold the one before.
        node_rounds: RunState.node_rounds of now: with which parts of its own each silo scores.
        held: by silo and number, the newest version up to that one that the silo has; None where
            nothing leaves the machine.
    """
    own, told, number = list[EvalReceipt](), set[str](), version.number
    personal = bool(config.parts.personal)
    tasks = [] if personal else [EvalTask(number, None)]
    # Of a group's member, the group knows what it keeps.
    kept = {one: node_rounds.get(group_of(config.federation.children, one)) for one in silos}
    tasks += [EvalTask(number, one, kept[one] if config.parts.kept else None) for one in silos]
    for receipt in mailbox.in_task_order(tasks, version):
        if not isinstance(receipt, EvalReceipt):
            continue
        bytes_down = receipt.bytes_down or 0
        # A group gets it once, and hands it on.
        member = group_of(config.federation.children, receipt.silo or "")
        unknown = receipt.bytes_down is None and receipt.silo is not None
        if unknown and held is not None and member not in told:
            told.add(member)
            last = number - 1
            bytes_down = version.bytes_down(last if member in participants else held(member, last))
        own.append(receipt)
        yield replace(receipt, bytes_down=bytes_down)
    if personal:
        yield mean_score(own)


def mean_score(own: Sequence[EvalReceipt]) -> EvalReceipt:
    """The silos' own scores as one, weighted by tokens; its loss is NaN where there are none."""
    tokens = sum(one.tokens for one in own)
    nats = [one.loss * one.tokens for one in own]
    loss = math.fsum(nats) / tokens if tokens else math.nan
    bits_per_byte = None
    # Nats over bits a byte are bytes, but for a factor that is the same for all.
    if own and all(one.bits_per_byte for one in own):
        sizes = [part / (one.bits_per_byte or 1) for part, one in zip(nats, own, strict=True)]
        bits_per_byte = math.fsum(nats) / math.fsum(sizes)
    figures = {"loss": loss, "bits_per_byte": bits_per_byte, "tokens": tokens}
    return EvalReceipt(None, **figures, eval_s=0.0, bytes_down=0)
