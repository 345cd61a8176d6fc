"""The events of a run, one model each. events.jsonl holds one a line.

`time_s` is seconds since the run first started, counting only time in which it ran: a resumed run
goes on where its last checkpoint stood. Bytes are payload bytes as the link carries them. Losses
are nats per token.

Every number is finite: a loss that diverged and a figure that nobody has are null, and seconds that
are no number count as none. So an event can be written as JSON, drawn and summed, whoever told it.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Kind = Literal["simulate", "train", "serve"]


def finite(value: Any) -> Any:
    """The value with None for each number in it that is infinite or none at all."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, AfterValidator(finite)]
#: Three centuries are no span of a run either; a sum of such spans would be infinite.
Seconds = Annotated[float, AfterValidator(lambda given: given if 0 <= given < 1e10 else 0.0)]
Joules = Annotated[float, AfterValidator(lambda given: given if 0 <= given <= 1e15 else 0.0)]
#: How joules are known: docs/energy.md.
How = Literal["measured", "estimated", "modelled"]


class Event(BaseModel):
    """Base of every event; `name` stands under "event" in the file: the class's, in snake case."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: ClassVar[str]

    time_s: Seconds = 0.0

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class RunStarted(Event):
    """The first line of a run, and of each process that works on it; of flops, 0 is unknown."""

    kind: Kind
    run: str
    started_at: str
    photon_version: str
    silos: list[str]
    rounds: int
    local_steps: int
    participants_per_round: int
    batch_size: int
    sequence_length: int
    parameters: int
    silo_tokens: dict[str, int]
    device: str
    precision: str
    threads: int
    workers: int
    update_codec: str = "fp32"
    broadcast_codec: str = "fp32"
    flops_per_token: int = 0
    flops_method: str = ""
    resumed_from_round: int | None = None


class RoundStarted(Event):
    """The aggregator drew this round's participants and dispatched their tasks."""

    round: int
    global_step: int
    participants: list[str]


class ComputeChosen(Event):
    """How a node trains: its ranks, the strategy that spreads the model over them, and why."""

    worker: int
    ranks: int
    strategy: str
    reason: str
    device: str
    precision: str


class Notice(Event):
    """Something a node changed on the way, in words: for instance a smaller micro-batch."""

    text: str
    round: int
    silo: str


class RunChanged(Event):
    """Keys of the run file that rounds after `round` have other values of: (before, now)."""

    round: int
    changes: dict[str, tuple[Any, Any]]


class LocalProgress(Event):
    """A node's local training, every `run.log_every` steps; `step` is 1 to tau in the round."""

    round: int
    silo: str
    step: int
    global_step: int
    loss: Figure
    lr: Figure
    gradient_norm: Figure
    tokens_per_s: Figure


class LocalFinished(Event):
    """A node finished its task; the loss is the mean over its local steps.

    data_s to optimizer_s split train_s; mfu is model FLOPs over the device's peak, where that is
    known; peak memory and micro-batch are those of one rank. left_out is the share of the update's
    norm that its codec left for later ones, where a codec feeds it back. epsilon is what the run
    has cost the silo's text; losses are withheld then, here and in LocalProgress.
    """

    round: int
    silo: str
    loss: Figure
    first_loss: Figure
    last_loss: Figure
    tokens: int
    update_norm: Figure
    train_s: Seconds
    load_s: Seconds
    publish_s: Seconds
    bytes_down: int
    bytes_up: int
    worker: int = 0
    data_s: Seconds = 0.0
    forward_s: Seconds = 0.0
    backward_s: Seconds = 0.0
    optimizer_s: Seconds = 0.0
    communication_s: Figure = None
    mfu: Figure = None
    peak_memory_bytes: int = 0
    micro_batch_size: int = 0
    left_out: Figure = None
    epsilon: Figure = None


class UpdateDropped(Event):
    """An update that is not merged, and why. The round goes on without it.

    cause is the class of it: an error of photon.errors that the silo met, "late", or "refused" by
    the aggregator's own checks.
    """

    round: int
    silo: str
    reason: str
    cause: str = ""


class WorkerLost(Event):
    """A worker process died; its task goes to a fresh one."""

    round: int
    silo: str
    worker: int
    reason: str


class RoundMerged(Event):
    """The outer optimizer stepped."""

    round: int
    participants: list[str]
    tokens: int
    train_loss: Figure
    pseudo_gradient_norm: Figure
    merge_s: Seconds


class KeyMerged(Event):
    """What each participant's update counted for in a round's key layers, where not by weight.

    silo is the group in which they were merged, "" the federation itself. shares are by layer, in
    the order of participants; behind the members stand the origins, by their paths ("eu/paris"), of
    residuals that were merged too.
    """

    round: int
    silo: str
    participants: list[str]
    shares: dict[str, list[float]]


class ResidualRouted(Event):
    """One federation's decision on one residual: each step of its way is an event.

    silo is who decides, as in KeyMerged; origin, the member whose update it is, and to are paths:
    "eu/banks". to is who takes it, is next ("" the root) or is barred, and null where it fits none.
    cosine is the best member's, of those compared; hops are steps up, with this one. outcome is
    "taken" by a member, "up", "barred" by a policy, or "unplaced".
    """

    round: int
    silo: str
    at_jurisdiction: str | None
    module: str
    origin: str
    origin_jurisdiction: str | None
    to: str | None
    to_jurisdiction: str | None
    cosine: Figure
    hops: int
    bytes: int
    outcome: Literal["taken", "up", "barred", "unplaced"]


class Evaluated(Event):
    """Held-out loss of the global model. `silo` is null for the global held-out set.

    bytes_down is what the silo received to evaluate the model: a state that it did not have yet.

    Loss and perplexity are null where the model diverged, bits_per_byte also where text is mostly
    tokens that the vocabulary does not know.
    """

    round: int
    silo: str | None
    loss: Figure
    perplexity: Figure
    bits_per_byte: Figure
    tokens: int
    eval_s: Seconds
    bytes_down: int = 0


class EnergySpent(Event):
    """Joules by phase of a silo's answer, or (silo null) of the aggregator; a round's add up.

    how is null where the silo told nothing; joules of "communication" are always modelled. A
    group's are those of its members, who are told of as well.
    """

    round: int
    silo: str | None
    how: How | None
    joules: dict[str, Joules]


class CheckpointSaved(Event):
    """An atomic checkpoint stands on disk."""

    round: int
    bytes: int
    save_s: Seconds


class RoundFinished(Event):
    """Everything of a round is over. Totals count from the start of the run, simulated time too."""

    round: int
    global_step: int
    round_s: Seconds
    local_train_s: Seconds
    eval_s: Seconds
    merge_s: Seconds
    checkpoint_s: Seconds
    tokens: int
    total_tokens: int
    bytes_up: int
    bytes_down: int
    total_bytes_up: int
    total_bytes_down: int
    simulated_s: Figure = None
    dropped: Annotated[list[str], Field(default_factory=list)]


class RunFinished(Event):
    """The last line of a run that reached its end; `summary` is what summary.json holds."""

    summary: Annotated[dict[str, Any], AfterValidator(finite)]


class RunStopped(Event):
    """The run stopped before its end and can be resumed."""

    round: int
    reason: str


class Standing(Event):
    """Where a served run stands between its events; told to a view, and written to no file.

    waits_for says in words for what and until when; away names silos that are not heard of.
    """

    waits_for: str | None
    away: list[str]


EVENTS: dict[str, type[Event]] = {kind.name: kind for kind in Event.__subclasses__()}


def parse_event(record: dict[str, Any]) -> Event | None:
    """The event a JSON object holds; None for a name this version does not know."""
    kind = EVENTS.get(record.get("event", ""))
    return kind.model_validate(record) if kind is not None else None
