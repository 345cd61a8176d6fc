"""The node of the run that is being trained, with the run's newest state; and its other ranks."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.data import PreparedData
from photon.errors import DiskFullError, ModelMismatchError, PhotonError, RankLostError
from photon.federation import Node, Participant, Version
from photon.federation.broadcast import Inbox
from photon.federation.envelopes import Ask, RunPart
from photon.federation.layout import empty_model, layout_of
from photon.federation.tasks import OPTIMIZER, WEIGHTS
from photon.link import Carrier
from photon.membership.records import MOST_FIGURE
from photon.models import carried_tensors, model_fingerprint
from photon.silo.policy import few_silos, least_merged, require_size
from photon.silo.presence import Reporter
from photon.silo.ranks import Team
from photon.silo.site import Site
from photon.store.contract import Buffer
from photon.store.disk import write_json
from photon.store.transfer import Wanted
from photon.telemetry import Event
from photon.telemetry.events import ComputeChosen, LocalProgress, Notice
from photon.training import InnerOptimizer

log = logging.getLogger(__name__)

#: Of a step, what the aggregator is told while a silo trains.
_FIGURES = ("loss", "lr", "gradient_norm", "tokens_per_s")

#: Optimizer tensors that a silo keeps for each weight, at most.
_MOST_MOMENTS = 3


def question_key(ask: Ask, data: PreparedData) -> tuple[str, ...]:
    """Of all that a node is built from: with another key, it takes another node."""
    return (
        ask.run.id,
        json.dumps(ask.run.config, sort_keys=True),
        ask.run.model,
        data.sha256,
    )


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


class HeldNode:
    """Rank 0 of the node that trains one run.

    Args:
        ask: one of the run's tasks.
        config: the run, as this site trains it.
        data: this site's text.
        team: the node's ranks, which build theirs at the same time.
        reporter: told what the node does.

    Raises:
        PolicyError: the model is larger than the site allows.
        ModelMismatchError: it is another here than the aggregator's.
        ShardCorruptError, VocabularyMismatchError: see Site.verify.

    Attributes:
        key: `question_key`.
        sound: False once something was raised in it that leaves it as nobody knows.
        received_bytes, received_s: for the state of the task at hand.
    """

    def __init__(
        self,
        ask: Ask,
        config: RunConfig,
        data: PreparedData,
        site: Site,
        team: Team,
        reporter: Reporter,
    ) -> None:
        self.key = question_key(ask, data)
        self.config = config
        self.data_sha256 = data.sha256
        self.sound = True
        self._site = site
        self._reporter = reporter
        self._line = _Line()
        self.received_s = 0.0
        skeleton = empty_model(config, vocab_size=data.vocab_size, eos_id=data.eos_id)
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        require_size(parameters, site.node.policy)
        found = model_fingerprint(skeleton)
        if found != ask.run.model:
            raise ModelMismatchError(
                f"the run's model has fingerprint {ask.run.model[:12]}..., this site builds one "
                f"with {found[:12]}... from the same run file",
                hint="Both sides need the same version of Photon and of transformers, and where "
                "model.path is set, the same model under that name.",
            )
        if (least := least_merged(ask, config)) < 3:
            reporter.note(f"warning: {few_silos(least)}; policy.min_participants can refuse it")
        if config.data.verify and data.silos:
            site.verify(data)
        layout, carried = layout_of(skeleton), carried_tensors(skeleton)
        #: Of the global state's tensors, and of those that come once.
        self._shapes = {WEIGHTS + name: carried[name].shape for name in layout.merged}
        self._once_shapes = {name: carried[name].shape for name in layout.once}
        self._personal_values = sum(carried[name].numel() for name in layout.personal)
        self._once: tuple[str, Mapping[str, Tensor]] = "", {}
        if config.federation.optimizer_state == "average":
            inner = InnerOptimizer(skeleton, config.local).initial_state()
            self._shapes |= {OPTIMIZER + name: one.shape for name, one in inner.items()}
        settings = site.settings(ask.run, config, team.seat)
        settings.folder.mkdir(parents=True, exist_ok=True)
        team.begin(ask.run.model_dump(mode="json"))
        self._node: Participant
        if site.federation is not None:
            self._node = site.federation(ask.run, settings, skeleton, self._heard)
        else:
            self._node = Node(settings, self._heard, data=data, model=skeleton)
        self._inbox = Inbox(self._line, config.run.name, self._shapes, config.link.specs)
        # What is being trained here, for who looks into the home.
        record = {
            "id": ask.run.id,
            "name": config.run.name,
            "silos": ask.run.silos,
            "parameters": parameters,
            "began_at": time.time(),
        }
        write_json(site.home / "run.json", record, "what is trained here")

    @property
    def received_bytes(self) -> int:
        return self._line.received_bytes

    def require_room(self) -> None:
        """Refuse before training what could not be written after it."""
        config, free_gib = self.config, self._site.node.disk.min_free_gib
        values = {name: shape.numel() for name, shape in self._shapes.items()}
        weights = sum(count for name, count in values.items() if name.startswith(WEIGHTS))
        weights += self._personal_values
        copies = 1 + config.feeds_back
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

    def receive(self, ask: Ask, carrier: Carrier) -> Version:
        """The version that a task starts from, or is about.

        Raises:
            ChunkCorruptError, ManifestError, LinkError: see Inbox.receive.
        """
        started = time.perf_counter()
        line, spools = self._line, self._site.home / "incoming"
        line.carrier, line.spool = carrier, spools / ask.state.sha256
        line.received_bytes = 0  # what an attempt before this one got comes out of the spool
        for other in spools.glob("*"):
            if other != line.spool:
                shutil.rmtree(other, ignore_errors=True)
        ref = ask.state
        if ref.once is not None and ref.once.sha256 != self._once[0]:
            once = self._inbox.receive_once(ref.once, self._once_shapes)
            self._once = ref.once.sha256, once
        state = self._inbox.receive(ref)
        shutil.rmtree(spools, ignore_errors=True)
        log.info(
            "received %.1f MB: the state after round %d", line.received_bytes / 1e6, ask.state.round
        )
        self.received_s = time.perf_counter() - started
        once_sha256, once = self._once
        return Version(ref.round, state, once=once, once_sha256=once_sha256)

    @contextmanager
    def at_work(self) -> Iterator[Participant]:
        """What raises in here leaves the node as nobody knows."""
        self.sound = False
        yield self._node
        self.sound = True

    def close(self) -> None:
        self._node.close()

    def _heard(self, event: Event) -> None:
        """What the node tells while it trains."""
        if isinstance(event, LocalProgress):
            loss = "withheld" if event.loss is None else f"{event.loss:.3f}"
            words = f"loss {loss}, {event.tokens_per_s or math.nan:,.0f} tokens/s"
            told: dict[str, float | None] = {}
            for name in _FIGURES:
                value = getattr(event, name)
                # As the desk takes it: finite and within bounds, or not told.
                told[name] = value if value is not None and 0 <= value <= MOST_FIGURE else None
            self._reporter.add(step=event.step, detail=words, **told)
            log.info("round %d, step %d: %s", event.round, event.step, words)
        elif isinstance(event, ComputeChosen):
            log.info("trains on %s, %s: %s", event.device, event.strategy, event.reason)
        elif isinstance(event, Notice):
            log.info("%s", event.text)


def follow(site: Site, team: Team) -> None:
    """Train with rank 0, run after run; for the other ranks.

    Raises:
        RankLostError: rank 0, or another, is gone.
    """
    for order in team.orders():
        run = RunPart.model_validate(order)
        try:
            config = site.config(run)
            node = Node(site.settings(run, config, team.seat), lambda _: None, data=site.data(run))
        except RankLostError:
            raise
        except PhotonError as error:
            # What keeps one rank from a run keeps the others, and rank 0 says so.
            log.error("rank %d: %s", team.seat.rank, error)
            continue
        node.follow()
