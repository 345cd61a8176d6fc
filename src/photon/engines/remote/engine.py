"""The engine itself: tasks become errands, and their answers updates and scores."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.energy.meter import METER
from photon.engines.remote.depot import Depot
from photon.engines.remote.errand import ATTEMPTS, Errand
from photon.engines.remote.messenger import Messenger, Post
from photon.errors import (
    ChunkCorruptError,
    LinkError,
    ManifestError,
    PhotonError,
    ProtocolError,
    StoreUnavailableError,
    TransferStalledError,
)
from photon.federation import (
    Answer,
    Engine,
    EvalTask,
    FitTask,
    Receipt,
    SecureReceipt,
    SecureTask,
    Task,
    Update,
    Version,
)
from photon.federation.envelopes import (
    Ask,
    EvalPart,
    Evidence,
    FitPart,
    RunPart,
    SecurePart,
    parse_reply,
    sealed,
)
from photon.federation.tasks import StateRef
from photon.freed_memory import share_freed_memory
from photon.link import Parcel, Ref
from photon.membership.keys import NodeKey
from photon.membership.roster import Roster
from photon.telemetry import Event
from photon.telemetry.events import Notice
from photon.version import photon_version

#: What an update may take on the wire beyond twice its fp32 values.
_SPARE_BYTES = 64 << 20

#: Between two looks at the post while updates are on their way here.
_GLANCE_S = 0.05

#: Updates on their way here at once.
_FETCHES = 3


@dataclass(frozen=True)
class Asker:
    """With what the aggregator asks.

    Attributes:
        key: signs its Asks; silos have pinned its public half.
        log_head: of its audit log, as it is now.
    """

    key: NodeKey
    log_head: Callable[[], str]


@dataclass(eq=False)
class _Place:
    """A task that a silo is at.

    Attributes:
        fetching: its update, on its way here.
    """

    task: Task
    version: Version
    errand: Errand
    fetching: Future[Parcel] | None = None


class RemoteEngine:
    """Serves tasks by silos that have joined.

    Updates are fetched as answers come, and wait on this disk as far as it has room: whoever is
    slow keeps nobody else's from coming.

    Args:
        run: what is being trained, as silos are told; its silos are those of each round's tasks.
        config: the run file.
        post: to silos.
        roster: who is a member, what each says it does, which tasks are open.
        depot: updates and states.
        asker: signs what is asked.
        evaluator: scores the global held-out set on this machine; None where there is none.
        on_event: told of local progress and of what goes wrong.
    """

    def __init__(
        self,
        run: RunPart,
        config: RunConfig,
        post: Post,
        roster: Roster,
        depot: Depot,
        asker: Asker,
        evaluator: Engine | None,
        on_event: Callable[[Event], None],
    ) -> None:
        self._run = run
        self._config = config
        self._post = post
        self._roster = roster
        self._evaluator = evaluator
        self._on_event = on_event
        share_freed_memory()  # threads fetch chunks, and no node trains in this process
        #: By key, the round of an update that was accepted.
        self._accepted: dict[str, int] = {}
        self._messenger = Messenger(config, post, roster, on_event)
        self._depot = depot
        self._asker = asker
        self._new: list[tuple[Task, Version]] = []
        self._going: list[_Place] = []
        self._errands: list[Errand] = []  # of all that were asked together, answered ones too
        self._held: dict[Task, Ref] = {}
        self._own = self._newest = 0
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="photon-arrivals")

    @property
    def processes(self) -> int:
        """Silos that train at the same time."""
        return len(self._run.silos)

    @property
    def now_s(self) -> float:
        return time.monotonic()

    def submit(self, task: Task, version: Version) -> None:
        """Hand in a task; silos are asked when answers are, as an Ask names all that are asked."""
        if task.silo is None:
            assert self._evaluator is not None
            self._evaluator.submit(task, version)
            self._own += 1
        else:
            self._new.append((task, version))

    def arrivals(self, timeout_s: float | None = None) -> list[tuple[Task, Answer]]:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        self._ask_new()
        while True:
            for place in self._going:
                self._fetch(place)
            came = [
                (place.task, answer) for place in list(self._going) for answer in self._of(place)
            ]
            if self._own:  # silos work while this machine does
                self._messenger.turn(self._errands)
                assert self._evaluator is not None
                own = self._evaluator.arrivals(timeout_s)
                self._own -= len(own)
                came += own
            left_s = math.inf if until is None else until - time.monotonic()
            if came or not self._going or left_s <= 0:
                return came
            if not self._messenger.turn(self._errands):
                pause_s = min(left_s, self._messenger.pause_s(self._errands))
                fetching = [place.fetching for place in self._going if place.fetching is not None]
                with METER.phase("idle"):
                    if not fetching:
                        self._post.wait(pause_s)
                    else:
                        wait(fetching, min(pause_s, _GLANCE_S), FIRST_COMPLETED)

    def cancel(self, task: Task) -> str:
        self._new = [one for one in self._new if one[0] != task]
        last = ""
        for place in [place for place in self._going if place.task == task]:
            last = place.errand.because
            self._finish(place)
        if task.silo is None and self._evaluator is not None:
            self._evaluator.cancel(task)
            self._own = 0
        return last

    def settle(self) -> None:
        """Silos answer when what they keep is on disk; here, what no round needs is removed."""
        if self._newest:
            self._sweep(self._newest)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._messenger.close(self._errands)
        if self._evaluator is not None:
            self._evaluator.close()
        self._depot.close()

    def _ask_new(self) -> None:
        new, self._new = self._new, []
        if not new:
            return
        if not self._going:
            self._errands = []
        silos = {place.task.silo for place in self._going} | {task.silo for task, _ in new}
        silos.update(*(task.company for task, _ in new if isinstance(task, SecureTask)))
        self._run = self._run.model_copy(update={"silos": sorted(silo for silo in silos if silo)})
        for task, version in new:
            ref = self._depot.published(version)
            most_bytes = 0
            if isinstance(task, FitTask):
                values = sum(tensor.numel() for tensor in version.tensors.values())
                most_bytes = 8 * values + _SPARE_BYTES
                self._newest = max(self._newest, task.round)
            ask = self._ask(task, ref)
            errand = Errand(ask, sealed(ask, self._asker.key), most_bytes)
            self._errands.append(errand)
            self._going.append(_Place(task, version, errand))
        with self._roster.together():
            for place in self._going[-len(new) :]:
                self._messenger.begin(place.errand)

    # --- answers -------------------------------------------------------------------------------

    def _fetch(self, place: _Place) -> None:
        """Begin to bring here what was answered.

        The oldest task's always, whatever room there is: others may have to wait for it.
        """
        ref = place.errand.update
        if ref is None or place.fetching is not None or not isinstance(place.task, FitTask):
            return
        held = sum(one.payload_bytes for one in self._held.values())
        # Half of what is free on this disk with none of those here that wait.
        room_bytes = (self._depot.free_bytes() - held) // 2
        if place is not self._going[0] and ref.payload_bytes > room_bytes:
            return
        self._held[place.task] = ref
        fetch = partial(self._depot.fetch, place.task, ref, place.version.tensors)
        place.fetching = self._pool.submit(fetch)

    def _of(self, place: _Place) -> Iterator[Answer]:
        """The answer to a task, if it is here."""
        errand, task = place.errand, place.task
        if isinstance(task, EvalTask):
            if errand.reply is not None and errand.reply.evaluate is not None:
                self._finish(place)
                yield errand.reply.evaluate.receipt(errand.ask.silo)
            elif errand.failure is not None:
                self._finish(place)
                self._messenger.notice(errand.ask, f"no evaluation: {errand.failure.message}")
                yield None
            return
        if isinstance(task, SecureTask):
            if errand.over:
                self._finish(place)
                told = errand.reply.secure if errand.reply is not None else None
                failure = errand.failure.message if errand.failure is not None else None
                yield SecureReceipt(told or "", failure)
            return
        parcel = None
        if place.fetching is not None and place.fetching.done():
            parcel = self._arrived(place, place.fetching)
        if errand.failure is not None:
            self._finish(place)
            yield Update.none(Receipt.failed(task, errand.failure))
        elif errand.reply is not None and (parcel is not None or errand.update is None):
            assert errand.reply.fit is not None
            self._going.remove(place)
            receipt = errand.reply.fit.receipt(task.round, task.silo)
            yield self._update(place, receipt, parcel) if parcel else Update.none(receipt)

    def _update(self, place: _Place, receipt: Receipt, parcel: Parcel) -> Update:
        task, ref = place.task, place.errand.update
        assert isinstance(task, FitTask)
        assert ref is not None

        def tensors() -> Iterator[tuple[str, Tensor]]:
            # It may have waited long for its turn: who was expelled meanwhile is out.
            if (error := self._messenger.barred(task.silo)) is not None:
                raise error
            yield from self._depot.tensors(parcel, task, ref, place.version.tensors)

        def let_go() -> None:
            self._held.pop(task, None)
            self._depot.let_go(ref)

        return Update(receipt, tensors, wire_bytes=ref.payload_bytes, let_go=let_go)

    def _arrived(self, place: _Place, fetching: Future[Parcel]) -> Parcel | None:
        """An update that is here; None where it could not be had and is asked for again."""
        errand = place.errand
        try:
            return fetching.result()
        except LinkError as error:
            place.fetching = None
            self._held.pop(place.task, None)
            # A store that is away is no fault of the silo's: it is waited for.
            errand.troubles += not isinstance(error, StoreUnavailableError | TransferStalledError)
            if errand.troubles >= ATTEMPTS or isinstance(error, ManifestError):
                errand.failure = error
                return None
            if isinstance(error, ChunkCorruptError):
                self._depot.discard(errand.ask.silo)
            errand.reply = None
            self._messenger.open(errand)  # closed when it was answered
            errand.again(time.time(), error.message)
            return None

    def _finish(self, place: _Place) -> None:
        """Nothing is granted for a task any more, and nothing of it is here."""
        self._going.remove(place)
        self._messenger.close([place.errand])
        if (ref := self._held.pop(place.task, None)) is not None:
            self._depot.let_go(ref)

    def _sweep(self, number: int) -> None:
        """Remove from the store what no round from now on needs."""
        members = [member.name for member in self._roster.members()]
        going = [place.task.round for place in self._going]
        oldest = min([number - self._config.serve.keep_rounds, *(begun - 1 for begun in going)])
        # Of later ones too: a group does all of its task again where its process was killed.
        for begun in {*range(number, number + self._config.serve.keep_rounds), *going}:
            for reply in self._roster.tasks.replies(self._run.id, begun):
                with contextlib.suppress(ProtocolError):  # of another version
                    fit = parse_reply(reply.text).fit
                    if fit is not None and fit.update is not None:
                        self._accepted[fit.update.key] = begun
        self._accepted = {key: at for key, at in self._accepted.items() if at >= oldest}
        try:
            self._depot.sweep(members, oldest=oldest, accepted=self._accepted)
        except (PhotonError, OSError) as error:
            # The next round's sweep finds it again.
            self._on_event(
                Notice(text=f"old rounds stay in the store: {error}", round=number, silo="")
            )

    def _adverts(self, task: SecureTask) -> tuple[Evidence, ...]:
        """What the members of a cohort have signed."""
        asked = [f"{self._run.id}/advertise/{task.round}/{name}" for name in task.company]
        replies = [one for one in map(self._roster.tasks.reply, asked) if one is not None]
        return tuple(
            Evidence(
                text=one.text.decode(),
                signature=one.signature,
                public_key=self._roster.signer(one.fingerprint).public_key,
            )
            for one in replies
        )

    def _ask(self, task: Task, ref: StateRef) -> Ask:
        assert task.silo is not None
        common = {
            "photon_version": photon_version(),
            "silo": task.silo,
            "run": self._run,
            "state": ref,
            "log_head": self._asker.log_head(),
            "within_s": self._config.federation.deadline_s,
        }
        if isinstance(task, EvalTask):
            part = EvalPart(round=task.round, node_round=task.node_round)
            return Ask(kind="evaluate", evaluate=part, **common)
        if isinstance(task, SecureTask):
            shown = self._adverts(task) if task.phase == "share" else ()
            part = SecurePart(round=task.round, text=task.text, evidence=shown)
            return Ask(kind=task.phase, secure=part, **common)
        told: dict[str, Any] = {name: getattr(task, name) for name in FitPart.model_fields}
        told["sealing"] = task.sealing or None
        part = FitPart(**told)
        return Ask(kind="fit", fit=part, **common)
