"""An update's way out of its node, in an order that no run file can change.

    steps   of DP-SGD are clipped and noised one by one, and need neither afterwards (Trainer)
    delta   what local steps moved: global minus local (Node)
    clip    times min(1, C / |delta|), the L2 norm over all that leaves
    noise   plus N(0, (z C)^2) on each coordinate
    codec   plus what earlier codecs left out, encoded (outbox.py)
    mask    of secure aggregation, which encodes too: photon.secure

The noise is sized for what the clip lets through, so nothing may be added or scaled between them.
Feedback comes after it: it then keeps and sends on what was left out of noised updates, which tells
no more than these do. Before the noise it would carry what was cut off, or never noised, into later
rounds. A mask goes over what is on the wire, as it has to cancel in the aggregator's sum.

Each node adds its noise itself, so nobody has to trust the aggregator for it. With noise_at = "sum"
the aggregator does (McMahan et al. 2018, arXiv 1710.06963; secure_rounds.py), and what codecs leave
out is not fed back: it would pass the clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Size, Tensor

from photon.aggregation import square_sum
from photon.config import LinkConfig
from photon.errors import PolicyError
from photon.federation.outbox import Tensors, pack
from photon.federation.private import Spending
from photon.federation.tasks import FitTask, Update, update_header
from photon.link import entries_bytes, plain_bytes
from photon.link.tensorfile import stream_sha256
from photon.privacy import gaussian, release_key
from photon.secure.member import Seal


def leaving(
    spending: Spending,
    link: LinkConfig,
    folder: Path,
    task: FitTask,
    delta: Tensors,
    shapes: Mapping[str, Size],
) -> Update:
    """What leaves a node, or a group, as the answer to this task; the same for the same delta.

    Args:
        spending: the task's place in a ledger, where this answer is noted.
        folder: of the silos' kept states.
        delta: walked more than once.
        shapes: of its tensors, in their order: a manifest's offsets have more or fewer digits by
            it, and its receipt says what it takes on the wire, to the byte.

    Raises:
        NonFiniteError: it holds NaN or infinity, and is clipped or encoded.
        CheckpointCorruptError: the node's secret, or its ledger, is not what was written.
        DiskFullError: no room for either, or for what a codec left out.
        PolicyError: this would be another answer to a question, and no epsilon is left for it; or
            nobody would clip it, or noise it.
        ProtocolError, PolicyError: see photon.secure.member.Seal.
    """
    seal = Seal(folder, task.silo, task.sealing) if task.sealing else None
    if spending.privacy.at_sum != bool(seal and seal.clip):
        raise PolicyError(
            f"nobody would noise what {task.silo} sends: "
            'privacy.noise_at = "sum" is for silos that clip and mask, each a member of the sum',
            hint='Groups, and silos of several nodes, take noise_at = "node".',
        )
    count = None
    if spending.privacy.mechanism == "client":
        delta, share = _noised(spending, delta, seal and seal.clip)
        count = seal and seal.count(within=share == 1)
    elif spending.privacy.promises:
        spending.answered(stream_sha256(delta()))
    update, header = pack(link, folder, task, delta, seal), update_header(task, shapes)
    if update.packed is None:
        size = plain_bytes(header, shapes, link.chunk_bytes)
    else:
        size = entries_bytes(header, update.packed, link.chunk_bytes)
    told = {"epsilon": spending.epsilon(), "count": count}
    receipt = replace(update.receipt, bytes_up=size, **told)
    return replace(update, receipt=receipt)


def _noised(spending: Spending, delta: Tensors, clip: float | None) -> tuple[Tensors, float]:
    """The update clipped, with the node's noise; and what the clip has left of it."""
    privacy = spending.privacy
    clip, deviation = clip or privacy.clip_norm, 0.0 if privacy.at_sum else privacy.deviation
    assert clip is not None
    squares: list[float] = []

    def measured() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in delta():
            squares.append(square_sum(name, tensor))
            yield name, tensor

    digest = stream_sha256(measured())
    share = clip / max(clip, math.sqrt(math.fsum(squares)))
    secret = spending.secret()
    # An aggregator may ask twice under one name, of another state or with another clip. All that
    # decides what leaves is hashed, or the difference of two answers were without noise; and all
    # that was asked, or the same noise would tell that two questions have the same answer.
    release = [spending.question, digest, share, deviation]
    spending.answered(release_key(secret, *release).hex())

    def noised() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in delta():
            clipped = tensor if share == 1 else tensor * share
            if deviation:
                key = release_key(secret, *release, name)
                clipped = clipped + gaussian(key, tensor.shape, deviation)
            yield name, clipped

    return noised, share
