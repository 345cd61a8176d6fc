"""A federation's rounds under secure aggregation: who is asked what, what restarts go on with.

RUN/cohorts.json has the newest rounds: the cohort, what its members dealt, and the survivors, each
on disk before anybody is asked by it. So a killed aggregator asks the same again, and gets the same
answers; members refuse anything else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Size, Tensor

from photon.config import PrivacyConfig, RunConfig
from photon.config.children import LEAF
from photon.config.privacy import CLIP_MOVES, LEAST_SUMMED
from photon.errors import (
    CheckpointCorruptError,
    IncompatibleConfigError,
    MachineError,
    PhotonError,
    ProtocolError,
    QuorumLostError,
)
from photon.federation.checkpoint import RunState
from photon.federation.engine import Mailbox, Version
from photon.federation.merging import FAULTS, OURS
from photon.federation.norm_bound import lr_sum, step_over_lr
from photon.federation.tasks import FitTask, Phase, Receipt, SecureReceipt, SecureTask, Update
from photon.link import tensors_sha256
from photon.privacy import gaussian, node_secret, release_key
from photon.privacy.epsilon import settled
from photon.secure import documents as say
from photon.secure.aggregator import SecureSum, require_advert, require_dealt
from photon.secure.fixed_point import MOST_SUMMED, FixedPoint, bits_for, whole_weights
from photon.secure.masks import Words
from photon.secure.member import COUNT, ROUNDS_KEPT, Party
from photon.store.disk import write_json

COHORTS_FILE = "cohorts.json"

#: The next range of a tensor over the largest magnitude of what was merged: one member's values are
#: larger than their mean's.
_HEADROOM = 3.0
#: A range moves by so much a round at most.
_MOVES = 4.0
#: Of an adaptive clip: its step, and the part of the budget that the count of updates has.
_CLIP_RATE, _COUNTED = 0.2, 0.01
#: Deviations of noise that a range has room for: beyond it the sum goes round the ring.
_ROOM = 6.0

_D = TypeVar("_D", bound=say.Document)


def agreed(folder: Path, task: SecureTask) -> SecureReceipt:
    """A silo's answer to a phase."""
    try:
        return SecureReceipt(Party(folder, task.silo).answer(task.phase, task.text))
    except MachineError:
        raise
    except PhotonError as error:
        return SecureReceipt(failure=error.message)


def question_of(config: Mapping[str, Any], state_sha256: str, global_step: int) -> str:
    """sha256 of what all members of a cohort are asked alike: else one of them could be asked for
    its update, and all others for none.

    Args:
        config: the run file as members have it (envelopes.dictated).
    """
    alike = {name: table for name, table in config.items() if name != "run"}
    record = json.dumps([alike, state_sha256, global_step], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def planned_tokens(config: RunConfig, task: FitTask) -> int:
    """That a task's update is weighted by: known before it is trained."""
    leaves = config.federation.children.get(task.silo, LEAF).leaves
    return task.steps * leaves * config.local.batch_size * config.data.sequence_length


def require_room(members: int) -> None:
    """Raise IncompatibleConfigError where a sum of so many has no room, or tells too much."""
    if not LEAST_SUMMED <= members <= MOST_SUMMED:
        raise IncompatibleConfigError(
            f"this run is of {members} silos a round; secure aggregation takes {LEAST_SUMMED} to "
            f"{MOST_SUMMED:,}: of a sum of two each knows both, and words of 16 bits have no room "
            "for more",
            hint="Have other silos take part, or leave privacy.secure_aggregation out.",
        )


class Attempt(say.Document):
    """What is settled of an attempt at a round.

    Attributes:
        lost: it came to nothing.
        suspects: one of them spoiled its sum.
    """

    attempt: int
    cohort: say.Cohort | None = None
    dealt: dict[str, say.Dealt] | None = None
    survivors: list[str] | None = None
    lost: bool = False
    suspects: tuple[str, ...] = ()


class _Book(say.Document):
    rounds: dict[int, Attempt]


class SecureRounds:
    """Drives cohorts through their phases.

    Args:
        config: the run file, or a group's.
        folder: where COHORTS_FILE is kept.
        question: of a state's sha256 and a global step; see question_of.
        notice: told what is worth knowing.

    Attributes:
        changes: of a run's state, by the round that was opened.
        privacy: of the level, with its noise_multiplier.

    Raises:
        CheckpointCorruptError: COHORTS_FILE can't be read.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        mailbox: Mailbox,
        question: Callable[[str, int], str],
        notice: Callable[[str], None],
    ) -> None:
        self._config, self._path, self._mailbox = config, folder / COHORTS_FILE, mailbox
        self._question, self._notice = question, notice
        self._number, self.changes, self._folder = 0, dict[str, Any](), folder
        self.privacy = settled(config).privacy
        try:
            self._rounds = say.read(self._path.read_text("utf-8"), _Book, COHORTS_FILE).rounds
        except FileNotFoundError:
            self._rounds = {}
        except (OSError, ValueError, ProtocolError) as error:
            raise CheckpointCorruptError(
                f"can't read {self._path}: {str(error)[:200]}",
                hint="Restore it from a backup: silos answer by what is in it, and refuse the "
                "round that was under way without it.",
            ) from error

    def agree(
        self, drawn: Sequence[tuple[FitTask, float]], before: RunState, version: Version
    ) -> tuple[list[FitTask], dict[str, str]]:
        """Have those drawn exchange keys and shares.

        Args:
            drawn: tasks, and the weights of their updates.

        Returns:
            the tasks of those who did, as they are to be asked; and why others did not, by silo.

        Raises:
            QuorumLostError: too few did, or updates of the round have left, for no sum.
        """
        self._number, self._version, dropped = before.round + 1, version, dict[str, str]()
        self._sum, names, number = None, sorted(task.silo for task, _ in drawn), self._number
        kept = self._rounds.get(number, Attempt(attempt=0))
        if kept.lost:
            raise QuorumLostError(f"updates of round {number} have left their silos, for no sum")
        out = self._left_out(names) if kept.dealt is None else ()
        dropped |= dict.fromkeys(out, "may have spoiled the sum of an earlier round")
        names = [name for name in names if name not in out]
        while kept.dealt is None:
            if kept.cohort is None or not {*kept.cohort.names} <= {*names}:
                call = say.Call(run=drawn[0][0].run, round=number, attempt=kept.attempt + 1)
                check = partial(require_advert, call)
                told = self._ask(names, "advertise", call, say.Advert, dropped, check)
                cohort = self._cohort(drawn, told, call, before, dropped)
                kept = self._keep(Attempt(attempt=call.attempt, cohort=cohort))
            cohort = kept.cohort
            assert cohort is not None
            check = partial(require_dealt, cohort)
            dealt = self._ask(cohort.names, "share", cohort, say.Dealt, dropped, check)
            whole, names = cohort.names == [*dealt], [*dealt]
            # Where some did not, another attempt is of those who did.
            kept = self._keep(kept, dealt=dealt) if whole else self._keep(kept, cohort=None)
        cohort = kept.cohort
        assert cohort is not None
        shapes = {name: tuple(tensor.shape) for name, tensor in version.tensors.items()}
        self._sum = SecureSum(cohort, shapes)
        tasks = [replace(task, sealing=cohort.text) for task, _ in drawn]
        for task in tasks:
            if task.silo not in cohort.by_name:
                dropped.setdefault(task.silo, "is not of the cohort that dealt shares")
        return [one for one in tasks if one.silo in cohort.by_name], dropped

    def add(self, task: FitTask, update: Update) -> str | None:
        """Take an update into the sum, or say why not."""
        fixed = self._rounds[self._number].survivors
        if fixed is not None and task.silo not in fixed:
            return f"came after the sum of round {self._number} was closed"
        assert self._sum is not None
        try:
            return self._sum.add(task.silo, update.tensors(), update.receipt.count)
        except OURS:
            raise
        except FAULTS as error:
            return error.message if isinstance(error, PhotonError) else repr(error)[:300]

    def open(self) -> Update:
        """The mean of the updates taken, as one update.

        Raises:
            QuorumLostError: too few to open it, or it is no honest sum.
        """
        kept, found = self._rounds[self._number], self._sum
        assert found is not None
        assert kept.dealt is not None
        survivors = sorted(found.survivors)
        if kept.survivors not in (None, survivors):
            raise QuorumLostError(
                f"it was closed with {kept.survivors}, of whom not all sent their updates again"
            )
        self._keep(kept, survivors=survivors)
        silent, closing = dict[str, str](), say.Closing(cohort=found.cohort, survivors=survivors)
        revealed = self._ask(survivors, "unmask", closing, say.Revealed, silent)
        for name, why in silent.items():
            self._notice(f"{name} unmasks nothing: {why}")
        noise = None
        if (clip := found.cohort.clip) is not None:
            key = partial(release_key, node_secret(self._folder), found.cohort.id, survivors)
            noise = partial(noise_of, found, self.privacy, key)
        found.open(kept.dealt, revealed, self._notice, noise)
        if clip is None:
            self.changes = {"ranges": _moved(found.cohort.ranges, found.mean())}
        elif self.privacy.clip_quantile is not None:
            self.changes = {"clip_norm": next_clip(found, self.privacy)}
        return Update(Receipt(self._number, "the sum"), found.mean)

    def suspect_all(self) -> None:
        """One of those in the sum made it what it is."""
        if self._sum is not None:
            self._sum.suspects = tuple(sorted(self._sum.survivors))

    def lost(self) -> bool:
        """The attempt came to nothing.

        Returns:
            whether the round is passed over: it was closed, or lost before with updates that had
            left, which nobody gives a second time. Not where rounds were lost as often in a row as
            would have found one member that spoils them.
        """
        if (kept := self._rounds.get(self._number)) is None or kept.dealt is None:
            return False
        self._keep(kept, lost=True, suspects=self._sum.suspects if self._sum else kept.suspects)
        in_a_row = 1
        while (one := self._rounds.get(self._number - in_a_row)) is not None and one.lost:
            in_a_row += 1
        return kept.lost or (kept.survivors is not None and in_a_row <= len(kept.dealt))

    def _left_out(self, names: Sequence[str]) -> set[str]:
        """Half of those among whom somebody spoiled sums, as far as a quorum is left.

        Where a sum without them is good, it is among them, and halves again; else among the others.
        """
        suspects = set[str]()
        for _, one in sorted(self._rounds.items()):
            if one.suspects:
                suspects = suspects.intersection(one.suspects) or set(one.suspects)
            elif one.survivors is not None and not one.lost:
                suspects -= {*one.survivors}
        spare = len(names) - self._config.quorum_of(len(names))
        here = sorted(suspects.intersection(names))
        return set(here[: max(0, min(spare, (len(here) + 1) // 2))])

    def _ask(
        self,
        names: Sequence[str],
        phase: Phase,
        document: say.Document,
        kind: type[_D],
        dropped: dict[str, str],
        check: Callable[[str, _D], None] = lambda name, one: None,
    ) -> dict[str, _D]:
        """Documents by silo; why there is none, into `dropped`."""
        found, company = dict[str, _D](), tuple(names)
        if phase != "advertise":
            cohort = self._rounds[self._number].cohort
            assert cohort is not None
            company = tuple(cohort.names)
        tasks = [SecureTask(self._number, one, phase, document.text, company) for one in names]
        answers = self._mailbox.in_task_order(tasks, self._version)
        for name, given in zip(names, answers, strict=True):
            assert isinstance(given, SecureReceipt)
            try:
                if given.failure is not None:
                    raise ProtocolError(given.failure)
                one = say.read(given.text, kind, name)
                check(name, one)
                found[name] = one
            except ProtocolError as error:
                dropped[name] = error.message
        return found

    def _cohort(
        self,
        drawn: Sequence[tuple[FitTask, float]],
        adverts: Mapping[str, say.Advert],
        call: say.Call,
        before: RunState,
        dropped: Mapping[str, str],
    ) -> say.Cohort:
        config, tensors = self._config, self._version.tensors
        there = sorted((task.silo, task.steps, w) for task, w in drawn if task.silo in adverts)
        floor = config.quorum_of(len(drawn))
        if len(there) < floor:
            why = "; ".join(f"{name}: {why}" for name, why in dropped.items())
            raise QuorumLostError(
                f"round {call.round} has {len(there)} silos with keys for secure aggregation, "
                f"{floor} are needed; left out: {why or 'none'}"
            )
        weights = whole_weights([share for _, _, share in there])
        first = lr_sum(config, before.global_step) * min(1e6, step_over_lr(config, before, 1))
        privacy, clip = self.privacy, None
        if privacy.at_sum:
            clip = before.clip_norm or privacy.clip_norm or 0.0
            first = min(first, clip) + _ROOM * _deviation(privacy, clip, weights)
        else:
            first += 4 * privacy.deviation
        first = max(first, 1e-12)
        return say.Cohort(
            **call.model_dump(),
            question=self._question(tensors_sha256(tensors), before.global_step),
            # Beside noise rounding to 0 is to take next to nothing.
            bits=bits_for(len(there)) if clip is None else say.MOST_BITS,
            floor=floor,
            members=[
                say.Member(name=name, weight=weight, steps=steps, advert=adverts[name])
                for (name, steps, _), weight in zip(there, weights, strict=True)
            ],
            ranges={name: before.ranges.get(name, first) for name in sorted(tensors)},
            clip=clip,
            counted=privacy.clip_quantile is not None,
        )

    def _keep(self, kept: Attempt, **changes: Any) -> Attempt:
        """On disk when this returns."""
        kept = kept.model_copy(update=changes)
        rounds = {n: one for n, one in self._rounds.items() if n > self._number - ROUNDS_KEPT}
        self._rounds = dict(sorted({**rounds, self._number: kept}.items()))
        record = _Book(rounds=self._rounds).model_dump(mode="json")
        write_json(self._path, record, "a round's cohort", mode=0o600)
        return kept


def noise_of(
    found: SecureSum, privacy: PrivacyConfig, key: Callable[..., bytes], name: str, size: int
) -> Words:
    """Of a sum, in its own words: of the count N(0, (z / sqrt(_COUNTED))^2), of all tensors
    together what leaves the rest of the budget: 1 / z^2 is both costs.

    Args:
        key: of noise, by words; the same give the same noise.
    """
    if name == COUNT:
        deviation = (privacy.noise_multiplier or 0.0) / math.sqrt(_COUNTED)
    else:
        unit = FixedPoint.of(found.cohort).unit(found.cohort.ranges[name]) / sum(found.weights)
        deviation = _deviation(privacy, found.cohort.clip or 0.0, found.weights) / unit
    if not deviation:
        return np.zeros(size, np.uint16)
    return gaussian(key(name), Size([size]), deviation).round_().long().numpy().astype(np.uint16)


def _deviation(privacy: PrivacyConfig, clip: float, weights: Sequence[int]) -> float:
    """Of the noise on a mean of updates clipped to C: z C max w / W, where none of them moves it by
    more than C max w / W; and more where updates are counted, too."""
    z = privacy.noise_multiplier or 0.0
    share = 1 - _COUNTED if privacy.clip_quantile is not None else 1.0
    return z / math.sqrt(share) * clip * max(weights) / sum(weights)


def next_clip(found: SecureSum, privacy: PrivacyConfig) -> float:
    """C exp(-rate (within - clip_quantile)), of the part of updates that were within C, as a count
    with noise tells it (Andrew et al. 2021, arXiv 1905.03871). A member is 1 or -1 of the count.
    """
    clip, first = found.cohort.clip or 0.0, privacy.clip_norm or 0.0
    within = (1 + found.within() / len(found.survivors)) / 2
    moved = clip * math.exp(-_CLIP_RATE * (within - (privacy.clip_quantile or 0.0)))
    return min(max(moved, first / CLIP_MOVES), first * CLIP_MOVES)


def _moved(ranges: Mapping[str, float], mean: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    moved = dict[str, float]()
    for name, tensor in mean:
        wanted = _HEADROOM * float(tensor.abs().max()) if tensor.numel() else 0.0
        moved[name] = min(max(wanted, ranges[name] / _MOVES, 1e-12), ranges[name] * _MOVES, 1e29)
    return moved
