"""Asks go to silos and signed replies come back, through everything that may get lost between.

A task is named by (run, round, silo) and may be asked any number of times: a silo that finished it
answers from its disk. So whatever dies here or there, the remedy is to ask again. Asked again is
where the post says there will be no answer, where the silo is idle although it was asked, and where
its update can't be had. Given up is a silo that was not heard of for federation.silence_s, that
trains and has taken no step for federation.stall_s, or that has not answered when the round's time
is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from photon.config import RunConfig
from photon.engines.remote.depot import global_folder, silo_folder
from photon.engines.remote.errand import ATTEMPTS, Errand
from photon.errors import (
    MembershipError,
    ProtocolError,
    SignatureError,
    UnknownMemberError,
    UnreachableError,
    error_of,
)
from photon.federation.envelopes import Ask, Reply, encoded, parse_ask, parse_reply
from photon.link.parcel import chunk_key, update_keys
from photon.membership.records import OpenTask, SignedReply
from photon.membership.refusals import LASTING, note_refusal
from photon.membership.roster import Presence, Roster
from photon.membership.signing import RECEIPT, verify_document
from photon.telemetry import Event
from photon.telemetry.events import LocalProgress, Notice

#: Between two looks at what silos say that they do, at most; an answer is taken as it comes.
_LOOK_S = 1.0
#: A silo that says it is idle so long after it was asked did not get the task, or lost it.
#: (Delivery takes seconds, and ten where a machine is overloaded.)
_IDLE_S = 10.0


class Post(Protocol):
    """Carries small documents to silos and back."""

    def push(self, task: str, message: bytes) -> str:
        """Send an open task's question to its silo, in place of one sent before.

        Args:
            message: a sealed Ask.

        Returns:
            What the answer is called.

        Raises:
            UnknownMemberError: nobody of that name can be reached just now.
        """
        ...

    def pull(self, ids: Collection[str]) -> dict[str, SignedReply | str]:
        """Answers that have arrived, each once; words where there will be none, and why."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Until an answer has arrived, or for so long."""
        ...


class Messenger:
    """Runs errands: opens their tasks, sends them, and takes what is truly their answer.

    Args:
        config: the run file.
        post: to silos.
        roster: who is a member, what each says it does, which tasks are open.
        on_event: told of local progress and of what goes wrong.
    """

    def __init__(
        self, config: RunConfig, post: Post, roster: Roster, on_event: Callable[[Event], None]
    ) -> None:
        self._config = config
        self._post = post
        self._roster = roster
        self._on_event = on_event
        self._told: dict[str, tuple[int, int]] = {}

    def begin(self, errand: Errand) -> None:
        """Open its task; take an answer that came before this process began, or ask."""
        self.open(errand)
        self._take_earlier(errand)
        if not errand.over:
            self._push(errand, time.time())

    def open(self, errand: Errand) -> None:
        """Let the silo read the state and write its update."""
        ask = errand.ask
        states = [ref.key for ref in ask.state.parcels]
        chunks, manifest = update_keys(silo_folder(ask.run.id, ask.silo), ask.round, ask.silo)
        self._roster.tasks.open(
            OpenTask(
                id=ask.task_id,
                run=ask.run.id,
                round=ask.round,
                silo=ask.silo,
                kind=ask.kind,
                opened_at=time.time(),
                until=errand.until,
                most_bytes=errand.most_bytes,
                readable=(chunk_key(global_folder(ask.run.id), ""), *states),
                writable=(chunks, manifest) if errand.most_bytes else (),
            )
        )

    def close(self, errands: Collection[Errand]) -> None:
        """Nothing is granted for their tasks any more."""
        for errand in errands:
            self._roster.tasks.close(errand.ask.task_id, None)

    def turn(self, errands: Collection[Errand]) -> bool:
        """Look once at what came back, and send what is to be sent; whether one is over by it."""
        now_s = time.time()
        open_ones = [errand for errand in errands if not errand.over]
        for errand in open_ones:
            if now_s >= errand.next_s and errand.letter is None:
                self._push(errand, now_s)
        waiting = {
            errand.letter: errand
            for errand in open_ones
            if not errand.over and errand.letter is not None
        }
        if waiting and (came := self._post.pull(waiting)):
            with self._roster.together():
                for one, answer in came.items():
                    waiting[one].letter = None
                    self._take(waiting[one], answer, now_s)
        presences = self._roster.presences()
        for errand in open_ones:
            if not errand.over:
                self._watch(errand, presences.get(errand.ask.silo), now_s)
        return any(errand.over for errand in open_ones)

    def pause_s(self, errands: Collection[Errand]) -> float:
        """How long to wait for answers before the next turn: until something is to be sent."""
        now_s = time.time()
        due = [one.next_s - now_s for one in errands if not one.over and one.letter is None]
        return max(0.0, min([_LOOK_S, *due]))

    def barred(self, silo: str) -> UnknownMemberError | None:
        """Why a silo may not take part any more; None if it may."""
        try:
            self._roster.active_member(silo)
        except UnknownMemberError as error:
            return error
        return None

    def notice(self, ask: Ask, text: str) -> None:
        """Tell what is worth knowing of a silo's task."""
        self._on_event(Notice(text=text, round=ask.round, silo=ask.silo))

    # --- sending -------------------------------------------------------------------------------

    def _push(self, errand: Errand, now_s: float) -> None:
        ask = errand.ask
        errand.asked_s = now_s
        if (error := self.barred(ask.silo)) is not None:
            errand.failure = error
            return
        try:
            errand.letter = self._post.push(ask.task_id, errand.message)
        except UnknownMemberError as error:
            errand.again(now_s, error.message)

    def _watch(self, errand: Errand, seen: tuple[Presence, float] | None, now_s: float) -> None:
        """Ask again a silo that lost its task; give up one that is silent, stalled or too late."""
        ask, silence_s = errand.ask, self._config.federation.silence_s
        presence, seen_s = seen if seen is not None else (None, 0.0)
        if (error := self.barred(ask.silo)) is not None:
            errand.failure = error
        elif now_s > errand.until:
            errand.failure = UnreachableError(
                f"{ask.silo} has not answered in the {ask.within_s:g} s "
                f"of round {ask.round}{errand.because}"
            )
        elif now_s - max(seen_s, errand.begun_s) > silence_s:
            errand.failure = UnreachableError(
                f"{ask.silo} has not been heard of for {silence_s:g} s{errand.because}"
            )
        elif presence is None:
            return
        elif presence.task == ask.task_id:
            self._progress(ask, presence)
            self._require_movement(errand, presence, now_s)
        elif (
            errand.letter is not None
            and not presence.task
            and seen_s - errand.asked_s > max(_IDLE_S, errand.pause_s)
        ):
            # It is there, it was asked, and it does nothing.
            errand.again(now_s, "it was idle although it had been asked")
            self._push(errand, now_s)

    def _require_movement(self, errand: Errand, presence: Presence, now_s: float) -> None:
        """Give up a silo that is there, trains, and takes no step.

        Transfers have a watch of their own, at the node: network.silence_s.
        """
        doing, stall_s = (presence.state, presence.step), self._config.federation.stall_s
        if presence.state != "training" or doing != errand.doing:
            errand.doing, errand.moved_s = doing, now_s
        elif now_s - errand.moved_s > stall_s:
            errand.failure = UnreachableError(
                f"{errand.ask.silo} has been at local step {presence.step} of {presence.of} for "
                f"{stall_s:g} s{errand.because}",
                hint="Its trainer hangs, or its steps take longer than federation.stall_s.",
            )

    def _progress(self, ask: Ask, presence: Presence) -> None:
        """Tell of a silo's steps, as far as they are new and it said so; losses may be withheld.

        None twice: a silo that goes to and fro between two would fill events.jsonl.
        """
        if ask.fit is None or presence.tokens_per_s is None or presence.round != ask.round:
            return
        step = min(presence.step, ask.fit.steps)
        if (ask.round, step) <= self._told.get(ask.silo, (ask.round, 0)):
            return
        self._told[ask.silo] = (ask.round, step)
        self._on_event(
            LocalProgress(
                round=ask.round,
                silo=ask.silo,
                step=step,
                global_step=ask.fit.global_step + step,
                loss=presence.loss,
                lr=presence.lr,
                gradient_norm=presence.gradient_norm,
                tokens_per_s=presence.tokens_per_s,
            )
        )

    # --- taking --------------------------------------------------------------------------------

    def _take_earlier(self, errand: Errand) -> None:
        """An answer that came before this process began, to an Ask of the same question.

        That Ask had an earlier head of the log, and perhaps the state elsewhere in the store.
        """
        ask = errand.ask
        earlier = self._roster.tasks.reply(ask.task_id)
        if earlier is None:
            return
        try:
            asked = parse_ask(earlier.ask)
            if (asked.question_sha256, asked.run) != (ask.question_sha256, ask.run):
                return
            reply = self._verified(asked, earlier)
            Errand(asked, most_bytes=errand.most_bytes).require_possible(reply, self._config)
        except (ProtocolError, MembershipError):
            return
        if reply.refused is None:
            errand.reply = reply

    def _take(self, errand: Errand, answer: SignedReply | str, now_s: float) -> None:
        """What came back for a task: a signed reply, or words."""
        if isinstance(answer, str):
            errand.again(now_s, answer)
            return
        try:
            reply = self._verified(errand.ask, answer)
        except (ProtocolError, MembershipError) as error:
            # Not its answer. Whoever sent it is named in the log; the silo is asked again.
            self._roster.journal.note(errand.ask.silo, "reply refused", error.message, refusal=True)
            self.notice(errand.ask, f"a reply was refused: {error.message}")
            errand.troubles += 1
            if errand.troubles >= ATTEMPTS:
                errand.failure = error
            else:
                errand.again(now_s, error.message)
            return
        try:
            errand.require_possible(reply, self._config)
        except ProtocolError as error:
            # Its own answer, to this very Ask: it would answer the same again.
            self._roster.journal.note(reply.silo, "reply refused", error.message, refusal=True)
            errand.failure = error
            return
        if reply.refused is None:
            errand.reply = reply
            kept = replace(answer, ask=encoded(errand.ask))
            self._roster.tasks.close(errand.ask.task_id, kept)
            return
        refusal = reply.refused
        kind = error_of(refusal.code)
        error = kind(f"{reply.silo}: {refusal.message}", hint=refusal.hint)
        # Trouble of its link; or its Ask was changed on the way, by whoever carries it.
        passing = 70 <= refusal.code < 80 or issubclass(kind, SignatureError)
        errand.troubles += 1
        self._roster.journal.note(reply.silo, "refused", refusal.message, refusal=True)
        if errand.ask.fit is not None and issubclass(kind, LASTING) and not passing:
            note_refusal(self._roster, errand.ask.run.id, reply.silo, refusal.message)
        if passing and errand.troubles < ATTEMPTS:
            errand.again(now_s, refusal.message)
        else:
            errand.failure = error

    def _verified(self, ask: Ask, answer: SignedReply) -> Reply:
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
        return reply
