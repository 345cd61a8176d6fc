"""The engine for silos elsewhere: tensors through a store, tasks and receipts through a post.

A task is named by (run, round, silo) and may be asked any number of times: a silo that finished it
answers from its disk. So whatever dies here or there, the remedy is to ask again. Asked again is
where the post says there will be no answer, where the silo is idle although it was asked, and where
its update can't be had. Given up is a silo that was not heard of for federation.silence_s, or that
has not answered when the round's time is over.

Answers are handed over in the order of tasks: the merged weights do not depend on who was faster.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from photon.config import RunConfig
from photon.errors import (
    ChunkCorruptError,
    LinkError,
    ManifestError,
    MembershipError,
    PhotonError,
    ProtocolError,
    SignatureError,
    StoreUnavailableError,
    TransferStalledError,
    UnknownMemberError,
    UnreachableError,
    error_of,
)
from photon.federation import Engine, EvalReceipt, EvalTask, FitTask, Receipt, Update
from photon.federation.envelopes import (
    Ask,
    EvalPart,
    FitPart,
    Reply,
    RunPart,
    StatePart,
    encoded,
    parse_reply,
)
from photon.federation.tasks import GlobalState, Publish, StateRef, update_header
from photon.freed_memory import share_freed_memory
from photon.link import Expected, Parcel, Ref
from photon.membership.roster import OpenTask, Roster, SignedReply
from photon.membership.signing import RECEIPT, verify_document
from photon.store.contract import Store
from photon.store.garbage import collect
from photon.store.transfer import Transfer
from photon.telemetry import Event
from photon.telemetry.events import LocalProgress, Notice
from photon.version import photon_version

#: Between two looks at the post.
_POLL_S = 0.2
#: A silo that says it is idle so long after it was asked did not get the task, or lost it.
#: (Delivery takes seconds, and ten where a machine is overloaded.)
_IDLE_S = 10.0
#: Before a task is asked again: doubled each time, up to the last.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 30.0
#: Updates on their way here, or here and waiting for their turn.
_AHEAD = 3
#: How often an update that can't be had, or a silo's trouble of its own, is asked for again.
_ATTEMPTS = 3
#: No manifest of any model here is longer.
_MOST_MANIFEST_BYTES = 256 << 20
#: What an update may take on the wire beyond twice its fp32 values.
_SPARE_BYTES = 64 << 20


class Post(Protocol):
    """Carries small documents to silos and back."""

    def push(self, silo: str, ask: bytes, *, ttl_s: float) -> str:
        """Send; returns what the answer is called.

        Raises:
            UnknownMemberError: nobody of that name can be reached just now.
        """
        ...

    def pull(self, ids: Collection[str]) -> dict[str, SignedReply | str]:
        """Answers that have arrived, each once; words where there will be none, and why."""
        ...


@dataclass
class _Errand:
    """One Ask on its way: how often it was sent, and what came back."""

    ask: Ask
    most_bytes: int = 0
    ids: set[str] = field(default_factory=set)
    asked_s: float = 0.0
    next_s: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    troubles: int = 0
    last_trouble: str = ""
    reply: Reply | None = None
    failure: PhotonError | None = None

    @property
    def over(self) -> bool:
        return self.reply is not None or self.failure is not None

    def again(self, now_s: float, why: str) -> None:
        """Ask once more, after a pause that grows."""
        self.last_trouble = why
        self.next_s = now_s + self.pause_s
        self.pause_s = min(2 * self.pause_s, _LAST_PAUSE_S)

    def fail(self, error: PhotonError) -> None:
        self.failure = error


class RemoteEngine:
    """Serves tasks by silos that have joined.

    Args:
        run: what is being trained, as silos are told; its silos are those of each round's tasks.
        config: the run file.
        post: to silos.
        roster: who is a member, what each says it does, which tasks are open.
        store: updates and states; the aggregator's own way to it.
        spool: folder for updates on their way to be merged.
        evaluator: scores the global held-out set on this machine.
        on_event: told of local progress and of what goes wrong.
    """

    def __init__(
        self,
        run: RunPart,
        config: RunConfig,
        post: Post,
        roster: Roster,
        store: Store,
        spool: Path,
        evaluator: Engine,
        on_event: Callable[[Event], None],
    ) -> None:
        self._run = run
        self._config = config
        self._post = post
        self._roster = roster
        self._store = store
        self._spool = spool
        self._evaluator = evaluator
        self._on_event = on_event
        self._offered: tuple[int, Publish] | None = None
        self._state_ref: StateRef | None = None
        self._told: dict[str, tuple[int, int]] = {}
        share_freed_memory()  # threads fetch chunks, and no node trains in this process
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)

    @property
    def processes(self) -> int:
        """Silos that train at the same time."""
        return len(self._run.silos)

    def _take_part(self, tasks: Sequence[FitTask | EvalTask]) -> None:
        silos = sorted({task.silo for task in tasks if task.silo is not None})
        self._run = self._run.model_copy(update={"silos": silos})

    def offer(self, number: int, publish: Publish) -> None:
        """Publish the state after round `number` when the first task needs it."""
        self._offered = (number, publish)

    def fit(self, tasks: Sequence[FitTask], state: GlobalState) -> Iterator[Update]:
        until = time.time() + self._config.serve.round_deadline_s
        ref = StatePart.of(self._published())
        self._take_part(tasks)
        values = sum(tensor.numel() for tensor in state.values())
        most_bytes = 8 * values + _SPARE_BYTES
        errands = [_Errand(self._fit_ask(task, ref, until), most_bytes) for task in tasks]
        for errand in errands:
            self.open(errand)
            self._take_earlier(errand)
        arrivals = _Arrivals(self, tasks, state, errands)
        try:
            yield from arrivals.updates()
        finally:
            arrivals.close()
            for errand in errands:
                self._roster.close_task(errand.ask.task_id, None)
        if tasks:
            self._sweep(tasks[0].round)

    def evaluate(self, tasks: Sequence[EvalTask], state: GlobalState) -> Iterator[EvalReceipt]:
        until = time.time() + self._config.serve.round_deadline_s
        own = [task for task in tasks if task.silo is None]
        errands: dict[str, _Errand] = {}
        if len(own) < len(tasks):
            ref = StatePart.of(self._published())
            self._take_part(tasks)
            for task in tasks:
                if task.silo is not None:
                    errand = _Errand(self._eval_ask(task.silo, task.round, ref, until))
                    self.open(errand)
                    self._take_earlier(errand)
                    errands[task.silo] = errand
        try:
            self.turn(errands.values())  # silos work while this machine does
            yield from self._evaluator.evaluate(own, state)
            while not all(errand.over for errand in errands.values()):
                if not self.turn(errands.values()):
                    time.sleep(_POLL_S)
            for silo, errand in errands.items():
                if errand.reply is not None and errand.reply.evaluate is not None:
                    yield errand.reply.evaluate.receipt(silo)
                elif errand.failure is not None:
                    self._notice(errand.ask, f"no evaluation: {errand.failure.message}")
        finally:
            for errand in errands.values():
                self._roster.close_task(errand.ask.task_id, None)

    def close(self) -> None:
        self._evaluator.close()
        shutil.rmtree(self._spool, ignore_errors=True)

    # --- errands -------------------------------------------------------------------------------

    def turn(self, errands: Collection[_Errand]) -> bool:
        """Look once at what came back, and send what is to be sent; whether one is over by it."""
        now_s = time.time()
        open_ones = [errand for errand in errands if not errand.over]
        for errand in open_ones:
            if now_s >= errand.next_s and not errand.ids:
                self._push(errand, now_s)
        waiting = {one: errand for errand in open_ones if not errand.over for one in errand.ids}
        for one, answer in (self._post.pull(waiting) if waiting else {}).items():
            errand = waiting[one]
            errand.ids.discard(one)
            if not errand.over:
                self._take(errand, answer, now_s)
        presences = self._roster.presences()
        for errand in open_ones:
            if not errand.over:
                self._watch(errand, presences.get(errand.ask.silo), now_s)
        return any(errand.over for errand in open_ones)

    def _push(self, errand: _Errand, now_s: float) -> None:
        ask = errand.ask
        errand.asked_s = now_s
        if (error := self.barred(ask.silo)) is not None:
            errand.fail(error)
            return
        try:
            errand.ids.add(
                self._post.push(ask.silo, encoded(ask), ttl_s=max(60.0, ask.until - now_s))
            )
        except UnknownMemberError as error:
            errand.again(now_s, error.message)

    def _take(self, errand: _Errand, answer: SignedReply | str, now_s: float) -> None:
        """What came back for a task: a signed reply, or words."""
        if isinstance(answer, str):
            errand.again(now_s, answer)
            return
        try:
            reply = self.verified(errand.ask, answer)
        except (ProtocolError, MembershipError) as error:
            # Not its answer. Whoever sent it is named in the log; the silo is asked again.
            self._roster.note(errand.ask.silo, "reply refused", error.message)
            self._notice(errand.ask, f"a reply was refused: {error.message}")
            errand.troubles += 1
            if errand.troubles >= _ATTEMPTS:
                errand.fail(error)
            else:
                errand.again(now_s, error.message)
            return
        if reply.refused is None:
            errand.reply = reply
            self._roster.close_task(errand.ask.task_id, answer)
            return
        refusal = reply.refused
        error = error_of(refusal.code)(f"{reply.silo}: {refusal.message}", hint=refusal.hint)
        errand.troubles += 1
        self._roster.note(reply.silo, "refused", refusal.message)
        if 70 <= refusal.code < 80 and errand.troubles < _ATTEMPTS:  # its link's trouble may pass
            errand.again(now_s, refusal.message)
        else:
            errand.fail(error)

    def _watch(self, errand: _Errand, seen, now_s: float) -> None:
        """Ask again a silo that lost its task; give up one that is silent, or too late."""
        ask, silence_s = errand.ask, self._config.federation.silence_s
        if (error := self.barred(ask.silo)) is not None:
            errand.fail(error)
            return
        if now_s > ask.until:
            errand.fail(
                UnreachableError(
                    f"{ask.silo} has not answered in the {self._config.serve.round_deadline_s:g} s "
                    f"of round {ask.round}{_because(errand)}"
                )
            )
            return
        presence, seen_s = seen if seen is not None else (None, 0.0)
        begun_s = ask.until - self._config.serve.round_deadline_s
        if now_s - max(seen_s, begun_s) > silence_s:
            errand.fail(
                UnreachableError(
                    f"{ask.silo} has not been heard of for {silence_s:g} s{_because(errand)}"
                )
            )
            return
        if presence is None:
            return
        if presence.task == ask.task_id:
            self._progress(ask, presence)
        elif (
            errand.ids
            and not presence.task
            and seen_s - errand.asked_s > max(_IDLE_S, errand.pause_s)
        ):
            # It is there, it was asked, and it does nothing.
            errand.again(now_s, "it was idle although it had been asked")
            self._push(errand, now_s)

    def barred(self, silo: str) -> UnknownMemberError | None:
        """Why a silo may not take part any more; None if it may."""
        try:
            self._roster.active_member(silo)
        except UnknownMemberError as error:
            return error
        return None

    def verified(self, ask: Ask, answer: SignedReply) -> Reply:
        """The reply in a signed answer.

        Raises:
            ProtocolError: malformed, or to another question.
            MembershipError: not signed by the silo's own key, as it is now.
        """
        member = self._roster.active_member(ask.silo)
        if answer.fingerprint != member.fingerprint:
            raise SignatureError(
                f"{ask.silo} answered with the key {answer.fingerprint[:80]}, not with its own"
            )
        verify_document(member.public_key, RECEIPT, answer.text, answer.signature)
        reply = parse_reply(answer.text)
        reply.require_answer_to(ask)
        if reply.fit is not None and reply.fit.update is not None:
            key, own = reply.fit.update.key, f"{self._folder_of(ask.silo)}/"
            if not key.startswith(own):
                raise ProtocolError(f"{ask.silo} names an update {key!r}; its own are under {own}")
            self._require_tokens(ask, reply.fit.tokens)
        return reply

    def _require_tokens(self, ask: Ask, tokens: int) -> None:
        """An update is weighed by its tokens: none counts for more than its task has."""
        assert ask.fit is not None
        config = self._config
        most = ask.fit.steps * config.local.batch_size * config.data.sequence_length
        if tokens > most:
            raise ProtocolError(
                f"{ask.silo} says it trained on {tokens} tokens; its task has {most}"
            )

    def fetch(self, task: FitTask, ref: Ref, state: GlobalState) -> Parcel:
        """Bring an update here, verified."""
        parcel = self._parcel(task, ref, state)
        parcel.keep(self.spool_of(ref))
        return parcel

    def spool_of(self, ref: Ref) -> Path:
        """Where an update lies while it is here."""
        return self._spool / ref.sha256

    def tensors(
        self, parcel: Parcel, task: FitTask, ref: Ref, state: GlobalState
    ) -> Iterator[tuple[str, Tensor]]:
        """An update's tensors: from the spool while it is there, else from the store again."""
        here = self.spool_of(ref).exists()
        yield from (parcel if here else self._parcel(task, ref, state)).tensors()

    def discard(self, silo: str) -> None:
        """Remove what a silo has in the store, so that it sends it again.

        An object that is there is never written again, damaged or not.
        """
        with contextlib.suppress(LinkError):
            self._store.delete([key for key, _ in self._store.keys(self._folder_of(silo))])

    def _parcel(self, task: FitTask, ref: Ref, state: GlobalState) -> Parcel:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        expected = Expected(update_header(task, state), shapes, self._config.link.specs)
        return Parcel(Transfer(self._store, streams=4), ref, expected)

    def _sweep(self, number: int) -> None:
        """Remove from the store what no round from now on needs."""
        oldest = number - self._config.serve.keep_rounds
        folders = [f"{self._run.id}/global"]
        folders += [self._folder_of(member.name) for member in self._roster.members()]
        try:
            for folder in folders:
                collect(
                    self._store,
                    folder,
                    keep=lambda key: _round_of(key) >= oldest,
                    chunks_of=self._chunks_of,
                )
        except (PhotonError, OSError) as error:
            # The next round's sweep finds it again.
            self._on_event(
                Notice(text=f"old rounds stay in the store: {error}", round=number, silo="")
            )

    def _chunks_of(self, key: str) -> list[str]:
        """The chunks that a manifest in the store names."""
        size = self._store.size(key) or 0
        try:
            record = json.loads(self._store.get(key, max_bytes=min(size, _MOST_MANIFEST_BYTES)))
            return [str(chunk["sha256"]) for chunk in record["chunks"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            return []  # a silo may write anything under its own folder

    # --- asks ----------------------------------------------------------------------------------

    def _published(self) -> StateRef:
        assert self._offered is not None
        number, publish = self._offered
        if self._state_ref is None or self._state_ref.round != number:
            carrier = Transfer(self._store, streams=4)
            self._state_ref = publish(carrier, f"{self._run.id}/global")
        return self._state_ref

    def _folder_of(self, silo: str) -> str:
        return f"{self._run.id}/silos/{silo}"

    def _fit_ask(self, task: FitTask, ref: StatePart, until: float) -> Ask:
        part = FitPart(
            round=task.round,
            global_step=task.global_step,
            steps=task.steps,
            node_round=task.node_round,
            state_bytes=task.state_bytes,
        )
        return self._ask("fit", task.silo, ref, until, fit=part)

    def _eval_ask(self, silo: str, number: int, ref: StatePart, until: float) -> Ask:
        return self._ask("evaluate", silo, ref, until, evaluate=EvalPart(round=number))

    def _ask(self, kind, silo: str, ref: StatePart, until: float, **part) -> Ask:
        return Ask(
            photon_version=photon_version(),
            kind=kind,
            silo=silo,
            run=self._run,
            state=ref,
            until=until,
            **part,
        )

    def open(self, errand: _Errand) -> None:
        """Let the silo read the state and write its update."""
        ask = errand.ask
        folder = self._folder_of(ask.silo)
        self._roster.open_task(
            OpenTask(
                id=ask.task_id,
                run=self._run.id,
                round=ask.round,
                silo=ask.silo,
                kind=ask.kind,
                opened_at=time.time(),
                until=ask.until,
                most_bytes=errand.most_bytes,
                readable=(f"{self._run.id}/global/", f"{folder}/"),
                writable=(f"{folder}/",) if errand.most_bytes else (),
            )
        )

    def _take_earlier(self, errand: _Errand) -> None:
        """An answer that came before this process began."""
        ask = errand.ask
        earlier = self._roster.reply(ask.task_id)
        if earlier is None:
            return
        try:
            reply = self.verified(ask, earlier)
        except (ProtocolError, MembershipError):
            return
        if reply.refused is None:
            errand.reply = reply

    def _progress(self, ask: Ask, presence) -> None:
        """Tell of a silo's steps, as far as they are new."""
        at = (presence.round, presence.step)
        if ask.kind != "fit" or not presence.step or self._told.get(ask.silo) == at:
            return
        self._told[ask.silo] = at
        assert ask.fit is not None
        self._on_event(
            LocalProgress(
                round=ask.round,
                silo=ask.silo,
                step=presence.step,
                global_step=ask.fit.global_step + presence.step,
                loss=math.nan,
                lr=math.nan,
                gradient_norm=math.nan,
                tokens_per_s=math.nan,
            )
        )

    def _notice(self, ask: Ask, text: str) -> None:
        self._on_event(Notice(text=text, round=ask.round, silo=ask.silo))


class _Arrivals:
    """A round's answers, in the order of its tasks, each with its update already here."""

    def __init__(
        self,
        engine: RemoteEngine,
        tasks: Sequence[FitTask],
        state: GlobalState,
        errands: Sequence[_Errand],
    ) -> None:
        self._engine = engine
        self._tasks = tasks
        self._state = state
        self._errands = errands
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="photon-arrivals")
        self._fetching: dict[int, Future[Parcel]] = {}

    def updates(self) -> Iterator[Update]:
        for position, errand in enumerate(self._errands):
            parcel = None
            while not errand.failure:
                self._fetch_ahead(position)
                fetching = self._fetching.get(position)
                if fetching is not None and fetching.done():
                    parcel = self._arrived(position, fetching)
                    if parcel is not None:
                        # It may have waited long for its turn: who was expelled meanwhile is out.
                        errand.failure = self._engine.barred(errand.ask.silo)
                        break
                elif errand.reply is not None and _ref_of(errand) is None:
                    break
                elif not self._engine.turn(self._errands):
                    _wait(fetching)
            yield self._update(position, parcel)
            ref = _ref_of(errand)
            if ref is not None:
                shutil.rmtree(self._engine.spool_of(ref), ignore_errors=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_ahead(self, position: int) -> None:
        for number in range(position, min(position + _AHEAD, len(self._errands))):
            ref = _ref_of(self._errands[number])
            if ref is not None and number not in self._fetching:
                fetch = partial(self._engine.fetch, self._tasks[number], ref, self._state)
                self._fetching[number] = self._pool.submit(fetch)

    def _arrived(self, position: int, fetching: Future[Parcel]) -> Parcel | None:
        """An update that is here; None where it could not be had and is asked for again."""
        errand = self._errands[position]
        try:
            return fetching.result()
        except LinkError as error:
            del self._fetching[position]
            # A store that is away is no fault of the silo's: it is waited for.
            errand.troubles += not isinstance(error, StoreUnavailableError | TransferStalledError)
            if errand.troubles >= _ATTEMPTS or isinstance(error, ManifestError):
                errand.fail(error)
                return None
            if isinstance(error, ChunkCorruptError):
                self._engine.discard(errand.ask.silo)
            errand.reply = None
            self._engine.open(errand)  # closed when it was answered
            errand.again(time.time(), error.message)
            return None

    def _update(self, position: int, parcel: Parcel | None) -> Update:
        errand, task = self._errands[position], self._tasks[position]
        if errand.failure is not None:
            error = errand.failure
            receipt = Receipt(
                task.round,
                task.silo,
                failure=error.message,
                failure_code=error.exit_code,
                failure_hint=error.hint,
            )
            return Update(receipt, lambda: iter(()))
        assert errand.reply is not None
        assert errand.reply.fit is not None
        receipt = errand.reply.fit.receipt(task.round, task.silo)
        ref = _ref_of(errand)
        if ref is None or parcel is None:
            return Update(receipt, lambda: iter(()))
        tensors = partial(self._engine.tensors, parcel, task, ref, self._state)
        return Update(receipt, tensors, lasting=True)


def _wait(fetching: Future[Parcel] | None) -> None:
    """A little while, or less if what is on its way arrives."""
    if fetching is None:
        time.sleep(_POLL_S)
    else:
        wait([fetching], _POLL_S)


def _ref_of(errand: _Errand) -> Ref | None:
    reply = errand.reply
    if reply is None or reply.fit is None or reply.fit.update is None:
        return None
    return reply.fit.update.ref()


def _round_of(key: str) -> int:
    """Of a manifest: FOLDER/<kind>/round-000012/NAME.json."""
    return int(key.split("/")[-2].removeprefix("round-"))


def _because(errand: _Errand) -> str:
    return f"; the last that was heard: {errand.last_trouble}" if errand.last_trouble else ""
