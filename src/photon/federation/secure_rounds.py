"""A federation's rounds under secure aggregation: who is asked what, what restarts go on with.

RUN/cohorts.json has the newest rounds: the cohort, what its members dealt, and the survivors, each
on disk before anybody is asked by it. So a killed aggregator asks the same again, and gets the same
answers; members refuse anything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.config.children import LEAF
from photon.config.privacy import LEAST_SUMMED
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
from photon.secure import documents as say
from photon.secure.aggregator import SecureSum, able, closing_for, require_advert, require_dealt
from photon.secure.fixed_point import MOST_SUMMED, bits_for, whole_weights
from photon.secure.member import ROUNDS_KEPT, answer
from photon.store.disk import write_json

COHORTS_FILE = "cohorts.json"

#: The next range of a tensor over the largest magnitude of what was merged: one member's values are
#: larger than their mean's.
_HEADROOM = 3.0
#: A range moves by so much a round at most.
_MOVES = 4.0


def agreed(folder: Path, task: SecureTask) -> SecureReceipt:
    """A silo's answer to a phase; see photon.secure.member.answer."""
    try:
        return SecureReceipt(answer(folder, task.silo, task.phase, task.text))
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


@dataclass(frozen=True)
class _Attempt:
    """What is settled of an attempt at a round: texts of photon.secure's documents."""

    attempt: int
    cohort: str = ""
    dealt: dict[str, str] | None = None
    survivors: list[str] | None = None
    lost: bool = False

    def of(self) -> say.Cohort:
        return say.read(self.cohort, say.Cohort, COHORTS_FILE)


class SecureRounds:
    """Drives cohorts through their phases.

    Args:
        config: the run file, or a group's.
        folder: where COHORTS_FILE is kept.
        question: of a state's sha256 and a global step; see question_of.
        notice: told what is worth knowing.

    Attributes:
        ranges: for the round after the one that was opened.
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
        self._number, self.ranges = 0, dict[str, float]()

    def agree(
        self, drawn: Sequence[tuple[FitTask, float]], before: RunState, version: Version
    ) -> tuple[list[FitTask], dict[str, str]]:
        """Have those drawn exchange keys and shares.

        Args:
            drawn: tasks, and the weights of their updates.

        Returns:
            the tasks of those who did, as they are to be asked; and why others did not, by silo.

        Raises:
            QuorumLostError: too few did.
        """
        self._number, self._version, dropped = before.round + 1, version, dict[str, str]()
        names = sorted(task.silo for task, _ in drawn)
        kept = self._read().get(self._number)
        try:
            if kept is None or kept.lost or not {*kept.of().names} <= {*names}:
                kept = _Attempt(1 + (kept.attempt if kept is not None else 0))
                run = drawn[0][0].run
                call = say.Call(run=run, round=self._number, attempt=kept.attempt)
                check = partial(require_advert, call)
                told = self._ask(names, "advertise", lambda _: call, say.Advert, dropped, check)
                kept = replace(kept, cohort=self._cohort(drawn, told, call, before).text)
                self._keep(kept)
            cohort = kept.of()
            if kept.dealt is None:
                every, check = cohort.names, partial(require_dealt, cohort)
                told = self._ask(every, "share", lambda _: cohort, say.Dealt, dropped, check, every)
                able(cohort, told)
                kept = replace(kept, dealt={name: one.text for name, one in told.items()})
                self._keep(kept)
            assert kept.dealt is not None
            self._dealt = {n: say.read(text, say.Dealt, n) for n, text in kept.dealt.items()}
            sealing = say.Sealing(cohort=cohort, dealt=able(cohort, self._dealt))
        except QuorumLostError as error:
            left_out = "; ".join(f"{name}: {why}" for name, why in dropped.items())
            words = f"{error.message}; left out: {left_out or 'none'}"
            raise QuorumLostError(words, hint=error.hint) from None
        shapes = {name: tuple(tensor.shape) for name, tensor in version.tensors.items()}
        self._kept, self._sum = kept, SecureSum(sealing, shapes)
        for name in {*names} - {*sealing.dealt} - dropped.keys():
            dropped[name] = "is not of the cohort that dealt shares"
        tasks = [replace(one, sealing=sealing.text) for one, _ in drawn]
        return [one for one in tasks if one.silo in sealing.dealt], dropped

    def add(self, task: FitTask, update: Update) -> str | None:
        """Take an update into the sum, or say why not."""
        fixed = self._kept.survivors
        if fixed is not None and task.silo not in fixed:
            return f"came after the sum of round {self._number} was closed"
        try:
            return self._sum.add(task.silo, update.tensors)
        except OURS:
            raise
        except FAULTS as error:
            return error.message if isinstance(error, PhotonError) else repr(error)[:300]

    def open(self) -> Update:
        """The mean of the updates taken, as one update.

        Raises:
            QuorumLostError: too few to open it, or it is no honest sum.
        """
        found, sealing, survivors = self._sum, self._sum.sealing, sorted(self._sum.survivors)
        if self._kept.survivors not in (None, survivors):
            raise QuorumLostError(
                f"the sum of round {self._number} was closed with {self._kept.survivors}, of whom "
                f"not all sent their updates again: {survivors}"
            )
        self._kept = replace(self._kept, survivors=survivors)
        self._keep(self._kept)
        revealed = self._ask(
            survivors,
            "unmask",
            lambda name: closing_for(sealing, name, survivors, self._dealt),
            say.Revealed,
            silent := dict[str, str](),
            company=sealing.cohort.names,
        )
        for name, why in silent.items():
            self._notice(f"{name} unmasks nothing: {why}")
        found.open(self._dealt, revealed, self._notice)
        self.ranges = _moved(sealing.cohort.ranges, found.mean())
        return Update(Receipt(self._number, "the sum"), found.mean)

    def lost(self) -> None:
        """The attempt came to nothing; another one is another cohort."""
        if (kept := self._read().get(self._number)) is not None:
            self._keep(replace(kept, lost=True))

    def _ask(
        self,
        names: Sequence[str],
        phase: Phase,
        document: Callable[[str], say.Document],
        kind: type[Any],
        dropped: dict[str, str],
        check: Callable[[str, Any], None] = lambda name, one: None,
        company: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Documents by silo; why there is none, into `dropped`."""
        number, told, found = self._number, tuple(company or names), dict[str, Any]()
        tasks = [SecureTask(number, one, phase, document(one).text, told) for one in names]
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
    ) -> say.Cohort:
        config, tensors = self._config, self._version.tensors
        there = sorted((task.silo, task.steps, w) for task, w in drawn if task.silo in adverts)
        floor = config.quorum_of(len(drawn))
        if len(there) < floor:
            raise QuorumLostError(
                f"round {call.round} has {len(there)} silos with keys for secure aggregation, "
                f"{floor} are needed",
                hint="A sum of fewer than three tells of single updates; have more silos here.",
            )
        weights = whole_weights([share for _, _, share in there])
        first = lr_sum(config, before.global_step) * min(1e6, step_over_lr(config, before, 1))
        first = max(first + 4 * config.privacy.deviation, 1e-12)
        return say.Cohort(
            **call.model_dump(),
            question=self._question(tensors_sha256(tensors), before.global_step),
            bits=bits_for(len(there)),
            floor=floor,
            members=[
                say.Member(name=name, weight=weight, steps=steps, advert=adverts[name])
                for (name, steps, _), weight in zip(there, weights, strict=True)
            ],
            ranges={name: before.ranges.get(name, first) for name in sorted(tensors)},
        )

    def _read(self) -> dict[int, _Attempt]:
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            return {int(number): _Attempt(**one) for number, one in record["rounds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"can't read {self._path}: {str(error)[:200]}",
                hint="Restore it from a backup: silos answer by what is in it, and refuse the "
                "round that was under way without it.",
            ) from error

    def _keep(self, kept: _Attempt) -> None:
        """On disk when this returns."""
        rounds = {n: one for n, one in self._read().items() if n > self._number - ROUNDS_KEPT}
        record = {str(n): asdict(one) for n, one in sorted({**rounds, self._number: kept}.items())}
        write_json(self._path, {"rounds": record}, "a round's cohort", mode=0o600)


def _moved(ranges: Mapping[str, float], mean: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    moved = dict[str, float]()
    for name, tensor in mean:
        wanted = _HEADROOM * float(tensor.abs().max()) if tensor.numel() else 0.0
        moved[name] = min(max(wanted, ranges[name] / _MOVES, 1e-12), ranges[name] * _MOVES, 1e29)
    return moved
