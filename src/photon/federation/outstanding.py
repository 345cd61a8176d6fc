"""Tasks that are not answered yet: whom to ask, and whom to go on waiting for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.config.children import whose_turn
from photon.federation.checkpoint import RunState
from photon.federation.engine import Engine, Mailbox, Version
from photon.federation.pace import Book, left_s, unequal_steps
from photon.federation.sampling import Candidates, sample_participants
from photon.federation.server import Server
from photon.federation.tasks import FitTask, Update


class Order:
    """RUN/order.jsonl: in which order a round's updates were merged, as a resume has to merge them.

    A line an update, written before it is merged; of the newest round only.

    Args:
        path: None: nothing is kept, as where the order is that of tasks.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._number = 0  # of what is on disk, as far as that is known

    def of(self, number: int, tasks: Sequence[FitTask]) -> list[FitTask]:
        """Those of the tasks whose updates round `number` is known to have begun with, in order."""
        if self._path is None or not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        if lines and lines[0].startswith(f"[{number},"):
            self._number = number
        named = {_line(number, task): task for task in tasks}
        return list(dict.fromkeys(named[line] for line in lines if line in named))

    def note(self, number: int, task: FitTask) -> None:
        """The update of this task is merged next into round `number`, which `of` was asked for."""
        if self._path is None:
            return
        mode = "a" if number == self._number else "w"
        self._number = number
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(_line(number, task) + "\n")


def _line(number: int, task: FitTask) -> str:
    return json.dumps([number, task.round, task.silo])


@dataclass(frozen=True)
class Going:
    """A task that was handed in and is not answered yet.

    Attributes:
        share: weight of its update before tokens count.
        bytes_down: what its participant gets to start, on the wire.
    """

    version: Version
    share: float
    bytes_down: int


class Outstanding:
    """Asks participants, and takes their answers at the run's pace.

    Args:
        config: the run file.
        mailbox: of the engine that carries tasks.
        order: in which updates were merged by a process before this one.
        pooled: see Federation.
    """

    def __init__(
        self,
        config: RunConfig,
        mailbox: Mailbox,
        order: Order,
        pooled: Sequence[str],
    ) -> None:
        self._config = config
        self._mailbox = mailbox
        self._engine: Engine = mailbox.engine
        self._order = order
        self._pooled = tuple(pooled)
        self._going: dict[FitTask, Going] = {}

    def __len__(self) -> int:
        return len(self._going)

    @property
    def silos(self) -> list[str]:
        """Who is at work, in the order of being asked."""
        return [task.silo for task in self._going]

    def book(self, before: RunState) -> Book:
        """Of a round that begins now."""
        asked = len(self._going)
        most = min(self._config.federation.sample or asked, asked)
        return Book(most, self._config.quorum_of(asked), self._engine.now_s, before.quorum_s)

    def ask(
        self,
        before: RunState,
        candidates: Candidates,
        server: Server,
        agree: Callable[[dict[FitTask, Going]], dict[FitTask, Going]] | None = None,
    ) -> list[FitTask]:
        """Draw participants among those who are idle, and hand their tasks in.

        Args:
            agree: what is done before; gives those tasks that are to be handed in.

        Returns:
            All that were drawn.
        """
        config, busy = self._config, set(self.silos)
        turn = whose_turn(config.federation, candidates.tokens, before.round + 1)
        tokens = {silo: candidates.tokens[silo] for silo in turn if silo not in busy}
        count = config.federation.sample
        if count is not None and config.federation.levels == "in_turn":
            count = min(count, len(tokens))
        if count is not None and config.federation.pace != "synchronous":
            count = max(0, min(len(tokens), count - len(busy) + config.federation.over_sample))
        drawn = sample_participants(
            tokens,
            count=count,
            sampling=config.federation.sampling,
            seed=config.run.seed,
            round_number=before.round + 1,
            attempt=candidates.attempt,
        )
        by_data = config.federation.weighting == "data"
        steps: dict[str, int] = {}
        if config.federation.unequal_steps:
            steps = unequal_steps(config.local.steps, before.speeds)
        new = dict[FitTask, Going]()
        # Silos before groups: an engine lets groups work when these are done.
        children = config.federation.children
        for silo, times in sorted(Counter(drawn).items(), key=lambda one: one[0] in children):
            task = FitTask(
                run=config.run.name,
                round=before.round + 1,
                silo=silo,
                global_step=before.global_step,
                steps=steps.get(silo, config.local.steps),
                node_round=before.node_rounds.get(silo),
                cursor=before.cursors.get(silo, 0),
                texts=tuple(candidates.texts) or self._pooled,
            )
            share = float(times * (tokens[silo] if by_data else 1))
            version = server.version
            if mine := server.residuals.waiting(silo):
                version = replace(version, residuals=mine)
            if agree is None:
                self._engine.submit(task, version)  # at once: whoever is to work on it has begun
            down = 0 if self._pooled else version.bytes_down(self.held(before, silo, before.round))
            down += sum(one.bytes for one in version.residuals)
            new[task] = Going(version, share, down)
        if agree is None:
            self._going |= new
            return [*new]
        for task, going in agree(new).items():
            self._going[task] = going
            self._engine.submit(task, going.version)
        return [*new]

    def held(self, before: RunState, silo: str, last: int) -> int | None:
        """The newest version up to `last` that a silo has: it trained from it, or scored it."""
        took_part = before.node_rounds.get(silo)
        held = [] if took_part is None else [took_part - 1]
        every = self._config.eval.every
        if self._config.eval.per_silo and every and last >= 0:
            held.append(last - last % every)
        return max(held, default=None)

    def arriving(self, number: int, book: Book) -> Iterator[tuple[FitTask, Going, Update]]:
        """Updates, until the pace has the round closed.

        First in the order in which a process before this one merged them, as far as it came.
        """
        turn, here = self._order.of(number, list(self._going)), dict[FitTask, Update]()
        replayed = len(turn)
        if self._config.federation.in_task_order:
            turn += [task for task in self._going if task not in turn]
        while True:
            while (task := turn[0] if turn else next(iter(here), None)) in here:
                assert task is not None
                turn, replayed = turn[1:], replayed - 1
                self._order.note(number, task)
                yield task, self._going.pop(task), here.pop(task)
            book.now_s = self._engine.now_s
            wait_s = math.inf if replayed > 0 else left_s(self._config.federation, book)
            waiting = [one for one in self._going if one not in here]
            if wait_s <= 0 or not waiting:
                break
            for one, answer in self._mailbox.take(waiting, wait_s):
                assert isinstance(one, FitTask)
                assert isinstance(answer, Update)
                here[one] = answer
        # Here in time, behind one that was not.
        for task in sorted(here, key=[*turn, *here].index):
            self._order.note(number, task)
            yield task, self._going.pop(task), here[task]

    def left_behind(self, number: int, book: Book) -> Iterator[tuple[FitTask, str]]:
        """Who is late, if the pace does not go on listening to it, or for too long; and why."""
        limits = self._config.federation
        for task in list(self._going):
            missed = number + 1 - task.round  # merges, when it answers next
            if limits.keeps_late and missed <= limits.max_staleness:
                continue
            because = self._engine.cancel(task)
            del self._going[task]
            if limits.keeps_late:
                most = limits.max_staleness
                why = f"missed {missed} merges, more than federation.max_staleness = {most}"
            elif book.now_s - book.began_s >= limits.deadline_s:
                why = f"has not answered in the {limits.deadline_s:g} s of round {number}"
            else:
                why = f"had not answered when round {number} closed"
            yield task, f"{task.silo} {why}{because}"

    def give_up(self) -> None:
        """Forget who is still at work."""
        for task in self._going:
            self._engine.cancel(task)
        self._going.clear()

    # --- across checkpoints --------------------------------------------------------------------

    def in_flight(self) -> list[dict[str, Any]]:
        """For RunState.in_flight."""
        return [
            {"task": asdict(task), "share": going.share, "bytes_down": going.bytes_down}
            for task, going in self._going.items()
        ]

    def versions(self) -> dict[str, Mapping[str, Tensor]]:
        """The versions that tasks start from, as groups of a checkpoint."""
        versions = {going.version for going in self._going.values()}
        return {f"version-{one.number}": one.tensors for one in versions}

    def go_on_with(
        self,
        in_flight: Sequence[Mapping[str, Any]],
        groups: Mapping[str, Mapping[str, Tensor]],
        server: Server,
    ) -> None:
        """Hand in again what was not answered when a checkpoint was written.

        Args:
            in_flight: RunState.in_flight.
            groups: from the checkpoint, with the versions that the tasks start from.
            server: makes versions of them.
        """
        versions: dict[int, Version] = {}
        for one in in_flight:
            task = FitTask(**{**one["task"], "texts": tuple(one["task"]["texts"])})
            number = task.round - 1
            if number not in versions:
                versions[number] = server.version_of(number, groups[f"version-{number}"])
            self._going[task] = Going(versions[number], one["share"], one["bytes_down"])
            self._engine.submit(task, versions[number])
