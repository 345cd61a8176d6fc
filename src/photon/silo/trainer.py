"""Answers to the aggregator's questions: what is checked, trained, kept and sent, in this order.

One node (photon.federation.Node) is held for the run that is being trained, with the run's newest
state. Whatever ends this process, the next one comes to the same answer: a finished task is on
disk with its update, and an unfinished one starts again from the kept state that the question
names (ask.fit.node_round), to the same bits. Invariant: no state that a later question may name is
removed. It breaks if states are pruned by what was done here, not by what the aggregator asks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from photon.config import NodeConfig, RunConfig
from photon.data import PreparedData, open_data
from photon.errors import (
    CheckpointCorruptError,
    DiskFullError,
    ModelMismatchError,
    NodeError,
    NonFiniteError,
    PhotonError,
    RankLostError,
    StoreUnavailableError,
    TransferStalledError,
    UnreachableError,
    error_of,
)
from photon.federation import Node, NodeSettings
from photon.federation.broadcast import Inbox
from photon.federation.envelopes import (
    Ask,
    EvalAnswer,
    FitAnswer,
    Refusal,
    Reply,
    RunPart,
    encoded,
    node_config,
    parse_reply,
)
from photon.federation.node import empty_model
from photon.federation.node_state import prune_node_states
from photon.federation.sealing import SealedAsk, open_ask, text_of
from photon.federation.tasks import (
    OPTIMIZER,
    WEIGHTS,
    GlobalState,
    Receipt,
    Update,
    update_header,
)
from photon.link import Carrier, Header, Ref, write_parcel
from photon.membership.keys import NodeKey
from photon.membership.records import MOST_FIGURE
from photon.membership.roster import SignedReply
from photon.membership.signing import RECEIPT, sign_document
from photon.models import model_fingerprint, trainable_parameters
from photon.silo.answers import Answer, Answers
from photon.silo.policy import (
    Membership,
    check,
    few_silos,
    least_merged,
    note_scored,
    require_data,
    require_for_us,
    require_size,
)
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.socket import answer_of, refusal_of
from photon.silo.text import own_part
from photon.store.contract import Buffer
from photon.store.disk import file_sha256, write_json
from photon.store.transfer import Transfer, Wanted
from photon.telemetry import Event
from photon.telemetry.events import ComputeChosen, LocalProgress, Notice
from photon.training import InnerOptimizer, Seat
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

#: Of a step, what the aggregator is told while a silo trains.
_FIGURES = ("loss", "lr", "gradient_norm", "tokens_per_s")

#: Optimizer tensors that a silo keeps for each weight, at most.
_MOST_MOMENTS = 3

_T = TypeVar("_T")


class Site:
    """What this site brings to any run: its home, its text, its machines.

    Args:
        home: folder of the node.
        node: node.toml.
        membership: who it is.
    """

    def __init__(self, home: Path, node: NodeConfig, membership: Membership) -> None:
        self.home = home
        self.node = node
        self.membership = membership
        self._data: PreparedData | None = None
        self._registered = membership.data_sha256
        self._verified: str | None = None

    def config(self, run: RunPart) -> RunConfig:
        """The run as this site trains it.

        Raises:
            ProtocolError, ConfigError: see `node_config`.
        """
        site = {
            "compute": self.node.compute.model_dump(mode="json", exclude_none=True),
            "data": {"path": self.node.data.path},
        }
        return node_config(run, site)

    def data(self) -> PreparedData:
        """This site's text, as the one silo that is called as the member is.

        Raises:
            DataError: it can't be used, or no silo of it is this site's.
        """
        path = Path(self.node.data.path)
        manifest = path / "manifest.json"
        if self._data is None or not _is_file_of(manifest, self._data.sha256):
            self._data = own_part(open_data(path), self.node.data, self.membership.name)
            self._registered = self._registered or self._data.sha256
        return self._data

    @property
    def registered(self) -> str | None:
        """sha256 of the data that this site takes part with."""
        return self._registered

    def verify(self, data: PreparedData) -> None:
        """Read through this site's text, once for each time it changes.

        Raises:
            ShardCorruptError, VocabularyMismatchError: see PreparedData.verify.
        """
        if self._verified != data.sha256:
            data.verify()
            self._verified = data.sha256

    def settings(self, run: RunPart, config: RunConfig, seat: Seat) -> NodeSettings:
        """Of this site's node in a run."""
        return NodeSettings(config, self.home / "nodes" / run.id, seat=seat)


@dataclass(frozen=True)
class _Running:
    """The run that is being trained.

    Attributes:
        key: of all that the node was built from.
        shapes: of the global state's tensors.
    """

    key: tuple[str, ...]
    config: RunConfig
    node: Node
    shapes: Mapping[str, torch.Size]
    inbox: Inbox
    data_sha256: str


class _Line:
    """The carrier of the task at hand, under one name for as long as a node lives."""

    def __init__(self) -> None:
        self.carrier: Carrier | None = None
        #: What was fetched comes through here first, so that a new process need not fetch it again.
        self.spool: Path | None = None
        self.received_bytes = 0

    def send(self, objects: Iterable[tuple[str, Any]]) -> object:
        assert self.carrier is not None
        return self.carrier.send(objects)

    def fetch(self, wanted: Iterable[Wanted], *, spool: Path | None = None) -> Iterator[Buffer]:
        assert self.carrier is not None
        # Not a loop with a name for the object, which would keep it in memory.
        return map(self._counted, self.carrier.fetch(wanted, spool=spool or self.spool))

    def _counted(self, data: Buffer) -> Buffer:
        self.received_bytes += len(data)
        return data


class SiloTrainer:
    """Answers a site's questions, one at a time.

    Args:
        site: its home, text and machines.
        key: signs its answers.
        carriers: for a task's id, the way to the store.
        reporter: told what is done; its `draining` and `key_in_use` are heeded.
        team: the node's ranks; this process is rank 0.
    """

    def __init__(
        self,
        site: Site,
        key: NodeKey,
        carriers: Callable[[str], Carrier],
        reporter: Reporter,
        team: Team,
    ) -> None:
        self._site = site
        self._key = key
        self._carriers = carriers
        self._reporter = reporter
        self._team = team
        self._answers = Answers(site.home / "answers", site.node.disk.keep_answers)
        self._line = _Line()
        self._running: _Running | None = None
        self._node_is_sound = True
        self._at: Ask | None = None
        _remove_partials(site.home / "nodes")

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
            if isinstance(error, RankLostError) or (
                self._team.size > 1 and not self._node_is_sound
            ):
                self.note_end(error)
                raise
            if not self._node_is_sound:
                self._let_go()
            return self._refuse(ask, error)
        except Exception as error:
            self.note_end(error)
            raise
        finally:
            self._at = None
            self._line.carrier = None

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
            task = f"{run}/{asked['kind']}/{number}/{asked['silo']}"
            if asked["silo"] != self._site.membership.name:
                return refusal_of(error)
            reply = Reply(
                photon_version=photon_version(),
                kind=asked["kind"],
                silo=asked["silo"],
                ask=hashlib.sha256(text).hexdigest(),
                log_head=asked["log_head"],
                run=run,
                round=number,
                task=task,
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
        where, code, message = str(error), RankLostError.exit_code, str(error)
        if isinstance(error, BaseException):
            where, code = _where(error), NodeError.exit_code
            message = f"{type(error).__name__}: {error}"
        if isinstance(error, PhotonError):
            code, message = error.exit_code, error.message
        failure = self._answers.note_failure(ask, where, code=code, message=message)
        log.error(
            "%s ends this trainer, %d of %d times: %s", ask.task_id, failure.times, ATTEMPTS, where
        )

    # --- one question ----------------------------------------------------------------------------

    def _answer(self, ask: Ask, left_s: Callable[[], float]) -> SignedReply:
        site = self._site
        require_for_us(ask, site.membership)
        config = site.config(ask.run)
        check(ask, config, site.node.policy)
        self._line.carrier = self._carriers(ask.task_id)
        kept = self._answers.find(ask)
        if kept is not None:
            try:
                return self._give(ask, kept, left_s)
            except CheckpointCorruptError as error:
                log.warning("%s", error)
                self._answers.forget(ask)
        self._require_willing(ask, left_s)
        self._say(ask, "loading", detail=f"{config.run.name}, {config.federation.rounds} rounds")
        data = site.data()
        require_data(ask, data, site.registered)
        running = self._run_of(ask, config, data)
        if ask.evaluate is not None:
            note_scored(ask, site.node.policy, site.home / "nodes" / ask.run.id)
        self._require_room(running)
        self._answers.begin(ask)
        state = self._receive(ask, running, left_s)
        with self._answers.attempt(ask):
            work = self._fit if ask.kind == "fit" else self._evaluate
            answer = work(ask, running, state)
        return self._give(ask, answer, left_s)

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
        failure = self._answers.failure(ask)
        if failure is not None and failure.times >= ATTEMPTS:
            raise error_of(failure.code)(
                f"the trainer of {ask.silo} was ended {failure.times} times by this task: "
                f"{failure.message}",
                hint="The trainer's log on that node has the whole story. It is not tried again.",
            )
        deaths = self._answers.begun(ask)
        if deaths >= DEATHS:
            raise NodeError(
                f"the trainer of {ask.silo} was killed {deaths} times during this task",
                hint="For want of memory, most often: see the system's log on that node. It is not "
                "tried again.",
            )

    def _require_room(self, running: _Running) -> None:
        """Refuse before training what could not be written after it."""
        config, free_gib = running.config, self._site.node.disk.min_free_gib
        values = {name: shape.numel() for name, shape in running.shapes.items()}
        weights = sum(count for name, count in values.items() if name.startswith(WEIGHTS))
        copies = 1 + config.link.feeds_back
        copies += _MOST_MOMENTS if config.federation.optimizer_state == "keep" else 0
        needed = 4 * (weights * copies + 2 * sum(values.values())) + int(free_gib * 2**30)
        free = shutil.disk_usage(self._site.home).free
        if free < needed:
            raise DiskFullError(
                f"a task needs {needed / 1e9:.2f} GB at {self._site.home} "
                f"(disk.min_free_gib = {free_gib:g} among them), {free / 1e9:.2f} GB are free",
                hint="Free space there, lower disk.keep_answers or disk.min_free_gib in node.toml, "
                "or move the node's home.",
            )

    def _receive(self, ask: Ask, running: _Running, left_s: Callable[[], float]) -> GlobalState:
        line, spools = self._line, self._site.home / "incoming"
        line.spool = spools / ask.state.sha256
        for other in spools.glob("*"):
            if other != line.spool:
                shutil.rmtree(other, ignore_errors=True)
        ref = ask.state.state_ref(running.config.run.name)

        def receive() -> GlobalState:
            line.received_bytes = 0  # what an attempt before this one got comes out of the spool
            return running.inbox.receive(ref)

        state = self._persist("receiving the state", receive, left_s)
        shutil.rmtree(spools, ignore_errors=True)
        log.info("received %.1f MB: the state after round %d", line.received_bytes / 1e6, ref.round)
        return state

    def _fit(self, ask: Ask, running: _Running, state: GlobalState) -> Answer:
        task = ask.fit_task(running.config.run.name)
        self._say(ask, "training", of=task.steps)
        received, started = self._line.received_bytes, 0.0
        try:
            with self._in_the_node():
                update = running.node.fit(task, state)
            receipt, ref = replace(update.receipt, bytes_down=received), None
            if receipt.failure is None:
                self._say(ask, "publishing", step=task.steps, of=task.steps)
                started = time.perf_counter()
                ref = self._write(ask, running, update, update_header(task, state))
        except NonFiniteError as error:  # an update that no codec takes; the node did its part
            self._node_is_sound = True
            receipt, ref = _failed(task.round, task.silo, error), None
            receipt = replace(receipt, bytes_down=received)
        if ref is None:
            log.warning("%s: %s", ask.task_id, receipt.failure)
            self._answers.begin(ask)
            return self._finish(ask, running, sent=True, fit=FitAnswer.of(receipt, None))
        with self._in_the_node():
            running.node.settle()
        receipt = replace(
            receipt,
            bytes_up=ref.wire_bytes,
            publish_s=receipt.publish_s + time.perf_counter() - started,
        )
        return self._finish(ask, running, sent=False, fit=FitAnswer.of(receipt, ref))

    def _write(self, ask: Ask, running: _Running, update: Update, header: Header) -> Ref:
        """Put an update on this disk, under the keys that it will have in the store."""
        try:
            return write_parcel(
                Transfer(self._answers.begin(ask), streams=1),
                f"{ask.run.id}/silos/{ask.silo}",
                header,
                update.entries(),
                chunk_bytes=running.config.link.chunk_bytes,
            )
        except PhotonError:
            self._answers.forget(ask)
            raise

    def _evaluate(self, ask: Ask, running: _Running, state: GlobalState) -> Answer:
        self._say(ask, "training", detail="scoring held-out text")
        with self._in_the_node():
            receipt = next(iter(running.node.evaluate([ask.eval_task()], state)))
        if not math.isfinite(receipt.loss):
            raise NonFiniteError(
                f"the loss on the held-out text of {ask.silo} is {receipt.loss}",
                hint="The global model has diverged.",
            )
        receipt = replace(receipt, bytes_down=self._line.received_bytes)
        return self._finish(ask, running, sent=True, evaluate=EvalAnswer.of(receipt))

    def _finish(self, ask: Ask, running: _Running, *, sent: bool, **part: Any) -> Answer:
        reply = self._sign(self._reply(ask, data=running.data_sha256, **part))
        answer = Answer(ask.question_sha256, reply, sent)
        self._answers.finish(ask, answer)
        return answer

    def _give(self, ask: Ask, answer: Answer, left_s: Callable[[], float]) -> SignedReply:
        """An answer whose update the store has."""
        reply = parse_reply(answer.reply.text)
        if answer.reply.fingerprint != self._key.fingerprint or reply.ask != ask.sha256:
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
                fit = reply.fit.model_copy(update={"publish_s": publish_s})
                signed = self._sign(reply.model_copy(update={"fit": fit}))
                answer = replace(answer, reply=signed, sent=True)
                self._answers.finish(ask, answer)
        self._prune(ask)
        done = "answered" if ask.fit is not None else "scored"
        self._reporter.say("idle", detail=f"round {ask.round}: {done}")
        log.info("answered %s", ask.task_id)
        return answer.reply

    def _send(self, ask: Ask) -> None:
        self._line.send(self._answers.chunks(ask))
        self._line.send(self._answers.manifest(ask))

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

    def _run_of(self, ask: Ask, config: RunConfig, data: PreparedData) -> _Running:
        """The run that a question is about, with its node; another run's is let go."""
        wanted = json.dumps(ask.run.config, sort_keys=True)
        key = (ask.run.id, wanted, ask.run.model, data.sha256)
        running = self._running
        if running is not None and running.key == key:
            return running
        self._let_go()
        skeleton = empty_model(config, vocab_size=data.vocab_size, eos_id=data.eos_id)
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        require_size(parameters, self._site.node.policy)
        found = model_fingerprint(skeleton)
        if found != ask.run.model:
            raise ModelMismatchError(
                f"the run's model has fingerprint {ask.run.model[:12]}..., this site builds one "
                f"with {found[:12]}... from the same run file",
                hint="Both sides need the same version of Photon and of transformers, and where "
                "model.path is set, the same model under that name.",
            )
        if (least := least_merged(ask, config)) < 3:
            self._reporter.note(
                f"warning: {few_silos(least)}; policy.min_participants can refuse it"
            )
        if config.data.verify:
            self._site.verify(data)
        shapes = _state_shapes(skeleton, config)
        settings = self._site.settings(ask.run, config, self._team.seat)
        settings.folder.mkdir(parents=True, exist_ok=True)
        self._team.begin(ask.run.model_dump(mode="json"))
        node = Node(settings, self._heard, data=data, model=skeleton)
        self._running = _Running(
            key, config, node, shapes, Inbox(self._line, shapes, config.link.specs), data.sha256
        )
        _write_run(self._site.home / "run.json", ask, config, parameters)
        return self._running

    @contextmanager
    def _in_the_node(self) -> Iterator[None]:
        """What raises in here leaves the node as nobody knows."""
        self._node_is_sound = False
        yield
        self._node_is_sound = True

    def _let_go(self) -> None:
        running, self._running = self._running, None
        self._node_is_sound = True
        if running is not None:
            running.node.close()

    def _heard(self, event: Event) -> None:
        """What the node tells while it trains."""
        if isinstance(event, LocalProgress):
            loss, speed = (event.loss or math.nan), (event.tokens_per_s or math.nan)
            words = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
            told = {name: _figure(getattr(event, name)) for name in _FIGURES}
            self._reporter.add(step=event.step, detail=words, **told)
            log.info("round %d, step %d: %s", event.round, event.step, words)
        elif isinstance(event, ComputeChosen):
            log.info("trains on %s, %s: %s", event.device, event.strategy, event.reason)
        elif isinstance(event, Notice):
            log.info("%s", event.text)

    def _prune(self, ask: Ask) -> None:
        """Remove what no later question may name."""
        self._answers.prune(ask)
        folder = self._site.home / "nodes"
        if ask.fit is not None and ask.fit.node_round is not None:
            silo = folder / ask.run.id / ask.silo
            rounds = {_round_of(path) for path in [*silo.glob("round-*"), *silo.glob("feedback-*")]}
            needed = {number for number in rounds if number >= ask.fit.node_round}
            prune_node_states(folder / ask.run.id, {ask.silo: needed})
        runs = sorted(folder.glob("*"), key=lambda run: run.stat().st_mtime, reverse=True)
        for run in [run for run in runs if run.name != ask.run.id][_RUNS_KEPT - 1 :]:
            shutil.rmtree(run, ignore_errors=True)

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
        signature = sign_document(self._key, RECEIPT, text)
        return SignedReply(reply.task, text, signature, self._key.fingerprint)


def follow(site: Site, team: Team) -> None:
    """Train with rank 0, run after run; for the other ranks.

    Raises:
        RankLostError: rank 0, or another, is gone.
    """
    for order in team.orders():
        run = RunPart.model_validate(order)
        try:
            config = site.config(run)
            node = Node(site.settings(run, config, team.seat), lambda _: None, data=site.data())
        except RankLostError:
            raise
        except PhotonError as error:
            # What keeps one rank from a run keeps the others, and rank 0 says so.
            log.error("rank %d: %s", team.seat.rank, error)
            continue
        node.follow()


def _state_shapes(skeleton: nn.Module, config: RunConfig) -> dict[str, torch.Size]:
    """Of the global state's tensors."""
    shapes = {WEIGHTS + name: one.shape for name, one in trainable_parameters(skeleton).items()}
    if config.federation.optimizer_state == "average":
        inner = InnerOptimizer(skeleton, config.local).initial_state()
        shapes |= {OPTIMIZER + name: one.shape for name, one in inner.items()}
    return shapes


def _figure(value: float | None) -> float | None:
    """As the desk takes it: finite and within bounds, or not told."""
    return value if value is not None and 0 <= value <= MOST_FIGURE else None


def _failed(number: int, silo: str, error: NonFiniteError) -> Receipt:
    return Receipt(
        number,
        silo,
        failure=error.message,
        failure_code=error.exit_code,
        failure_hint=error.hint,
    )


def _where(error: BaseException) -> str:
    """The class of an error and the line of code that raised it.

    Its words may differ from one time to the next: an address, how much memory was free.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{Path(__file__).parent.parent.name}/" in frame.filename]
    last = (ours or frames)[-1:]
    place = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    return f"{type(error).__name__}{place}"


def _is_file_of(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


def _round_of(path: Path) -> int:
    digits = path.name.removesuffix(".safetensors").rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _remove_partials(nodes: Path) -> None:
    """What a process that was killed was writing."""
    for path in nodes.glob("*/*/.*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_run(path: Path, ask: Ask, config: RunConfig, parameters: int) -> None:
    """What is being trained here, for who looks into the home."""
    record = {
        "id": ask.run.id,
        "name": config.run.name,
        "silos": ask.run.silos,
        "parameters": parameters,
        "began_at": time.time(),
    }
    write_json(path, record, "what is trained here")
