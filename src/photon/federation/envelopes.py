"""What an aggregator and a silo say to each other over a control plane: small JSON documents.

A silo is asked with an Ask, which carries everything it needs to start from nothing: a trainer that
was just restarted answers as one that has been here for a hundred rounds. It answers with a Reply
that its key has signed (photon.membership.signing). Tensors never travel in these: a Ref says where
they lie, and what they must be.

Whatever comes from outside is read by `parse_ask` and `parse_reply` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from photon.config import RunConfig, parse_run_config
from photon.errors import PhotonError, ProtocolError
from photon.federation.tasks import EvalReceipt, EvalTask, FitTask, Receipt, StateRef
from photon.link import Ref
from photon.training import StepTimes

#: Raised when an Ask or Reply changes its meaning; both sides must speak the same one.
PROTOCOL = 1

#: No Ask or Reply is longer. A run file takes some 4 KB of it.
MOST_BYTES = 1 << 20

#: A run file is three deep: tables, keys, lists.
_MOST_DEPTH = 16

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Whole = Annotated[int, Field(ge=0, lt=2**53)]
_Text = Annotated[str, Field(max_length=4000)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RefPart(_Part):
    """A parcel, as photon.link.Ref."""

    key: Annotated[str, Field(min_length=1, max_length=512)]
    bytes: _Whole
    sha256: _Sha256
    payload_bytes: _Whole

    def ref(self) -> Ref:
        return Ref(self.key, self.bytes, self.sha256, self.payload_bytes)

    @classmethod
    def of(cls, ref: Ref) -> RefPart:
        return cls(**asdict(ref))


class StatePart(_Part):
    """A global state in the store, as StateRef; whole, or an outer update on top of `base`."""

    round: _Whole
    sha256: _Sha256
    whole: RefPart | None = None
    update: RefPart | None = None
    base: _Sha256 | None = None

    def state_ref(self, run: str) -> StateRef:
        whole = self.whole.ref() if self.whole is not None else None
        update = self.update.ref() if self.update is not None else None
        return StateRef(run, self.round, self.sha256, whole, update, self.base)

    @classmethod
    def of(cls, state: StateRef) -> StatePart:
        return cls(
            round=state.round,
            sha256=state.sha256,
            whole=RefPart.of(state.whole) if state.whole is not None else None,
            update=RefPart.of(state.update) if state.update is not None else None,
            base=state.base,
        )


class RunPart(_Part):
    """What is being trained. A silo holds it against its policy before it does anything else.

    Attributes:
        id: of this run, unlike any other's; new with each `photon serve` of a new run folder.
        silos: all that take part, by name: a silo may refuse to train with some.
        config: the run file without the aggregator's own tables and paths (`dictated`).
        model: fingerprint of the model's parameter names and shapes.
        tokenizer: sha256 of tokenizer.json; a silo's text must have been cut by the same.
        vocab_size, eos_id: of that tokenizer.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    silos: Annotated[list[_Name], Field(min_length=1, max_length=10_000)]
    config: dict[str, Any]
    model: Annotated[str, Field(max_length=100)]
    tokenizer: _Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**31)]
    eos_id: _Whole

    @field_validator("config")
    @classmethod
    def _shallow(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Whatever copies or writes it may go down into it without a thought."""
        level: list[Any] = [config]
        for _ in range(_MOST_DEPTH):
            level = [inner for outer in level for inner in _inside(outer)]
            if not level:
                return config
        raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")


class FitPart(_Part):
    """photon.federation.FitTask without the names of run and silo."""

    round: Annotated[int, Field(ge=1, lt=2**31)]
    global_step: _Whole
    steps: Annotated[int, Field(ge=1, lt=2**31)]
    node_round: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    cursor: _Whole = 0
    state_bytes: _Whole = 0


class EvalPart(_Part):
    """Score the state on the silo's own held-out text."""

    round: Annotated[int, Field(ge=0, lt=2**31)]


class Ask(_Part):
    """Aggregator to silo.

    Attributes:
        silo: who is asked; a silo refuses what is for another.
        until: seconds since the epoch; nobody waits for an answer that comes later.
    """

    protocol: Literal[1] = PROTOCOL
    photon_version: Annotated[str, Field(max_length=100)]
    kind: Literal["fit", "evaluate"]
    silo: _Name
    run: RunPart
    state: StatePart
    fit: FitPart | None = None
    evaluate: EvalPart | None = None
    until: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _one_task(self) -> Ask:
        if (self.fit is not None, self.evaluate is not None) != (
            self.kind == "fit",
            self.kind == "evaluate",
        ):
            raise ValueError(f"kind {self.kind!r} comes with a {self.kind!r} part and no other")
        return self

    @property
    def round(self) -> int:
        part = self.fit or self.evaluate
        assert part is not None
        return part.round

    @property
    def task_id(self) -> str:
        """Names the task: asked again under the same name, a silo answers the same."""
        return f"{self.run.id}/{self.kind}/{self.round}/{self.silo}"

    def fit_task(self, run: str) -> FitTask:
        """As the node takes it.

        Args:
            run: name of the run.
        """
        assert self.fit is not None
        return FitTask(run=run, silo=self.silo, **dict(self.fit))

    def eval_task(self) -> EvalTask:
        assert self.evaluate is not None
        return EvalTask(self.evaluate.round, self.silo)


class FitAnswer(_Part):
    """photon.federation.Receipt without round and silo, and where the update lies.

    A failure (a loss that is not finite) has no update.
    """

    update: RefPart | None = None
    tokens: _Whole = 0
    loss: float = 0.0
    first_loss: float = 0.0
    last_loss: float = 0.0
    bytes_down: _Whole = 0
    bytes_up: _Whole = 0
    train_s: _Seconds = 0.0
    load_s: _Seconds = 0.0
    publish_s: _Seconds = 0.0
    failure: _Text | None = None
    failure_code: Annotated[int, Field(ge=1, le=255)] = 60
    failure_hint: _Text | None = None
    times: Annotated[list[_Seconds], Field(min_length=4, max_length=4)] = [0.0, 0.0, 0.0, 0.0]
    communication_s: _Seconds | None = None
    mfu: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    peak_memory_bytes: _Whole = 0
    micro_batch_size: _Whole = 0
    left_out: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    state_lost: bool = False

    @model_validator(mode="after")
    def _update_or_failure(self) -> FitAnswer:
        if (self.update is None) == (self.failure is None):
            raise ValueError("an answer has an update or a failure, not both or neither")
        return self

    def receipt(self, round_number: int, silo: str) -> Receipt:
        fields: dict[str, Any] = dict(self)
        del fields["update"]
        fields["times"] = StepTimes(*self.times)
        return Receipt(round_number, silo, **fields)

    @classmethod
    def of(cls, receipt: Receipt, update: Ref | None) -> FitAnswer:
        fields: dict[str, Any] = {
            name: getattr(receipt, name) for name in cls.model_fields if name != "update"
        }
        fields["times"] = [float(second) for second in vars(receipt.times).values()]
        part = RefPart.of(update) if update is not None else None
        return cls(update=part, **fields)


class EvalAnswer(_Part):
    """photon.federation.EvalReceipt without the silo."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: _Whole
    eval_s: _Seconds
    bytes_down: _Whole = 0

    def receipt(self, silo: str) -> EvalReceipt:
        return EvalReceipt(silo, **dict(self))

    @classmethod
    def of(cls, receipt: EvalReceipt) -> EvalAnswer:
        return cls(**{name: getattr(receipt, name) for name in cls.model_fields})


class Refusal(_Part):
    """A silo will not, or can't, and says why in words that reach the aggregator's operator."""

    code: Annotated[int, Field(ge=1, le=255)]
    message: _Text
    hint: _Text | None = None

    @classmethod
    def of(cls, error: PhotonError) -> Refusal:
        hint = error.hint[:4000] if error.hint else None
        return cls(code=error.exit_code, message=error.message[:4000], hint=hint)


class Reply(_Part):
    """Silo to aggregator: what its signature covers.

    Attributes:
        run, round, task: bind the answer to its question.
        state: sha256 of the state that was trained from, or scored.
        data: sha256 of the manifest of the text that was trained on, as registered.
    """

    protocol: Literal[1] = PROTOCOL
    photon_version: Annotated[str, Field(max_length=100)]
    kind: Literal["fit", "evaluate"]
    silo: _Name
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    round: Annotated[int, Field(ge=0, lt=2**31)]
    task: Annotated[str, Field(max_length=300)]
    state: _Sha256
    data: _Sha256 | None = None
    fit: FitAnswer | None = None
    evaluate: EvalAnswer | None = None
    refused: Refusal | None = None

    @model_validator(mode="after")
    def _one_answer(self) -> Reply:
        given = [part for part in (self.fit, self.evaluate, self.refused) if part is not None]
        if len(given) != 1 or (self.refused is None and getattr(self, self.kind) is None):
            raise ValueError("a reply is an answer of its kind, or a refusal")
        return self

    def require_answer_to(self, ask: Ask) -> None:
        """Refuse an answer to another question.

        Raises:
            ProtocolError: run, round, silo, kind or task are not those asked for.
        """
        for name, found, wanted in (
            ("run", self.run, ask.run.id),
            ("kind", self.kind, ask.kind),
            ("silo", self.silo, ask.silo),
            ("round", self.round, ask.round),
            ("task", self.task, ask.task_id),
            ("state", self.state, ask.state.sha256),
        ):
            if found != wanted:
                raise ProtocolError(
                    f"{ask.silo} answered {name} {found!r}; {wanted!r} was asked for",
                    hint="An old answer, or another node's; nothing of it is used.",
                )


def parse_ask(data: bytes) -> Ask:
    """An Ask from outside.

    Raises:
        ProtocolError: it is none, or of another protocol; says the first thing that is wrong.
    """
    return _parsed(data, Ask)


def parse_reply(data: bytes) -> Reply:
    """A Reply from outside; whether its signature holds is another question.

    Raises:
        ProtocolError: it is none, or of another protocol; says the first thing that is wrong.
    """
    return _parsed(data, Reply)


def encoded(document: Ask | Reply) -> bytes:
    """As it travels and is signed: JSON, sorted keys, no spaces."""
    record = document.model_dump(mode="json", exclude_none=True)
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _parsed(data: bytes, kind: Any) -> Any:
    if len(data) > MOST_BYTES:
        raise ProtocolError(
            f"{kind.__name__} of {len(data)} bytes; none has more than {MOST_BYTES}"
        )
    try:
        # As text: json would also take UTF-16, and bytes that are no UTF-8.
        record = json.loads(data.decode("utf-8"))
        spoken = record.get("protocol") if isinstance(record, dict) else None
        if spoken != PROTOCOL:
            raise ProtocolError(
                f"the other side speaks protocol {str(spoken)[:20]!r}, this Photon speaks "
                f"{PROTOCOL}",
                hint="Install the same version of Photon on both sides.",
            )
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise ProtocolError(f"no {kind.__name__}: {where}: {first['msg'][:200]}") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no {kind.__name__}: {str(error)[:200]}") from error


#: Tables of a run file that are the aggregator's own, or the site's: never sent.
_NOT_DICTATED = ("compute", "serve", "train")


def dictated(config: RunConfig) -> dict[str, Any]:
    """The part of a run file that a federation may dictate: what an Ask carries."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for table in _NOT_DICTATED:
        tree.pop(table, None)
    tree["data"].pop("path")
    return tree


def node_config(run: RunPart, site: Mapping[str, Any]) -> RunConfig:
    """A run file for this node: what the federation dictates, and what only the site decides.

    Args:
        run: from an Ask.
        site: tables "compute" and "data" (its path) of the site's own; the former may not be in
            `run`.

    Raises:
        ProtocolError: the run dictates what is the site's to decide.
        ConfigError: it is no valid run file.
    """
    for table in (*_NOT_DICTATED, "plugins"):
        if table in run.config:
            raise ProtocolError(f"the run dictates [{table}], which is the site's to decide")
    data = run.config.get("data", {})
    if not isinstance(data, dict) or "path" in data:
        raise ProtocolError("the run dictates data.path, which is the site's to decide")
    tree = {**run.config, **site, "data": {**data, **site["data"]}}
    return parse_run_config(tree, source="the run that the aggregator offers")
