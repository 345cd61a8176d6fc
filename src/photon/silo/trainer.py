"""Answers to the aggregator's questions: what is checked, trained, kept and sent, in this order.

One node (photon.federation.Node) is held for the run that is being trained, with the run's newest
state. Whatever ends this process, the next one comes to the same answer: a finished task is on
disk with its update, and an unfinished one starts again from the kept state that the question
names (ask.fit.node_round), to the same bits. Invariant: no state that a later question may name is
removed. It breaks if states are pruned by what was done here, not by what the aggregator asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from photon.config import RunConfig
from photon.data import PreparedData
from photon.errors import (
    CheckpointCorruptError,
    NodeError,
    NonFiniteError,
    PhotonError,
    RankLostError,
    StoreUnavailableError,
    TransferStalledError,
    UnreachableError,
    error_of,
)
from photon.federation import Version
from photon.federation.envelopes import (
    Ask,
    EvalAnswer,
    FitAnswer,
    Refusal,
    Reply,
    SealedAsk,
    encoded,
    open_ask,
    parse_reply,
    text_of,
)
from photon.federation.node_state import prune_node_states
from photon.federation.tasks import EvalTask, Receipt, Update, update_header
from photon.link import Carrier, Header, Ref, write_parcel
from photon.membership.keys import NodeKey
from photon.membership.records import SignedReply
from photon.membership.signing import RECEIPT, sign_document
from photon.secure.member import Party
from photon.silo.answers import Answer, Answers
from photon.silo.cohorts import require_sealing, require_signed_cohort
from photon.silo.held_node import HeldNode, question_key
from photon.silo.policy import check, note_scored, require_data, require_for_us
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.site import Site
from photon.silo.socket import answer_of, refusal_of
from photon.store.transfer import Transfer
from photon.version import photon_version

log = logging.getLogger(__name__)

#: So often the trainer may be ended in the same way by a task, before the task is refused.
ATTEMPTS = 2

#: So often it may be ended from outside during a task: by the system for want of memory, say. Fewer
#: than the deaths after which whoever keeps it running gives up.
DEATHS = 6

#: Runs whose node states stay, the latest first: one that was stopped may be taken up again.
_RUNS_KEPT = 4

#: Pauses between attempts to reach a store that is gone, until the question's deadline.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0

_PASSING = (StoreUnavailableError, TransferStalledError, UnreachableError)

_T = TypeVar("_T")


class SiloTrainer:
    """Answers a site's questions, one at a time.

    Args:
        site: its home, text and machines.
        key: signs its answers; None where a gateway does (photon.silo.gateway).
        carriers: for a task's id, the way to the store.
        reporter: told what is done; its `draining` and `key_in_use` are heeded.
        team: the node's ranks; this process is rank 0.
    """

    def __init__(
        self,
        site: Site,
        key: NodeKey | None,
        carriers: Callable[[str], Carrier],
        reporter: Reporter,
        team: Team,
    ) -> None:
        self._site = site
        self._key = key
        self._fingerprint = key.fingerprint if key is not None else ""
        self._carriers = carriers
        self._reporter = reporter
        self._team = team
        self._answers = Answers(site.home / "answers", site.node.disk.keep_answers)
        self._carrier: Carrier | None = None
        self._held: HeldNode | None = None
        self._at: Ask | None = None
        # What a process that was killed was writing.
        for path in (site.home / "nodes").glob("*/*/.*.partial"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def read(self, raw: bytes) -> Ask:
        """The question in what came, if the aggregator signed it.

        Raises:
            MembershipError, ProtocolError: see Membership.require_key, open_ask.
        """
        return open_ask(raw, self._site.membership.require_key())

    def answer(self, ask: Ask, left_s: Callable[[], float]) -> SignedReply:
        """Do what is asked, or say why not.

        Args:
            ask: from `read`.
            left_s: for how long the answer is waited for still. Called again and again: it may
                grow.

        Raises:
            Exception: a mistake of Photon's, or a rank that is lost: this process must end. The
                same question is refused once that happened ATTEMPTS times in the same way.
        """
        self._at = ask
        log.info("asked for %s", ask.task_id)
        try:
            return self._answer(ask, left_s)
        except PhotonError as error:
            sound = self._held is None or self._held.sound
            if isinstance(error, RankLostError) or (self._team.seat.world_size > 1 and not sound):
                self.note_end(error)
                raise
            if not sound:
                self._let_go()
            return self._refuse(ask, error)
        except Exception as error:
            self.note_end(error)
            raise
        finally:
            self._at = self._carrier = None

    def refuse_unread(self, raw: bytes, error: PhotonError) -> Mapping[str, Any]:
        """The answer to what is not the aggregator's Ask: signed, if it can be told what it claims.

        It names the sha256 of what came, so that nobody's words refuse what the aggregator asked:
        at most that its signature does not hold, for which the aggregator asks again.

        Args:
            raw: what came.
            error: what is wrong with it.
        """
        log.warning("asked what is not the aggregator's question: %s", error)
        try:
            text = text_of(SealedAsk.model_validate_json(raw))
            asked = json.loads(text)
            part = asked[asked["kind"]]
            number, run = part["round"], asked["run"]["id"]
            if asked["silo"] != self._site.membership.name:
                return refusal_of(error)
            reply = Reply(
                photon_version=photon_version(),
                ask=hashlib.sha256(text).hexdigest(),
                run=run,
                round=number,
                task=f"{run}/{asked['kind']}/{number}/{asked['silo']}",
                **{name: asked[name] for name in ("kind", "silo", "log_head")},
                state=asked["state"]["sha256"],
                refused=Refusal.of(error),
            )
        except (ValueError, RecursionError, LookupError, TypeError):  # ValidationError among them
            return refusal_of(error)
        return answer_of(self._sign(reply))

    def note_stop(self) -> None:
        """Remember that this process ends in good order, whatever it is at."""
        ask = self._at
        if ask is not None:
            self._answers.not_begun(ask)

    def note_end(self, error: BaseException | str) -> None:
        """Remember what is about to end this process, with the task that it is at.

        Args:
            error: that nobody caught, or words about a rank.
        """
        ask = self._at
        if ask is None:
            return
        if isinstance(error, PhotonError):
            where, code, message = _where(error), error.exit_code, error.message
        elif isinstance(error, BaseException):
            where, code = _where(error), NodeError.exit_code
            message = f"{type(error).__name__}: {error}"
        else:
            where, code, message = error, RankLostError.exit_code, error
        failure = self._answers.note_failure(ask, where, code=code, message=message)
        log.error(
            "%s ends this trainer, %d of %d times: %s", ask.task_id, failure.times, ATTEMPTS, where
        )

    # --- one question ----------------------------------------------------------------------------

    def _answer(self, ask: Ask, left_s: Callable[[], float]) -> SignedReply:
        site = self._site
        require_for_us(ask, site.membership)
        config = site.config(ask.run)
        check(ask, config, site.node.policy, site.privacy(config))
        if ask.secure is not None:
            return self._agree(ask, left_s)
        if ask.fit is not None:
            require_sealing(ask, config, site.node.policy)
        self._carrier = carrier = self._carriers(ask.task_id)
        kept = self._answers.find(ask)
        if kept is not None:
            try:
                return self._give(ask, kept, left_s)
            except CheckpointCorruptError as error:
                log.warning("%s", error)
                self._answers.begin(ask)
        self._require_willing(ask, left_s)
        self._say(ask, "loading", detail=f"{config.run.name}, {config.federation.rounds} rounds")
        data = site.data(ask.run)
        require_data(ask, data, site.registered)
        held = self._node_for(ask, config, data)
        if ask.evaluate is not None:
            note_scored(ask, site.node.policy, site.home / "nodes" / ask.run.id)
        held.require_room()
        self._answers.begin(ask)
        version = self._persist("receiving the state", lambda: held.receive(ask, carrier), left_s)
        with self._answers.attempt(ask):
            work = self._fit if ask.kind == "fit" else self._evaluate
            answer = work(ask, held, version)
        return self._give(ask, answer, left_s)

    def _agree(self, ask: Ask, left_s: Callable[[], float]) -> SignedReply:
        """Do a phase of secure aggregation; what it keeps lies with the run's node states."""
        assert ask.secure is not None
        self._require_willing(ask, left_s)
        if ask.kind == "share":
            require_signed_cohort(ask, self._site.node.policy, self._reporter.note)
        kept = self._site.home / "nodes" / ask.run.id
        text = Party(kept, ask.silo).answer(ask.kind, ask.secure.text)
        return self._sign(self._reply(ask, secure=text))

    def _require_willing(self, ask: Ask, left_s: Callable[[], float]) -> None:
        """Refuse what this node was told to leave, or can't do."""
        if self._reporter.key_in_use is not None:
            raise self._reporter.key_in_use
        if self._reporter.draining:
            raise NodeError(
                f"{ask.silo} takes no new task: the aggregator is draining it",
                hint="Tasks are taken again when the aggregator ends the draining.",
            )
        late_s = -left_s()
        if late_s > 0:
            raise NodeError(
                f"{ask.task_id} was to be answered {late_s:.0f} s ago; it was not begun",
                hint="Another task took that long on this node.",
            )
        trouble = self._answers.trouble(ask)
        if trouble.times >= ATTEMPTS:
            raise error_of(trouble.code)(
                f"the trainer of {ask.silo} was ended {trouble.times} times by this task: "
                f"{trouble.message}",
                hint="The trainer's log on that node has the whole story. It is not tried again.",
            )
        if trouble.begun >= DEATHS:
            raise NodeError(
                f"the trainer of {ask.silo} was killed {trouble.begun} times during this task",
                hint="For want of memory, most often: see the system's log on that node. It is not "
                "tried again.",
            )

    def _fit(self, ask: Ask, held: HeldNode, version: Version) -> Answer:
        task = ask.fit_task(held.config.run.name)
        self._say(ask, "training", of=task.steps)
        started, ref = 0.0, None
        try:
            with held.at_work() as node:
                update = node.fit(task, version)
            receipt = update.receipt
            if receipt.failure is None:
                self._say(ask, "publishing", step=task.steps, of=task.steps)
                started = time.perf_counter()
                ref = self._write(ask, held, update, update_header(task, version.tensors))
        except NonFiniteError as error:  # an update that no codec takes; the node did its part
            held.sound = True
            receipt = Receipt.failed(task, error)
        load_s = receipt.load_s + held.received_s
        self._reporter.bytes_down += held.received_bytes
        receipt = replace(receipt, bytes_down=held.received_bytes, load_s=load_s)
        if ref is None:
            log.warning("%s: %s", ask.task_id, receipt.failure)
            self._answers.begin(ask)
            return self._finish(ask, held, sent=True, fit=FitAnswer.of(receipt, None))
        with held.at_work() as node:
            node.settle()
        publish_s = receipt.publish_s + time.perf_counter() - started
        receipt = replace(receipt, bytes_up=ref.wire_bytes, publish_s=publish_s)
        self._reporter.bytes_up += ref.wire_bytes
        return self._finish(ask, held, sent=False, fit=FitAnswer.of(receipt, ref))

    def _write(self, ask: Ask, held: HeldNode, update: Update, header: Header) -> Ref:
        """Put an update on this disk, under the keys that it will have in the store."""
        try:
            return write_parcel(
                Transfer(self._answers.begin(ask), streams=1),
                f"{ask.run.id}/silos/{ask.silo}",
                header,
                update.entries(),
                chunk_bytes=held.config.link.chunk_bytes,
            )
        except PhotonError:
            self._answers.begin(ask)
            raise

    def _evaluate(self, ask: Ask, held: HeldNode, version: Version) -> Answer:
        self._say(ask, "training", detail="scoring held-out text")
        task = EvalTask(ask.round, ask.silo, ask.evaluate and ask.evaluate.node_round)
        with held.at_work() as node:
            receipt = node.evaluate(task, version)
        if not math.isfinite(receipt.loss):
            raise NonFiniteError(
                f"the loss on the held-out text of {ask.silo} is {receipt.loss}",
                hint="The global model has diverged.",
            )
        receipt = replace(receipt, bytes_down=held.received_bytes)
        self._reporter.bytes_down += held.received_bytes
        return self._finish(ask, held, sent=True, evaluate=EvalAnswer.of(receipt))

    def _finish(self, ask: Ask, held: HeldNode, *, sent: bool, **part: Any) -> Answer:
        reply = self._sign(self._reply(ask, data=held.data_sha256, **part))
        answer = Answer(ask.question_sha256, reply, sent)
        self._answers.finish(ask, answer)
        return answer

    def _give(self, ask: Ask, answer: Answer, left_s: Callable[[], float]) -> SignedReply:
        """An answer whose update the store has."""
        reply = parse_reply(answer.reply.text)
        if answer.reply.fingerprint != self._fingerprint or reply.ask != ask.sha256:
            # The node has another key by now, or the same question came in another Ask.
            reply = reply.model_copy(update={"ask": ask.sha256, "log_head": ask.log_head})
            answer = replace(answer, reply=self._sign(reply))
            self._answers.finish(ask, answer)
        if reply.fit is not None and reply.fit.update is not None:
            steps = ask.fit.steps if ask.fit is not None else 0
            self._say(ask, "publishing", step=steps, of=steps)
            started = time.perf_counter()
            self._persist("sending the update", lambda: self._send(ask), left_s)
            if not answer.sent:
                publish_s = reply.fit.publish_s + time.perf_counter() - started
                fit = replace(reply.fit, publish_s=publish_s)
                signed = self._sign(reply.model_copy(update={"fit": fit}))
                answer = replace(answer, reply=signed, sent=True)
                self._answers.finish(ask, answer)
        self._prune(ask)
        done = "answered" if ask.fit is not None else "scored"
        self._reporter.say("idle", detail=f"round {ask.round}: {done}")
        log.info("answered %s", ask.task_id)
        return answer.reply

    def _send(self, ask: Ask) -> None:
        assert self._carrier is not None
        for chunks in (True, False):
            self._carrier.send(self._answers.objects(ask, chunks=chunks))

    def _persist(self, doing: str, act: Callable[[], _T], left_s: Callable[[], float]) -> _T:
        """Go on trying while the store can't be reached: days of work may depend on it."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return act()
            except _PASSING as error:
                if pause_s > left_s():
                    raise
                log.warning("%s: trying again in %.0f s: %s", doing, pause_s, error)
                self._reporter.add(detail=f"{doing}: {error.message}"[:300])
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    # --- the node --------------------------------------------------------------------------------

    def _node_for(self, ask: Ask, config: RunConfig, data: PreparedData) -> HeldNode:
        """The node of the run that a question is about; another run's is let go."""
        if self._held is None or self._held.key != question_key(ask, data):
            self._let_go()
            self._held = HeldNode(ask, config, data, self._site, self._team, self._reporter)
        return self._held

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _prune(self, ask: Ask) -> None:
        """Remove what no later question may name."""
        self._answers.prune(ask)
        folder = self._site.home / "nodes"
        if ask.fit is not None and ask.fit.node_round is not None:
            needed = range(ask.fit.node_round, sys.maxsize)
            prune_node_states(folder / ask.run.id, {ask.silo: needed})
        runs = sorted(folder.glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)
        for run in [run for run in runs if run.name != ask.run.id][_RUNS_KEPT - 1 :]:
            # What bound the silo goes on binding it: sums that it was in, a state that it scored.
            for path in sorted([run, *run.rglob("*")], reverse=True):  # what is in one before it
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
                elif not path.name.startswith(("secure-", "scored")):
                    path.unlink(missing_ok=True)

    # --- words -----------------------------------------------------------------------------------

    def _say(self, ask: Ask, state: str, **what: Any) -> None:
        self._reporter.say(state, run=ask.run.id, round=ask.round, task=ask.task_id, **what)

    def _refuse(self, ask: Ask, error: PhotonError) -> SignedReply:
        log.warning("refused %s: [%d] %s", ask.task_id, error.exit_code, error)
        self._reporter.say("refused", run=ask.run.id, round=ask.round, detail=error.message)
        return self._sign(self._reply(ask, refused=Refusal.of(error)))

    def _reply(self, ask: Ask, **part: Any) -> Reply:
        return Reply(
            photon_version=photon_version(),
            kind=ask.kind,
            silo=ask.silo,
            ask=ask.sha256,
            log_head=ask.log_head,
            run=ask.run.id,
            round=ask.round,
            task=ask.task_id,
            state=ask.state.sha256,
            **part,
        )

    def _sign(self, reply: Reply) -> SignedReply:
        text = encoded(reply)
        signature = sign_document(self._key, RECEIPT, text) if self._key is not None else ""
        return SignedReply(reply.task, text, signature, self._fingerprint)


def _where(error: BaseException) -> str:
    """The class of an error and the line of code that raised it.

    Its words may differ from one time to the next: an address, how much memory was free.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{Path(__file__).parent.parent.name}/" in frame.filename]
    last = (ours or frames)[-1:]
    place = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    return f"{type(error).__name__}{place}"
