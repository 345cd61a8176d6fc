"""The nodes of a run on this machine: how many ranks, with which settings, behind which engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from photon.config import LinkConfig, PrivacyConfig, RunConfig
from photon.config.children import at_work, with_branches
from photon.data import PreparedData
from photon.engines.local import LocalEngine
from photon.engines.workers import WorkerEngine
from photon.federation import Engine, Node, NodeSettings
from photon.federation.layout import empty_model, layout_of
from photon.federation.tasks import OPTIMIZER, WEIGHTS
from photon.telemetry import Event
from photon.telemetry.events import Kind
from photon.training import Fit, InnerOptimizer, Seat, plan_compute, plan_fit, ranks_of_a_node

#: What stands for the silo in events of centralised training.
CENTRALISED = "centralised"

#: Makes an engine from one that evaluates on this machine, and whoever is told of events.
Elsewhere = Callable[[Engine, Callable[[Event], None]], Engine]


@dataclass(frozen=True)
class Nodes:
    """What trains, or at least scores, on this machine in a run.

    Attributes:
        kind: "simulate"; "train" for one node on pooled text; "serve" where silos train elsewhere
            and one process here scores the global held-out set, whatever [compute] says.
        config: the run file.
        data: the prepared text.
        silos: that take part, or whose text is pooled.
        folder: of the run.
        elsewhere: makes the engine of a run whose silos are not on this machine, given one that
            scores the global held-out set here.
    """

    kind: Kind
    config: RunConfig
    data: PreparedData
    silos: Sequence[str]
    folder: Path
    elsewhere: Elsewhere | None = None

    @property
    def seat(self) -> Seat:
        """This process's place: torchrun's; an aggregator has none, it may share a silo's shell."""
        return Seat() if self.kind == "serve" else Seat.from_environment()

    @property
    def workers(self) -> int:
        """Nodes in processes of their own; 0: one node in this process."""
        return self.config.federation.workers if self.kind == "simulate" else 0

    @property
    def ranks(self) -> int:
        """Processes of each node; one in an aggregator."""
        launched = self.seat.world_size
        if launched > 1 or self.kind == "serve":
            return launched
        return ranks_of_a_node(self.config.compute, workers=self.workers)

    @property
    def batch_size(self) -> int:
        """Sequences of a step; where text is pooled, as many as all participants of a round."""
        config = self.config
        if self.kind != "train":
            return config.local.batch_size
        if config.train.batch_size is not None:
            return config.train.batch_size
        alone, groups = len(self.silos), {}
        for name, one in config.federation.children.items():
            if set(silos := one.silos_of(name)) <= set(self.silos):
                alone, groups[name] = alone - len(silos), one
        participants = at_work(config.federation, alone, groups)
        return config.local.batch_size * max(1, round(participants))

    def settings(self) -> NodeSettings:
        """Of each node; under torchrun with this process's seat."""
        config = self.config
        if self.kind == "train":
            config = central_config(config, self.batch_size)
        elif self.kind == "serve":
            config = config.having(compute={"processes": 1, "strategy": "auto"})
        return NodeSettings(
            config,
            self.folder / "nodes",
            processes=max(1, self.workers),
            seat=self.seat,
            scores_only=self.kind == "serve",
        )

    def skeleton(self) -> nn.Module:
        """The model without weights."""
        data = self.data
        return empty_model(self.config, vocab_size=data.vocab_size, eos_id=data.eos_id)

    def fit(self, model: nn.Module) -> Fit:
        """How a node would spread this model; see `plan_fit` for what it raises."""
        settings = self.settings()
        seat = settings.seat
        if seat.world_size == 1:
            seat = Seat(0, 0, self.ranks, self.ranks)
        plan = plan_compute(self.config.compute, seat=seat)
        return plan_fit(
            model,
            settings.config,
            plan,
            seat,
            share_of=settings.processes,
            scores_only=settings.scores_only,
        )

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The global state before the first round."""
        config = self.config
        state = {
            WEIGHTS + name: model.get_parameter(name).detach().clone()
            for name in layout_of(model).merged
        }
        if self.kind != "train" and config.federation.optimizer_state == "average":
            zeros = InnerOptimizer(model, config.local).initial_state()
            state |= {OPTIMIZER + name: tensor for name, tensor in zeros.items()}
        return state

    def engine(self, model: nn.Module, on_event: Callable[[Event], None]) -> Engine:
        """Start them. `model` is used where the node lives in this process."""
        settings = self.settings()
        alone = settings.seat.world_size == 1
        if alone and (self.ranks > 1 or self.workers):
            exchange = self.folder / "exchange"
            return WorkerEngine(settings, exchange, on_event, ranks=self.ranks)
        local = LocalEngine(Node(settings, on_event, data=self.data, model=model))
        return local if self.elsewhere is None else self.elsewhere(local, on_event)

    def follow(self) -> None:
        """Train with rank 0, which keeps the run; for the other ranks under torchrun."""
        Node(self.settings(), lambda _: None, data=self.data).follow()


def central_config(config: RunConfig, batch_size: int) -> RunConfig:
    """The run file of a federation of one: a node that trains alone on pooled text.

    It keeps its optimizer, its weights are taken as they are, and [train] overrides [local].

    Args:
        batch_size: sequences per step.
    """
    local: dict[str, float] = {"batch_size": batch_size}
    if config.train.lr is not None:
        local["lr"] = config.train.lr
    alone = {
        "optimizer_state": "keep",
        "merge": "adopt",
        "merging_rule": "mean",
        "max_update_norm": "none",
        "sample": None,
        "quorum": None,
        "children": {},
        "weighting": "tokens",
    }
    link = LinkConfig()  # nothing leaves the machine
    return config.having(local=local, federation=alone, link=link, privacy=PrivacyConfig())


def resolved(kind: Kind, config: RunConfig, data: PreparedData) -> RunConfig:
    """Pin what this machine decides and the maths depends on: threads, precision; whole paths."""
    config = with_branches(config, data.silos)
    nodes = Nodes(kind, config, data, (), Path())
    here = nodes.seat.local_world_size if nodes.seat.world_size > 1 else nodes.ranks
    plan = plan_compute(config.compute, processes=max(1, nodes.workers) * here)
    decided = {"threads": plan.threads, "precision": plan.precision, "device": plan.device.type}
    config = config.having(compute=decided, data={"path": str(data.path)})
    if kind == "train":
        config = config.having(parts=config.parts.pooled())
    if config.model.path is not None and Path(config.model.path).expanduser().exists():
        path = str(Path(config.model.path).expanduser().resolve())
        config = config.having(model={"path": path})
    return config
