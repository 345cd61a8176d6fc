"""Scores of a version: on the global held-out set, and on each silo's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from photon.config import RunConfig
from photon.config.children import group_of
from photon.federation.account import mean_score
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
        node_rounds: RunState.node_rounds of now: which personal part each silo scores with.
        held: by silo and number, the newest version up to that one that the silo has; None where
            nothing leaves the machine.
    """
    own, number = list[EvalReceipt](), version.number
    personal = bool(config.parts.personal)
    tasks = [EvalTask(number, silo, node_rounds.get(silo) if personal else None) for silo in silos]
    children, told = config.federation.children, set[str]()
    for receipt in mailbox.in_task_order(
        tasks if personal else [EvalTask(number, None), *tasks], version
    ):
        if not isinstance(receipt, EvalReceipt):
            continue
        bytes_down = receipt.bytes_down or 0
        # A group gets it once, and hands it on.
        member = group_of(children, receipt.silo or "")
        unknown = receipt.bytes_down is None and receipt.silo is not None
        if unknown and held is not None and member not in told:
            told.add(member)
            last = number - 1
            bytes_down = version.bytes_down(last if member in participants else held(member, last))
        own.append(receipt)
        yield replace(receipt, bytes_down=bytes_down)
    if personal:
        yield mean_score(own)
