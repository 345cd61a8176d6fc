"""A federation that is a participant: it merges by itself, and answers with one update."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from photon.config import RunConfig
from photon.config.children import LEAF, inside
from photon.energy.account import Spent
from photon.errors import CheckpointCorruptError, NodeError, NonFiniteError, PolicyError, RunError
from photon.federation.account import Closed, RoundCosts
from photon.federation.checkpoint import CheckpointStore, RunState
from photon.federation.engine import Engine, Mailbox, Version
from photon.federation.federation import Federation
from photon.federation.node_state import drop_node_state
from photon.federation.own_parts import own_key
from photon.federation.private import Purse, Spending, asked_of, of_group, worst
from photon.federation.sampling import Fleet
from photon.federation.secure_rounds import agreed
from photon.federation.server import Server
from photon.federation.stages import leaving
from photon.federation.tasks import (
    WEIGHTS,
    EvalReceipt,
    EvalTask,
    FitTask,
    GlobalState,
    Receipt,
    SecureReceipt,
    SecureTask,
    Update,
    section,
)
from photon.privacy.epsilon import settled
from photon.telemetry import Event
from photon.telemetry.events import KeyMerged, ResidualRouted, RoundMerged, RoundStarted
from photon.training import StepTimes, plan_compute, power_of

_ALL_BYTES = ("bytes_up", "bytes_down", "bytes_inside")


class Group:
    """A participant made of participants; their held-out text is scored without it.

    Of the n inner rounds of its task in round R, the r-th has the number (R - 1) n + r. What it
    keeps between tasks is on disk beside what silos keep, and counts as theirs does, once a
    checkpoint of the run names its round: FOLDER/NAME/round-R, a checkpoint of its outer optimizer
    and of the inner rounds after which its members kept what they keep, and its codec's feedback.

    Args:
        path: "eu/banks".
        config: the run file as the level above has it.
        fleet: its members.
        engine: carries tasks to its members.
        folder: of the silos' kept states.
        on_event: told what happens inside, under the numbers of inner rounds.
        key: names of key tensors. Where participants keep their own, so does the group.
        on_round: of a group that is served: told that an inner round is over, with the version
            after it; that the version after it was scored as the group hands it on; or (None) that
            a task begins with this round, from this version.
    """

    def __init__(
        self,
        path: str,
        config: RunConfig,
        fleet: Fleet,
        engine: Engine,
        folder: Path,
        on_event: Callable[[Event], None],
        key: Sequence[str] = (),
        on_round: Callable[[int, Closed | EvalReceipt | None, Version], None] | None = None,
    ) -> None:
        self._path, self._name, self._key = path, (name := path.rpartition("/")[2]), key
        self._fleet, self._served = fleet, on_round is not None
        self.purse = Purse(folder, config.run.name)  # of who runs it, unless a site has its own
        self._on_round = on_round or (lambda number, over, version: None)
        child = config.federation.children[name]
        self._child = settled(config).federation.children[name]
        self._around = config.federation.policy
        self._config = config = inside(config, child)
        draws = {"seed": config.run.seed ^ zlib.crc32(name.encode())}  # of its own
        self._config = config.having(run=draws)
        self._engine, self._folder, self._tell = engine, folder, on_event
        self._store = CheckpointStore(folder / name, sys.maxsize)
        self._link = config.link.model_copy(update={"update_codec": child.update_codec})
        self._scored_bytes, self.close = 0, engine.close
        # Served, it has a process of its own; else what it takes beside its members is the run's.
        served = power_of(config.energy, plan_compute(config.compute)) if on_round else None
        self._own_energy = served.taken if served is not None else lambda: None

    def fit(self, task: FitTask, version: Version) -> Update:
        """The task's steps, in inner rounds; a failure where one of them comes to nothing."""
        rounds, local = self._child.rounds, self._config.local
        kept, state_lost, server = self._begin(task.node_round, (task.round - 1) * rounds, version)
        after = replace(kept, round=server.version.number)
        new = section(server.version.tensors, WEIGHTS)
        anchor = {name: new[name].clone() for name in self._key}
        residuals, guests = server.residuals, dict[str, dict[str, Tensor]]()
        residuals.path, residuals.above = f"{self._path}/", self._around
        self._asked = asked_of(self._config, version, self._child.update_privacy)
        residuals.spending = self._spending
        for one in version.residuals:
            guests.setdefault(one.origin, {}).update(one.tensors)
        at, above = self._store.folder, self._above
        federation = Federation(self._config, self._fleet, self._engine, server, above, folder=at)
        costs, receipts = list[RoundCosts](), list[Sequence[Receipt]]()
        self._on_round(after.round + 1, None, server.version)
        try:
            self._spending(task).begin()
            for index in range(rounds):
                if server.attention:
                    server.attention.guests = {} if index else guests
                    server.attention.least = residuals.least_share * (index == rounds - 1)
                costs.append(RoundCosts(bytes_down=self._scored_bytes))
                self._scored_bytes, clock = 0, task.global_step + index * local.steps
                members = self._fleet.drawn_from(after.round + 1)
                assert members is not None  # they are waited for
                cursors = self._cursors(task, index, members.tokens, after.cursors)
                before = replace(after, global_step=clock, cursors=cursors)
                closed = federation.round(before, members, costs[-1])
                after = closed.after
                receipts += [closed.receipts] if closed.receipts else []
                self._drop_inner(before, after, kept)
                self._on_round(after.round, closed, server.version)
            if not receipts:
                raise RunError(f"all of the {rounds} rounds inside {self._path} came to nothing")
            update = self._update(task, version.tensors, server.version.tensors)
        except (RunError, NonFiniteError, PolicyError) as error:
            self._fleet.lost(after.round + 1)
            lost = {"tokens_lost": _total(costs, "tokens", "tokens_lost")}
            lost["bytes_inside"] = _total(costs, *_ALL_BYTES)
            energy = Spent.sum([*federation.energy, self._own_energy()])
            return Update.none(Receipt.failed(task, error, **lost, energy=energy))
        kept_groups = ("outer", "rule", "residuals")
        groups = {name: one for name, one in server.groups().items() if name in kept_groups}
        if self._config.parts.own_key:
            new = section(server.version.tensors, WEIGHTS)
            groups |= {"key": {name: new[name] for name in self._key}, "anchor": anchor}
        read = task.cursor + task.steps * local.batch_size
        cursors = {**after.cursors, self._name: read}
        self._store.save(replace(after, round=task.round, cursors=cursors), groups)
        state_lost |= update.receipt.state_lost
        sent = list(residuals.up.values())
        size = update.receipt.bytes_up + sum(one.bytes for one in sent)
        energy = Spent.sum([*federation.energy, self._own_energy()])
        receipt = replace(update.receipt, state_lost=state_lost, bytes_up=size, energy=energy)
        return replace(update, receipt=_sum(receipts, costs, receipt), residuals=sent)

    def evaluate(self, task: EvalTask, version: Version) -> EvalReceipt:
        """Its members' score of the version as it hands it on: a mean, weighted by tokens.

        Raises:
            NodeError: none of them gave one.
        """
        number = task.round * self._child.rounds
        kept, _, server = self._begin(task.node_round, number, version)
        own = kept.node_rounds if self._config.parts.kept else {}
        tasks = [EvalTask(number, one, own.get(one)) for one in self._fleet.present()]
        answers = Mailbox(self._engine).in_task_order(tasks, server.version)
        scores = [one for one in answers if isinstance(one, EvalReceipt)]
        if not scores:
            raise NodeError(f"no member of {self._name} scores the state after round {task.round}")
        self._scored_bytes += sum(one.bytes_down or 0 for one in scores)
        mean = replace(EvalReceipt.mean(scores), silo=self._name)
        mean = replace(
            mean, energy=Spent.sum([*(one.energy for one in scores), self._own_energy()])
        )
        self._on_round(number, mean, server.version)
        return mean

    def agree(self, task: SecureTask) -> SecureReceipt:
        return agreed(self._folder, task)

    def settle(self) -> None:
        """What it keeps is on disk when it answers."""

    def _above(self, event: Event) -> None:
        if isinstance(event, KeyMerged | ResidualRouted) and not event.silo:
            event = event.model_copy(update={"silo": self._name})
        if self._served or not isinstance(event, RoundStarted | RoundMerged):
            self._tell(event)

    def _begin(
        self, node_round: int | None, number: int, version: Version
    ) -> tuple[RunState, bool, Server]:
        """What it kept after its task of a round; whether that is gone; and its server, with a
        version from above as its own of this number."""
        kept, tensors, lost = RunState(), dict[str, Mapping[str, Tensor]](), node_round is not None
        if node_round is not None:
            with contextlib.suppress(CheckpointCorruptError):
                kept, found = self._store.load(node_round)
                tensors, lost = {**found}, False
        state = {name: tensor.clone() for name, tensor in version.tensors.items()}
        tensors |= {"global": state, "once": dict(version.once)}
        state |= own_key(self._config.parts, tensors, state)
        self._store.folder.mkdir(parents=True, exist_ok=True)
        before = replace(kept, round=number)
        return kept, lost, Server(self._config, self._store.folder, tensors, before, self._key)

    def _cursors(
        self, task: FitTask, index: int, members: Iterable[str], ended: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Where members read on: where each ended, or past what lost tasks of the group were given.

        Nodes of one silo each read a contiguous block of an inner round's sequences.

        Args:
            ended: cursors so far, the group's own among them if they are of a task that was merged.
        """
        nodes = self._child.nodes
        if nodes is not None:
            block = self._config.local.steps * self._config.local.batch_size
            first = task.cursor + index * nodes * block
            return {name: first + j * block for j, name in enumerate(members)}
        if index:
            return ended
        ended = ended if self._name in ended else {}
        lost, children = task.cursor - ended.get(self._name, 0), self._config.federation.children
        return {
            name: ended.get(name, 0) + lost * (children.get(name, LEAF).nodes or 1)
            for name in {*members, *ended} - {self._name}
        }

    def _drop_inner(self, before: RunState, after: RunState, kept: RunState) -> None:
        """Remove what members kept after inner rounds of a task that it went on from."""
        for name, number in before.node_rounds.items():
            if number not in (kept.node_rounds.get(name), after.node_rounds[name]):
                drop_node_state(self._folder, name, number)

    def _spending(self, task: FitTask) -> Spending:
        # One that is served has its node's account for itself, and goes on with it renamed, too.
        path = "" if self._served else self._path
        return of_group(self._child.update_privacy, self.purse, task, path, self._asked)

    def _update(self, task: FitTask, old: GlobalState, new: GlobalState) -> Update:
        """What leaves the group: how far it came from the version it was given, by its stages."""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(new):  # a state from a checkpoint has another order
                yield name, old[name] - new[name] if name.startswith(WEIGHTS) else new[name]

        shapes = {name: new[name].shape for name in sorted(new)}
        return leaving(self._spending(task), self._link, self._folder, task, tensors, shapes)


def needed_states(folder: Path, states: Iterable[RunState]) -> dict[str, set[int]]:
    """By silo and group, after which rounds it kept what these states name, or groups that they do.

    Args:
        folder: of the silos' kept states.
    """
    needed: dict[str, set[int]] = {}
    todo = list(states)
    for state in todo:
        named = list(state.node_rounds.items())
        # It may be there already, and not be merged yet.
        named += [(one["task"]["silo"], one["task"]["round"]) for one in state.in_flight]
        for name, number in named:
            if number not in needed.setdefault(name, set()):
                needed[name].add(number)
                todo += CheckpointStore(folder / name, 1).states(number)
    return needed


def _total(costs: Iterable[RoundCosts], *names: str) -> int:
    return sum(getattr(one, name) for one in costs for name in names)


def _sum(
    rounds: Sequence[Sequence[Receipt]], costs: Sequence[RoundCosts], receipt: Receipt
) -> Receipt:
    """A group's receipt: times and tokens of all its members, losses weighted by tokens."""
    every = [one for receipts in rounds for one in receipts]

    def mean(of: Sequence[Receipt], name: str) -> float | None:
        losses = [getattr(one, name) for one in of]
        if None in losses:
            return None
        counted = zip(losses, of, strict=True)
        return sum(loss * one.tokens for loss, one in counted) / sum(one.tokens for one in of)

    told = {silo: one for cost in costs for silo, one in cost.epsilon.items()}.values()
    times = zip(*(vars(one.times).values() for one in every), strict=True)
    sums = ("tokens", "train_s", "load_s", "publish_s")
    return replace(
        receipt,
        **{name: sum(getattr(one, name) for one in every) for name in sums},
        times=StepTimes(*map(sum, times)),
        loss=mean(every, "loss"),
        first_loss=mean(rounds[0], "first_loss"),
        last_loss=mean(rounds[-1], "last_loss"),
        peak_memory_bytes=max(one.peak_memory_bytes for one in every),
        micro_batch_size=every[0].micro_batch_size,
        bytes_inside=_total(costs, *_ALL_BYTES),
        tokens_lost=_total(costs, "tokens_lost"),
        epsilon=receipt.epsilon or worst(told),
    )
