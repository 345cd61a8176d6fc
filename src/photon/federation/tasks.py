"""What an aggregator asks of participants, and what they answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict
from torch import Size, Tensor

from photon.energy.account import Spent
from photon.errors import NodeError, PhotonError
from photon.evaluation.perplexity import perplexity
from photon.link import Entry, Header, Ref, plain_entries
from photon.link.manifest import CLOSED, Bytes, Kind, Sha256, shapes_fingerprint
from photon.training import StepTimes
from photon.training.timing import Seconds

#: The global state: "weights/<parameter>" and, where inner state is averaged,
#: "optimizer/<parameter>.<key>".
GlobalState = Mapping[str, Tensor]

WEIGHTS = "weights/"
OPTIMIZER = "optimizer/"


def section(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part of a state, with the prefix taken off (no copies)."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


@dataclass(frozen=True)
class FitTask:
    """Train one silo for tau steps. Idempotent by (run, round, silo).

    Attributes:
        round: counts from 1.
        global_step: the server's clock at the first local step.
        steps: tau.
        node_round: round after which the silo's kept state (inner optimizer, error feedback) was
            saved; None when none was.
        cursor: first sequence of the silo's stream that it is to train on: the aggregator's to
            say, so that a silo that lost all it kept goes on where it was.
        texts: silos whose pooled text is trained on; its own by default.
        profile: also measure how long ranks exchange gradients.
        sealing: under whose masks the update leaves (a photon.secure Sealing); none by default.
    """

    run: str
    round: int
    silo: str
    global_step: int
    steps: int
    node_round: int | None
    cursor: int = 0
    texts: tuple[str, ...] = ()
    profile: bool = False
    sealing: str = ""

    @property
    def pooled(self) -> tuple[str, ...]:
        """The silos whose text is trained on."""
        return self.texts or (self.silo,)


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds what can't be printed: a line break or a control character")
    return text


#: No text of a document is longer, characters.
MOST_TEXT = 4000

# What a figure may be in a document from outside. Dataclasses made here are not held to it.
Text = Annotated[str, Field(max_length=MOST_TEXT, strict=True), AfterValidator(_one_line)]
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Whole = Annotated[int, Field(ge=0, lt=2**53, strict=True)]
Tokens = Annotated[int, Field(ge=1, lt=2**53, strict=True)]
Code = Annotated[int, Field(ge=1, le=255, strict=True)]
Loss = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False, strict=True)]
BitsPerByte = Annotated[float, Field(ge=0, lt=1e7, allow_inf_nan=False, strict=True)]
Ratio = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """What a run has cost a silo's text so far: (value, delta)-differential privacy of a unit, a
    "sequence" or a "client", a silo or group as a whole. docs/privacy.md has what is assumed.
    """

    __pydantic_config__ = CLOSED

    value: Annotated[float, Field(ge=0, lt=1e30, allow_inf_nan=False, strict=True)]
    delta: Annotated[float, Field(gt=0, lt=1, strict=True)]
    unit: Literal["sequence", "client"]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a participant says of a task, here or from its site. Losses are nats per token, and None
    where a mechanism withholds them: nothing would be noised in them.

    Attributes:
        bytes_down: that it received before it could start; None where nothing was carried, and
            what a wire would have carried is counted.
        failure: why there is no update; None when there is one.
        failure_code, failure_hint: of the error that it was.
        times: where train_s went.
        communication_s: exchange of gradients among ranks, where the task asked for it.
        mfu: model FLOPs per second over the stated peak of the ranks' devices; None if unknown.
        peak_memory_bytes, micro_batch_size: of rank 0.
        left_out: what the codec left out of this update, as a share of its norm; None where
            nothing is fed back.
        state_lost: the kept state that the task names is gone; the silo started without one.
        energy: since the answer before it, waiting and failed attempts included; None where the
            participant says nothing of it.
        epsilon: None where nothing is promised.
        count: under masks, whether the update was within the clip; see photon.secure.member.Seal.
    """

    tokens: Whole = 0
    loss: Loss | None = 0.0
    first_loss: Loss | None = 0.0
    last_loss: Loss | None = 0.0
    bytes_down: Bytes | None = None
    train_s: Seconds = 0.0
    load_s: Seconds = 0.0
    publish_s: Seconds = 0.0
    failure: Text | None = None
    failure_code: Code = NodeError.exit_code
    failure_hint: Text | None = None
    times: StepTimes = field(default_factory=StepTimes)
    communication_s: Seconds | None = None
    mfu: Ratio | None = None
    peak_memory_bytes: Bytes = 0
    micro_batch_size: Count = 0
    left_out: Ratio | None = None
    state_lost: Annotated[bool, Strict()] = False
    energy: Spent | None = None
    epsilon: Epsilon | None = None
    count: Count | None = None


@dataclass(frozen=True)
class Receipt(Measures):
    """A participant's answer.

    Attributes:
        bytes_up: of its update on the wire.
        worker: which training process did it.
        bytes_inside: of a group: what its members received and sent, both ways together.
        tokens_lost: of a group: what its members trained on and it did not merge.
    """

    round: int
    silo: str
    bytes_up: int = 0
    worker: int = 0
    bytes_inside: int = 0
    tokens_lost: int = 0

    @classmethod
    def failed(cls, task: FitTask, error: PhotonError, **figures: Any) -> Receipt:
        """Of a task without an update, because of this error."""
        return cls(
            task.round,
            task.silo,
            failure=error.message,
            failure_code=error.exit_code,
            failure_hint=error.hint,
            **figures,
        )


@dataclass(frozen=True)
class Residual:
    """One member's update of one layer, away from its federation; see residuals.py.

    origin is the member's path, passed are the jurisdictions that it was in, never_with those that
    it may not come to; bytes are on the wire, and hops steps up behind it.
    """

    origin: str
    module: str
    tensors: dict[str, Tensor]
    passed: list[str | None]
    never_with: list[str]
    bytes: int
    hops: int = 0


@dataclass(frozen=True)
class Update:
    """A receipt and the way to its tensors, which are read one at a time, more than once.

    Attributes:
        tensors: as they will be merged: decoded, where a codec was at work.
        packed: as they travel; None where they leave as they are, in fp32.
        wire_bytes: of those that are read and hashed while tensors are merged: this update's or the
            next ones'; 0 if they lie in memory.
        let_go: called when the tensors are needed no more; they are valid until then, and in one
            process until the engine is asked for the next answer.
        residuals: that leave a group with it, and count in its bytes_up.
    """

    receipt: Receipt
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    packed: Sequence[Entry] | None = None
    wire_bytes: int = 0
    let_go: Callable[[], None] = lambda: None
    residuals: Sequence[Residual] = ()

    @classmethod
    def none(cls, receipt: Receipt) -> Update:
        """Of a participant that failed: no tensors."""
        return cls(receipt, lambda: iter(()))

    @classmethod
    def of(cls, receipt: Receipt, packed: Sequence[Entry]) -> Update:
        """An encoded update."""
        return cls(receipt, lambda: ((one.name, one.decoded()) for one in packed), packed)

    def entries(self) -> Iterator[Entry]:
        """As they travel."""
        return iter(self.packed) if self.packed is not None else plain_entries(self.tensors())


def parcel_header(
    kind: Kind,
    run: str,
    number: int,
    state: Mapping[str, Tensor | Size],
    *,
    silo: str | None = None,
    base: str | None = None,
) -> Header:
    """What a parcel says of itself; who writes it and who reads it both derive it.

    Args:
        kind: "update" of a silo, "state", "outer_update", or "once" (frozen tensors and the like).
        number: the update's round; of a state, the last that was merged into it.
        state: names and tensors, or shapes, that the parcel has.
        silo: whose update it is.
        base: sha256 of the state that an outer update goes on top of.
    """
    shapes = {name: one.shape if isinstance(one, Tensor) else one for name, one in state.items()}
    model = shapes_fingerprint(shapes)
    return Header(kind=kind, run=run, round=number, silo=silo, model=model, base=base)


def update_header(task: FitTask, state: Mapping[str, Tensor | Size]) -> Header:
    """Of the update that answers this task.

    Args:
        state: that the task starts from, or shapes: an update has its names and shapes.
    """
    return parcel_header("update", task.run, task.round, state, silo=task.silo)


@dataclass(frozen=True)
class StateRef:
    """A global state in a store.

    Attributes:
        round: it is the state after so many rounds of its run.
        sha256: of its tensors.
        whole: the parcel with all of it; None if it was not published, as nobody needs it.
        update: the parcel that makes it of the state before; None where states travel whole.
        base: sha256 of the state before.
        once: the parcel with what no state changes; None where there is nothing such.
    """

    __pydantic_config__ = CLOSED

    round: Count
    sha256: Sha256
    whole: Ref | None = None
    update: Ref | None = None
    base: Sha256 | None = None
    once: Ref | None = None

    @property
    def parcels(self) -> list[Ref]:
        """All that may be fetched for it."""
        return [ref for ref in (self.whole, self.update, self.once) if ref is not None]


@dataclass(frozen=True)
class EvalTask:
    """Score the global state on a silo's held-out text, or on the global set (silo None).

    Attributes:
        node_round: round after which the silo's personal part was saved; None where none was.
    """

    round: int
    silo: str | None
    node_round: int | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out loss in nats per token, as a participant says it.

    Attributes:
        bits_per_byte: None where the text is mostly unknown to its tokenizer.
        bytes_down: that the participant received for it: a state that it did not hold yet; None
            where nothing was carried, as in a Receipt.
        energy: as in a Receipt.
    """

    loss: Loss
    bits_per_byte: BitsPerByte | None = None
    tokens: Tokens
    eval_s: Seconds
    bytes_down: Bytes | None = None
    energy: Spent | None = None


@dataclass(frozen=True)
class EvalReceipt(Score):
    """The score on a silo's held-out text, or on the global set (silo None)."""

    silo: str | None

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @classmethod
    def mean(cls, own: Sequence[EvalReceipt]) -> EvalReceipt:
        """Silos' scores as one, weighted by tokens; its loss is NaN where there are none."""
        tokens = sum(one.tokens for one in own)
        nats = [one.loss * one.tokens for one in own]
        loss = math.fsum(nats) / tokens if tokens else math.nan
        bits_per_byte = None
        # Nats over bits a byte are bytes, but for a factor that is the same for all.
        if own and all(one.bits_per_byte for one in own):
            sizes = [part / (one.bits_per_byte or 1) for part, one in zip(nats, own, strict=True)]
            bits_per_byte = math.fsum(nats) / math.fsum(sizes)
        figures = {"loss": loss, "bits_per_byte": bits_per_byte, "tokens": tokens}
        return cls(silo=None, **figures, eval_s=0.0, bytes_down=0)


Phase = Literal["advertise", "share", "unmask"]


@dataclass(frozen=True)
class SecureTask:
    """A phase of secure aggregation (photon.secure.member), for which no model is needed.

    Attributes:
        text: the aggregator's document.
        company: all whom the round's sum is to be of.
    """

    round: int
    silo: str
    phase: Phase
    text: str
    company: tuple[str, ...] = ()


@dataclass(frozen=True)
class SecureReceipt:
    """The silo's document, or why there is none."""

    text: str = ""
    failure: str | None = None


Task = FitTask | EvalTask | SecureTask
