"""A federation's rounds under secure aggregation: who is asked what, what restarts go on with.

RUN/cohorts.json has the newest rounds: the cohort, what its members dealt, and the survivors, each
on disk before anybody is asked by it. So a killed aggregator asks the same again, and gets the same
answers; members refuse anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    LinkError,
    MachineError,
    PhotonError,
    ProtocolError,
    QuorumLostError,
)
from photon.federation.checkpoint import RunState
from photon.federation.engine import Mailbox, Version
from photon.federation.norm_bound import lr_sum, step_over_lr
from photon.federation.tasks import (
    FitTask,
    Phase,
    Receipt,
    SecureReceipt,
    SecureTask,
    Update,
)
from photon.link import tensors_sha256
from photon.secure.aggregator import SecureSum, able, closing_for, require_advert, require_dealt
from photon.secure.documents import (
    Advert,
    Call,
    Cohort,
    Dealt,
    Document,
    Member,
    Revealed,
    Sealing,
    read,
)
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
    its gradient, and all others for nothing.

    Args:
        config: the run file as members have it (envelopes.dictated).
    """
    alike = {name: table for name, table in config.items() if name != "run"}
    record = [alike, state_sha256, global_step]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Attempt:
    """What was settled of an attempt at a round; text is that of photon.secure's documents."""

    attempt: int
    cohort: str | None = None
    dealt: dict[str, str] | None = None
    survivors: list[str] | None = None
    lost: bool = False


class SecureRounds:
    """Drives cohorts through their phases.

    Args:
        config: the run file, or a group's.
        folder: where COHORTS_FILE is kept.
        question: of a state's sha256 and a global step: question_of.
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
        self.ranges: dict[str, float] = {}

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
        names = tuple(sorted(task.silo for task, _ in drawn))
        kept = self._read().get(self._number)
        if kept is None or kept.lost or not self._goes_on(kept, names):
            kept = _Attempt((kept.attempt if kept else 0) + bool(kept is None or kept.cohort))
            call = Call(run=drawn[0][0].run, round=self._number, attempt=kept.attempt)
            adverts = self._ask(
                names, "advertise", lambda _: call, Advert, dropped, partial(require_advert, call)
            )
            with _reasons(dropped):
                cohort = self._cohort(drawn, adverts, kept.attempt, before)
            kept = replace(kept, cohort=cohort.text)
            self._keep(kept)
        assert kept.cohort is not None
        cohort = read(kept.cohort, Cohort, COHORTS_FILE)
        if kept.dealt is None:
            require = partial(require_dealt, cohort)
            found = self._ask(
                cohort.names, "share", lambda _: cohort, Dealt, dropped, require, cohort.names
            )
            with _reasons(dropped):
                able(cohort, found)
            kept = replace(kept, dealt={name: one.text for name, one in found.items()})
            self._keep(kept)
        assert kept.dealt is not None
        self._dealt = {name: read(text, Dealt, name) for name, text in kept.dealt.items()}
        sealing = Sealing(cohort=cohort, dealt=able(cohort, self._dealt))
        shapes = {name: tuple(tensor.shape) for name, tensor in version.tensors.items()}
        self._kept, self._sum = kept, SecureSum(sealing, shapes)
        for name in sorted({*names} - {*sealing.dealt} - dropped.keys()):
            dropped[name] = "is not of the cohort that dealt shares before"
        tasks = [replace(one, sealing=sealing.text) for one, _ in drawn]
        return [one for one in tasks if one.silo in sealing.dealt], dropped

    def add(self, task: FitTask, update: Update) -> str | None:
        """Take an update into the sum, or say why not."""
        fixed = self._kept.survivors
        if fixed is not None and task.silo not in fixed:
            return f"came after the sum of round {self._number} was closed"
        try:
            return self._sum.add(task.silo, update.tensors)
        except (MachineError, LinkError):
            raise
        except (PhotonError, ValueError, LookupError, RuntimeError, TypeError) as error:
            return error.message if isinstance(error, PhotonError) else repr(error)[:300]

    def open(self) -> Update:
        """The mean of the updates taken, as one update.

        Raises:
            QuorumLostError: too few to open it, or it is no honest sum.
        """
        found, sealing = self._sum, self._sum.sealing
        if self._kept.survivors not in (None, sorted(found.survivors)):
            raise QuorumLostError(
                f"the sum of round {self._number} was closed with other updates than came again: "
                f"{sorted(set(self._kept.survivors or ()) - set(found.survivors))} are missing"
            )
        self._kept = replace(self._kept, survivors=sorted(found.survivors))
        self._keep(self._kept)
        silent = dict[str, str]()
        revealed = self._ask(
            sorted(found.survivors),
            "unmask",
            lambda name: closing_for(sealing, name, found.survivors, self._dealt),
            Revealed,
            silent,
            company=sealing.cohort.names,
        )
        for name, why in silent.items():
            self._notice(f"{name} unmasks nothing: {why}")
        found.open(self._dealt, revealed, self._notice)
        self.ranges = _moved(sealing.cohort.ranges, found.mean())
        return Update(Receipt(self._number, "the sum"), lambda: iter(found.mean()))

    def lost(self) -> None:
        """The attempt came to nothing; another one is another cohort."""
        kept = self._read().get(self._number)
        if kept is not None:
            self._keep(replace(kept, lost=True))

    # --- asking -------------------------------------------------------------------------------

    def _ask(
        self,
        names: Sequence[str],
        phase: Phase,
        document: Callable[[str], Document],
        kind: type[Any],
        dropped: dict[str, str],
        require: Callable[[str, Any], None] = lambda name, one: None,
        company: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Documents by silo; why there is none, into `dropped`."""
        company = tuple(company) or tuple(names)
        tasks = [
            SecureTask(self._number, name, phase, document(name).text, company) for name in names
        ]
        found = dict[str, Any]()
        for task, given in zip(
            tasks, self._mailbox.in_task_order(tasks, self._version), strict=True
        ):
            assert isinstance(given, SecureReceipt)
            try:
                if given.failure is not None:
                    raise ProtocolError(given.failure)
                one = read(given.text, kind, task.silo)
                require(task.silo, one)
                found[task.silo] = one
            except ProtocolError as error:
                dropped[task.silo] = error.message
        return found

    def _cohort(
        self,
        drawn: Sequence[tuple[FitTask, float]],
        adverts: Mapping[str, Advert],
        attempt: int,
        before: RunState,
    ) -> Cohort:
        there = {task.silo: (task, share) for task, share in drawn if task.silo in adverts}
        names, floor = sorted(there), self._config.quorum_of(len(drawn))
        if len(names) < floor:
            raise QuorumLostError(
                f"round {self._number} has {len(names)} silos with keys for secure aggregation, "
                f"{floor} are needed",
                hint="A sum of fewer than three tells of single updates; have more silos here.",
            )
        weights = whole_weights([there[name][1] for name in names])
        tensors = self._version.tensors
        first = lr_sum(self._config, before.global_step) * min(
            1e6, step_over_lr(self._config, before, 1)
        )
        first = max(first + 4 * self._config.privacy.deviation, 1e-12)
        return Cohort(
            run=drawn[0][0].run,
            round=self._number,
            attempt=attempt,
            question=self._question(tensors_sha256(tensors), before.global_step),
            bits=bits_for(len(names)),
            floor=floor,
            members=[
                Member(
                    name=name,
                    weight=weight,
                    steps=there[name][0].steps,
                    advert=adverts[name],
                )
                for name, weight in zip(names, weights, strict=True)
            ],
            ranges={name: before.ranges.get(name, first) for name in sorted(tensors)},
        )

    # --- on disk ------------------------------------------------------------------------------

    def _goes_on(self, kept: _Attempt, names: Sequence[str]) -> bool:
        if kept.cohort is None:
            return False
        return {*read(kept.cohort, Cohort, COHORTS_FILE).names} <= {*names}

    def _read(self) -> dict[int, _Attempt]:
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            return {int(number): _Attempt(**one) for number, one in record["rounds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"can't read {self._path}: {str(error)[:200]}",
                hint="Restore it from a backup: silos answer by what is in it. Without it they "
                "refuse the round that was under way, and the run stays at its last checkpoint.",
            ) from error

    def _keep(self, kept: _Attempt) -> None:
        rounds = {n: one for n, one in self._read().items() if n > self._number - ROUNDS_KEPT}
        rounds[self._number] = kept
        record = {str(number): asdict(rounds[number]) for number in sorted(rounds)}
        write_json(self._path, {"rounds": record}, "a round's cohort", mode=0o600)


@contextlib.contextmanager
def _reasons(dropped: Mapping[str, str]) -> Iterator[None]:
    """A round that is lost says why silos were left out of it."""
    try:
        yield
    except QuorumLostError as error:
        left_out = "; ".join(f"{name}: {why}" for name, why in dropped.items())
        words = f"{error.message}; left out: {left_out or 'none'}"
        raise QuorumLostError(words, hint=error.hint) from None


def planned_tokens(config: RunConfig, task: FitTask) -> int:
    """That a task's update is weighted by: known before it is trained."""
    leaves = config.federation.children.get(task.silo, LEAF).leaves
    return task.steps * leaves * config.local.batch_size * config.data.sequence_length


def require_room(members: int, where: str) -> None:
    """Raise IncompatibleConfigError where a sum of so many has no room, or would tell too much."""
    if not LEAST_SUMMED <= members <= MOST_SUMMED:
        raise IncompatibleConfigError(
            f"{where} is of {members} silos a round; secure aggregation takes {LEAST_SUMMED} to "
            f"{MOST_SUMMED:,}: of two silos each knows the other's update from the sum, and words "
            "of 16 bits have no room for more",
            hint="Have more silos take part, or leave privacy.secure_aggregation out.",
        )


def _moved(ranges: Mapping[str, float], mean: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    moved = dict[str, float]()
    for name, tensor in mean:
        old = ranges[name]
        wanted = _HEADROOM * float(tensor.abs().max()) if tensor.numel() else old
        moved[name] = min(max(wanted, old / _MOVES, 1e-12), old * _MOVES, 1e29)
    return moved
