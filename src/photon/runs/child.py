"""A federation inside another, served: a member of its parent, with members of its own.

In the place of rounds it has its parent's tasks, as photon.silo brings them; a Group does each with
the members at this federation's own door. A task whose process was killed is done again, of answers
that the roster and the store keep until it is over: members are asked for the others only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from photon.config import PrivacyConfig, RunConfig, ServeConfig
from photon.config.children import check_children, check_served, inside
from photon.config.serve import ComplyConfig
from photon.engines.remote import Asker, Depot, Post, RemoteEngine
from photon.errors import IncompatibleConfigError
from photon.federation import (
    CheckpointStore,
    Closed,
    EvalReceipt,
    NodeSettings,
    Participant,
    RunState,
    Version,
)
from photon.federation.account import RoundCosts
from photon.federation.envelopes import RunPart, dictated
from photon.federation.group import Group
from photon.federation.layout import layout_of
from photon.link import tensors_sha256
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.membership.roster import Roster
from photon.runs.compliance import refused_by
from photon.runs.fleet import Draws, JoinedFleet
from photon.runs.folder import describe_run
from photon.runs.notary import Notary
from photon.store.run_folder import read_record
from photon.store.served import Serving
from photon.telemetry import Event, JsonlWriter, Recorder, read_history
from photon.telemetry.events import LocalProgress, RoundFinished
from photon.training import plan_compute


@dataclass(frozen=True)
class ServedFederation:
    """What works for a run of the parent: photon.silo.site.Build.

    Attributes:
        name: as the parent calls this federation.
        folder: of its run, with serve.json.
        serve: its own [serve], with what it is like inside the parent.
        post: to its members; None: letters, which its desk hands out.
        comply: its own [comply].
        ends: what to close.
    """

    name: str
    folder: Path
    serve: ServeConfig
    roster: Roster
    post: Post | None = None
    comply: ComplyConfig = field(default_factory=ComplyConfig)
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __call__(
        self,
        run: RunPart,
        settings: NodeSettings,
        model: nn.Module,
        on_event: Callable[[Event], None],
    ) -> Participant:
        served, serving, roster = self.serve.child, Serving.read(self.folder), self.roster
        assert served is not None
        config = settings.config.having(federation={"children": {self.name: served}})
        check_children(config)
        check_served(config)
        keep = {"keep_rounds": max(self.serve.keep_rounds, served.rounds + 1)}
        serve = self.serve.model_copy(update=keep)
        inner = inside(config, served).having(serve=serve, comply=self.comply)
        self._describe(run, inner, model)
        torch.set_num_threads(plan_compute(config.compute).threads)
        key = NodeKey.load(Path(serving.home) / AGGREGATOR_KEY_FILE)
        notary = Notary(self.folder, roster, serving.run_id, key)
        recorder = Recorder([JsonlWriter(self.folder / "events.jsonl")])
        self.ends.callback(recorder.close)
        rounds = _rounds_of(self.folder)
        newest = CheckpointStore(self.folder / "checkpoints", 1)

        def tell(event: Event) -> None:
            recorder.emit(event)
            notary.on_event(event)
            if isinstance(event, LocalProgress):  # as a step of the parent's task
                done = (event.round - 1) % served.rounds * inner.local.steps
                on_event(event.model_copy(update={"step": done + event.step}))

        def on_round(number: int, over: Closed | EvalReceipt | None, version: Version) -> None:
            if over is None:
                notary.write_asked(number, tensors_sha256(version.tensors))
                return
            if number % served.rounds == 0:  # its own model, as its members go on with it
                once = {"once": version.once} if version.once else {}
                newest.save(RunState(number), {"global": version.tensors, **once})
            if isinstance(over, EvalReceipt):
                return
            notary.write_round(number, over.after.merged, tensors_sha256(version.tensors))
            rounds.setdefault(number, over.costs)
            recorder.emit(
                RoundFinished(
                    **vars(over.costs),
                    **{f"total_{name}": total for name, total in _sums(rounds).items()},
                    round=number,
                    global_step=over.after.global_step,
                    round_s=time.perf_counter() - over.costs.started,
                    checkpoint_s=0.0,
                )
            )
            roster.tasks.prune(serving.run_id, before_round=number - serve.keep_rounds)

        told = {"id": serving.run_id, "config": dictated(inner)}
        engine = RemoteEngine(
            run.model_copy(update=told),
            inner,
            self.post or roster.letters,
            roster,
            Depot(serving.run_id, inner, serving.open_store(), self.folder / "arrivals"),
            Asker(key, notary.head),
            None,
            tell,
        )
        draws = Draws(self.folder, served.rounds)
        fleet = JoinedFleet(
            roster,
            inner,
            serving.run_id,
            draws,
            on_lost=notary.write_lost,
            refused=refused_by(inner, notary.write_verdict),
        )
        named, folder = layout_of(model).named("key"), settings.folder
        group = Group(self.name, config, fleet, engine, folder, tell, named, on_round)
        group.purse = settings.purse or group.purse
        return group

    @property
    def update_privacy(self) -> PrivacyConfig:
        """What its update goes through."""
        assert self.serve.child is not None
        return self.serve.child.update_privacy

    def _describe(self, run: RunPart, inner: RunConfig, model: nn.Module) -> None:
        """Make it a run folder, which is exported as any other; or see that it is this run's."""
        if not (self.folder / "run.json").exists():
            cut_by = Path(inner.data.path) / "tokenizer"  # it came with the invitation
            tokenizers = {"": cut_by} if cut_by.is_dir() else {}
            about = {"kind": "serve", "name": self.name, "silos": self.serve.silos}
            about |= {"part_of": run.id, "vocab_size": run.vocab_size, "eos_id": run.eos_id}
            describe_run(self.folder, inner, model, tokenizers, **about)
        if read_record(self.folder)["part_of"] != run.id:
            raise IncompatibleConfigError(
                f"{self.folder} is the part of {self.name} in another run of its parent's",
                hint="Begin another: `photon serve` with another --run-dir, or --overwrite.",
            )


def totals_inside(folder: Path) -> dict[str, int]:
    """Of a served federation so far: inner rounds, tokens, bytes from its members and to them."""
    rounds = _rounds_of(folder)
    return {"rounds": len(rounds), **_sums(rounds)}


def _rounds_of(folder: Path) -> dict[int, RoundCosts | RoundFinished]:
    told = read_history(folder).of(RoundFinished)
    return {one.round: one for one in reversed(told)}  # done again, it takes what had come


def _sums(rounds: Mapping[int, RoundCosts | RoundFinished]) -> dict[str, Any]:
    names = ("tokens", "bytes_up", "bytes_down")
    return {name: sum(getattr(one, name) for one in rounds.values()) for name in names}
