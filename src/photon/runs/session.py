"""One process's work on a run: checks, engine, loop, summary."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from photon.aggregation.rules import SPOOLING
from photon.config import RunConfig, write_resolved
from photon.config.children import LEAF, check_children, participants, refuse_children
from photon.config.clock import ClockConfig
from photon.config.load import load_clock
from photon.data import PreparedData, open_data, open_stream
from photon.energy.account import Power, Spent, witness
from photon.energy.meter import METER
from photon.engines.groups import in_the_round, with_groups
from photon.engines.simulated import SimulatedEngine, SimulatedFleet
from photon.engines.workers import WorkerEngine
from photon.errors import (
    EmptySiloError,
    IncompatibleConfigError,
    ModelMismatchError,
    ResumeMismatchError,
)
from photon.federation import (
    CheckpointStore,
    Engine,
    Federation,
    FixedFleet,
    Fleet,
    RunState,
    Server,
    sample_participants,
)
from photon.federation.layout import empty_model, initial_model, layout_of, require_own_rows
from photon.federation.outstanding import Order
from photon.federation.secure_rounds import require_room
from photon.models import model_fingerprint, tokenizer_file_of, trainable_parameters
from photon.runs.changes import changes, go_on_with
from photon.runs.folder import (
    RunResult,
    describe_run,
    only_process,
    require_same_tokenizer,
    versions,
    with_own_model,
)
from photon.runs.nodes import CENTRALISED, Elsewhere, Nodes, resolved
from photon.runs.rounds import Rounds, stopping_on_sigterm
from photon.runs.summary import summary_of
from photon.store.disk import require_disk, write_json, writing
from photon.store.served import LOCKS, RUN_FILE, SERVE_FILE
from photon.telemetry import JsonlWriter, Listener, Recorder, events
from photon.telemetry.tensorboard import TensorBoardWriter
from photon.training import count_flops, decayed_names, plan_compute, power_of
from photon.version import photon_version

#: A run folder's copy of the clock that its time is simulated by.
CLOCK_FILE = "clock.toml"

Groups = dict[str, dict[str, Tensor]]

#: What a run folder holds before the run's first process: its lock, and what `photon serve` left.
KEPT = (*LOCKS, SERVE_FILE, RUN_FILE, "audit.jsonl")


@dataclass(frozen=True)
class Guests:
    """Silos that are not on this machine.

    Attributes:
        fleet: who they are.
        silo_tokens: to train on, by silo, of those that the next round will be drawn from.
        engine: makes the engine that reaches them.
        notary: told every event first, checkpoints included.
        ending: whether no further round is to begin.
    """

    fleet: Fleet
    silo_tokens: Mapping[str, int]
    engine: Elsewhere
    notary: Listener
    ending: Callable[[], bool]


class Session:
    """One process's work on a run folder.

    Args:
        silos: whose text is trained on; all of the data's by default.
        guests: of a run of kind "serve"; the data here is the global held-out set's.
        clock: of a simulation whose time is simulated too.
        begun: whether the folder holds the run already, and so its model's architecture.
    """

    def __init__(
        self,
        kind: events.Kind,
        config: RunConfig,
        silos: list[str] | None,
        folder: Path,
        listener: Listener | None,
        *,
        guests: Guests | None = None,
        begun: bool = False,
        clock: ClockConfig | None = None,
    ) -> None:
        self.kind: events.Kind = kind
        self.folder = folder
        self.listener = listener
        kept = folder / CLOCK_FILE
        self.clock = load_clock(kept) if begun and kept.is_file() else clock
        self.data = open_data(config.data.path, own_vocabularies=kind == "simulate")
        self._guests = guests
        if guests is None:
            self.silos = _chosen_silos(self.data, silos)
            tokens = {silo: self.data.silos[silo].train_tokens for silo in self.silos}
        else:
            tokens = dict(guests.silo_tokens)
            self.silos = sorted(tokens)
        self._silo_tokens = tokens
        self.config = resolved(kind, config, self.data)
        if kind == "simulate":
            check_children(self.config, self.silos)
        if self.clock is not None:
            refuse_children(config, "simulated time")
        elsewhere = guests.engine if guests is not None else None
        self._begun = begun
        built = with_own_model(self.config, folder) if begun else self.config
        self.nodes = Nodes(kind, built, self.data, self.silos, folder, elsewhere)
        self._model: nn.Module | None = None

    def _check(self) -> None:
        """Everything that can go wrong and can be known before training."""
        config, data = self.config, self.data
        participants = self._participants()
        if config.federation.quorum is not None and config.federation.quorum > participants:
            raise IncompatibleConfigError(
                f"federation.quorum = {config.federation.quorum} exceeds the {participants} "
                "participants of a round"
            )
        if config.privacy.secure_aggregation:
            require_room(config.federation.sample or participants)
        for silo in self.silos if self._guests is None else ():
            open_stream(config, data, [silo]).close()
        if config.data.verify:
            data.verify()
        # Pretrained weights mean something with their own tokens only.
        if config.model.init == "pretrained" and not self._begun:
            require_same_tokenizer(tokenizer_file_of(str(config.model.path)), data)
        shape = self.nodes.skeleton()
        if data.own_vocabularies:
            require_own_rows(shape, config.model.init)
        self.nodes.fit(shape)
        decayed_names(trainable_parameters(shape), config.local.no_decay)
        weights_bytes = 4 * sum(parameter.numel() for parameter in shape.parameters())
        moments = {"adamw": 2, "muon": 2, "adopt": 2, "amsgrad": 3, "sgd": 0}
        state_bytes = weights_bytes * moments[config.local.optimizer]
        # Parts of their own are kept too, and hardly ever without the state that trains them.
        keeps = config.federation.optimizer_state == "keep" or config.parts.kept
        children = config.federation.children
        leaves = sum(children.get(name, LEAF).leaves for name in self._fleet_tokens)
        keepers = {"train": 1, "simulate": leaves if keeps else 0, "serve": 0}[self.kind]
        feeds_back = self.kind == "simulate" and config.feeds_back
        feedback_bytes = weights_bytes * leaves if feeds_back else 0
        # Outer optimizers have two moments at most; feedback is one more.
        feedback_bytes += 3 * weights_bytes * sum(one.groups for one in children.values())
        rules = {config.federation.merging_rule, config.parts.key_rule}
        spools = self.kind != "train" and not rules.isdisjoint(SPOOLING)
        left_out_bytes = weights_bytes if config.link.lossy_broadcast else 0
        checkpoint_bytes = weights_bytes + state_bytes + left_out_bytes
        node_bytes = state_bytes * keepers + feedback_bytes
        needed = (config.run.keep_checkpoints + 1) * (checkpoint_bytes + node_bytes)
        require_disk(self.folder, needed + weights_bytes * participants * spools, "this run")

    def follow(self) -> None:
        """Train with rank 0, which keeps the run; for the other ranks under torchrun."""
        self.nodes.follow()

    def execute(self, record: dict[str, Any] | None) -> RunResult:
        """Run to the end; `record` is run.json when the run is resumed.

        Raises:
            PhotonError: all that can be known before training is checked first.
        """
        METER.take()  # what this process did before is not the run's
        self._witness = witness()
        self._check()
        with (
            only_process(self.folder, served=self.kind == "serve"),
            writing("the run", self.folder),
        ):
            checkpoints = CheckpointStore(
                self.folder / "checkpoints", self.config.run.keep_checkpoints
            )
            # A run that has a checkpoint needs no folder of a pretrained model any more.
            under_way = self._begun and bool(checkpoints.rounds())
            self._model = (
                self.nodes.skeleton() if under_way else initial_model(self.config, self.data)
            )
            fingerprint = model_fingerprint(self._model)
            notices: list[str] = []
            changed: dict[str, tuple[Any, Any]] = {}
            if record is None:
                self._make_folder(fingerprint)
            else:
                self._check_same(record, fingerprint)
                notices = self._note_versions(record)
                changed = changes(self.folder, self.config)
            state, tensors = RunState(0, 0, fingerprint, self.data.sha256), {}
            resumed = bool(checkpoints.rounds())
            problems: list[str] = []
            if resumed:
                state, tensors, problems = checkpoints.load_latest()
            recorder = self._recorder(state)
            try:
                recorder.emit(self._started(state.round if record is not None else None))
                if changed:
                    recorder.emit(events.RunChanged(round=state.round, changes=changed))
                    notices.append(_in_words(changed, state.round))
                if record is not None:
                    go_on_with(self.folder, self.config, state.round, changed=bool(changed))
                for text in notices:
                    recorder.emit(events.Notice(text=text, round=state.round, silo=""))
                for problem in problems:
                    recorder.emit(
                        events.RunStopped(round=state.round, reason=f"skipped: {problem}")
                    )
                loop = self._loop(state, recorder, checkpoints, tensors)
                tensors.clear()
                return self._run_loop(loop, recorder)
            finally:
                recorder.close()

    def _run_loop(self, loop: Rounds, recorder: Recorder) -> RunResult:
        try:
            with stopping_on_sigterm():
                over = loop.run()
            if not over:
                recorder.emit(events.RunStopped(round=loop.state.round, reason="drained"))
                return RunResult(self.folder, {})
            summary = events.finite(
                summary_of(
                    loop.state,
                    loop.evaluation,
                    self.config,
                    loop.federation.server.weights,
                    elapsed_s=recorder.elapsed_s,
                    at_once=self._at_once,
                    alone=self.kind == "train",
                )
            )
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            with contextlib.suppress(OSError):
                recorder.emit(events.RunStopped(round=loop.state.round, reason=reason))
            raise
        finally:
            loop.federation.engine.close()
        recorder.emit(events.RunFinished(summary=summary))
        write_json(self.folder / "summary.json", summary)
        return RunResult(self.folder, summary)

    def _loop(
        self, state: RunState, recorder: Recorder, checkpoints: CheckpointStore, tensors: Groups
    ) -> Rounds:
        model, on_event = self._model, recorder.emit
        assert model is not None
        self._model = None  # an aggregator with workers must not hold a model of its own
        if not tensors:
            once = layout_of(model).once_of(model)
            tensors = {"global": self.nodes.initial_state(model), "once": once}
        key, nodes = layout_of(model).named("key"), self.nodes.settings()
        if self.config.federation.children:
            on_event = in_the_round(on_event)
        engine, tokens = self.nodes.engine(model, on_event), self._silo_tokens
        config, pooled, options = self.config, (), dict[str, Any]()
        if self.clock is None:
            options["used"] = self._used(engine)
        if self._guests is not None:
            fleet, options["draining"] = self._guests.fleet, self._guests.ending
        elif self.kind == "train":
            config, pooled = nodes.config, sorted(tokens)
            fleet = FixedFleet({CENTRALISED: sum(tokens.values())}, scored=list(self.data.silos))
        elif self.clock is None:
            engine = with_groups(engine, config, tokens, nodes.folder, on_event, key)
            # The longest first: workers are done at about the same time then.
            scored = sorted(tokens, key=lambda silo: (-tokens[silo], silo))
            fleet = FixedFleet(self._fleet_tokens, scored=scored)
            options["ahead"] = self.nodes.workers > 0 and not config.federation.children
        else:
            spool = self.folder / "arrivals"
            engine = SimulatedEngine(engine, self.clock, sorted(tokens), spool, state.clock)
            needed = config.federation.sample or config.quorum_of(len(tokens))
            fleet = SimulatedFleet(dict(tokens), needed, engine, self.clock)
            options |= {"ended": fleet.ended, "clock": engine.clock}
        server = Server(config, self.folder, tensors, state, key)
        order = Order(None if config.federation.in_task_order else self.folder / "order.jsonl")
        kept = {"pooled": pooled, "order": order, "folder": self.folder}
        federation = Federation(config, fleet, engine, server, on_event, **kept)
        federation.outstanding.go_on_with(state.in_flight, tensors, server)
        return Rounds(federation, state, recorder, checkpoints, **options)

    def _used(self, engine: Engine) -> Callable[[bool], tuple[Spent | None, float]]:
        """As Rounds asks; a witness stands where all that trains is on this machine's cores, in
        processes that this one knows."""
        watts, compute, seat = self.config.energy, self.config.compute, self.nodes.seat
        here = self._guests is None and seat.world_size == 1 and compute.device == "cpu"
        workers = engine if isinstance(engine, WorkerEngine) else None
        power = Power(watts, 0) if workers else power_of(watts, plan_compute(compute, seat=seat))

        def used(over: bool) -> tuple[Spent | None, float]:
            untold = workers.untold() if workers and over else []
            others = workers.process_ids if workers else []
            joules = self._witness(power, others, compute.threads) if here else 0.0
            return Spent.sum([power.taken(), *untold]), joules

        return used

    @property
    def _at_once(self) -> int:
        """Silos, or training processes, that trained at the same time."""
        if self.kind == "serve" or self.clock is not None:
            return len(self.silos)
        return max(1, self.nodes.workers)

    @property
    def _fleet_tokens(self) -> dict[str, int]:
        """To train on, by participant: of a simulation, groups are some."""
        children = self.config.federation.children if self.kind == "simulate" else {}
        return participants(children, self._silo_tokens)

    def _participants(self) -> int:
        return len(
            sample_participants(
                self._fleet_tokens,
                count=self.config.federation.sample if self.kind != "train" else None,
                sampling="uniform",
                seed=0,
                round_number=1,
            )
        )

    def _started(self, resumed_from: int | None) -> events.RunStarted:
        config, model = self.config, self._model
        assert model is not None
        workers = self.nodes.workers
        plan = plan_compute(config.compute, processes=max(1, workers) * self.nodes.ranks)
        central = self.kind == "train"
        flops = count_flops(model, config.data.sequence_length)
        return events.RunStarted(
            kind=self.kind,
            run=config.run.name,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            photon_version=photon_version(),
            silos=self.silos,
            rounds=config.federation.rounds,
            local_steps=config.local.steps,
            participants_per_round=1 if central else self._participants(),
            batch_size=self.nodes.batch_size,
            sequence_length=config.data.sequence_length,
            parameters=sum(parameter.numel() for parameter in trainable_parameters(model).values()),
            silo_tokens=self._silo_tokens,
            device=plan.device.type,
            precision=plan.precision,
            threads=plan.threads,
            workers=workers,
            update_codec=config.link.update_codec,
            broadcast_codec=config.link.broadcast_codec,
            flops_per_token=flops.per_token,
            flops_method=flops.explain(),
            resumed_from_round=resumed_from,
        )

    def _recorder(self, state: RunState) -> Recorder:
        listeners: list[Listener] = [
            JsonlWriter(self.folder / "events.jsonl"),
            TensorBoardWriter(self.folder / "tensorboard"),
        ]
        if self._guests is not None:
            listeners.append(self._guests.notary)
        if self.listener is not None:
            listeners.append(self.listener)
        return Recorder(listeners, elapsed_s=state.elapsed_s)

    def _make_folder(self, fingerprint: str) -> None:
        for path in self.folder.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.clock is not None:
            write_resolved(self.clock, self.folder / CLOCK_FILE)
        own = self.data.own_vocabularies
        describe_run(
            self.folder,
            self.config,
            self._model,
            {file.parent.parent.name * own: file.parent for file in self.data.tokenizers},
            kind=self.kind,
            silos=self.silos,
            vocab_size=self.data.vocab_size,
            eos_id=self.data.eos_id,
            model_fingerprint=fingerprint,
            data_sha256=self.data.sha256,
        )

    def _check_same(self, record: dict[str, Any], fingerprint: str) -> None:
        if record["data_sha256"] != self.data.sha256:
            raise ResumeMismatchError(
                f"the data at {self.config.data.path} is not what this run started with "
                f"(sha256 {self.data.sha256[:12]}..., then {record['data_sha256'][:12]}...)",
                hint="Point data.path at the original folder, or start a new run.",
            )
        if record["model_fingerprint"] != fingerprint:
            raise ModelMismatchError(
                f"config.resolved.toml in {self.folder} describes another model than the run "
                "started with",
                hint="Undo the change to [model] or [data], or start a new run.",
            )
        source = self.config.model.path
        if source is None or not (Path(source).expanduser() / "config.json").is_file():
            return
        there = empty_model(self.config, vocab_size=self.data.vocab_size, eos_id=self.data.eos_id)
        if model_fingerprint(there) != fingerprint:
            raise ModelMismatchError(
                f"{source}/config.json describes another model than the run started with",
                hint="Put it back as it was. (A run keeps a copy in its own folder and goes on "
                "where that folder is gone, but not beside one that says otherwise.)",
            )

    def _note_versions(self, record: dict[str, Any]) -> list[str]:
        """What is to be told where this process has other versions than the one before it."""
        here = versions()
        there = {key: record.get(key, "unknown") for key in here}
        if there == here:
            return []
        write_json(self.folder / "run.json", {**record, **here})
        return [
            f"this run was last worked on with Photon {there['photon_version']} and PyTorch "
            f"{there['torch_version']}, and goes on with Photon {here['photon_version']} and "
            f"PyTorch {here['torch_version']}: it need not come to the same bits as if nothing "
            "had changed"
        ]


def _in_words(changed: dict[str, tuple[Any, Any]], number: int) -> str:
    said = ", ".join(f"{key} = {now} (was {was})" for key, (was, now) in changed.items())
    return f"changed on purpose, for the rounds after round {number}: {said}"


def _chosen_silos(data: PreparedData, silos: Sequence[str] | None) -> list[str]:
    if silos is None:
        return sorted(data.silos)
    unknown = sorted(set(silos) - set(data.silos))
    if unknown or not silos:
        raise EmptySiloError(
            f"no silo named {', '.join(map(repr, unknown)) or '(none given)'} in {data.path}",
            hint=f"Its silos: {', '.join(sorted(data.silos))}.",
        )
    return sorted(set(silos))
