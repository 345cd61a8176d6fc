"""What an aggregator and a silo say to each other over a control plane: small JSON documents.

A silo is asked with an Ask, which carries everything it needs to start from nothing: a trainer that
was just restarted answers as one that has been here for a hundred rounds. The aggregator's key has
signed it, so that whoever carries it changes nothing. The silo answers with a Reply that its own
key has signed (photon.membership.signing), and that names the Ask by its sha256. Tensors never
travel in these: a Ref says where they lie, and what they must be.

Whatever comes from outside is read by `open_ask` and `parse_reply` only. Every number is finite and
has a bound, every text is one printable line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass as checked

from photon.config import RunConfig, parse_run_config
from photon.errors import PhotonError, ProtocolError, first_fault
from photon.federation.tasks import (
    MOST_TEXT,
    Code,
    Count,
    EvalReceipt,
    FitTask,
    Measures,
    Receipt,
    Score,
    StateRef,
    Text,
    Whole,
)
from photon.link import Ref
from photon.link.manifest import CLOSED, SEGMENT, Bytes, Record, Sha256
from photon.membership.keys import NodeKey
from photon.membership.records import printable
from photon.membership.signing import ASK, sign_document, verify_document
from photon.training.timing import Seconds

#: Raised when an Ask or Reply changes its meaning; both sides must speak the same one.
PROTOCOL = 3

#: No Ask or Reply is longer. A run file takes some 4 KB of it.
MOST_BYTES = 1 << 20

#: A run file is three deep: tables, keys, lists.
_MOST_DEPTH = 16

_RUN_ID = "[0-9a-f]{32}"
_RunId = Annotated[str, Field(pattern=f"^{_RUN_ID}$")]
_Name = Annotated[str, Field(min_length=1, max_length=100, pattern=f"^{SEGMENT}$")]
_Version = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9.+!_-]*$")]


class RunPart(Record):
    """What is being trained. A silo holds it against its policy before it does anything else.

    Attributes:
        id: of this run, unlike any other's; new with each `photon serve` of a new run folder.
        silos: all that take part, by name: a silo may refuse to train with some.
        config: the run file without the aggregator's own tables and paths (`dictated`).
        model: fingerprint of the model's parameter names and shapes and its configuration.
        tokenizer: sha256 of tokenizer.json; a silo's text must have been cut by the same.
        vocab_size, eos_id: of that tokenizer.
    """

    id: _RunId
    silos: Annotated[list[_Name], Field(min_length=1, max_length=10_000)]
    config: dict[str, Any]
    model: Sha256
    tokenizer: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**31)]
    eos_id: Whole

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


class FitPart(Record):
    """photon.federation.FitTask without the names of run and silo."""

    round: Annotated[int, Field(ge=1, lt=2**31)]
    global_step: Whole
    steps: Annotated[int, Field(ge=1, lt=2**31)]
    node_round: Count | None = None
    cursor: Whole = 0
    sealing: Annotated[str, Field(max_length=MOST_BYTES)] | None = None


class EvalPart(Record):
    """Score the state on the silo's own held-out text, with the personal part of `node_round`."""

    round: Count
    node_round: Count | None = None


class Evidence(Record):
    """A silo's signed Reply, as shown to other silos."""

    text: Annotated[str, Field(max_length=MOST_BYTES)]
    signature: Annotated[str, Field(max_length=200)]
    public_key: Annotated[str, Field(max_length=2000)]


class SecurePart(Record):
    """photon.federation.SecureTask.

    Attributes:
        text: of photon.secure's document for this phase.
        evidence: with which the cohort's members have signed their adverts.
    """

    round: Annotated[int, Field(ge=1, lt=2**31)]
    text: Annotated[str, Field(max_length=MOST_BYTES)]
    evidence: Annotated[tuple[Evidence, ...], Field(max_length=10_000, strict=False)] = ()


class _Letter(Record):
    protocol: Literal[3] = PROTOCOL
    photon_version: _Version
    kind: Literal["fit", "evaluate", "advertise", "share", "unmask"]
    silo: _Name
    log_head: Sha256

    @property
    def part(self) -> str:
        """Where what is asked, or answered, stands."""
        return self.kind if self.kind in ("fit", "evaluate") else "secure"


class Ask(_Letter):
    """Aggregator to silo.

    Attributes:
        silo: who is asked; a silo refuses what is for another.
        log_head: of the aggregator's audit log when it asked: a log that loses or changes what was
            in it by then is found out by the replies.
        within_s: nobody waits longer for an answer. A duration, as clocks differ.
    """

    run: RunPart
    state: StateRef
    fit: FitPart | None = None
    evaluate: EvalPart | None = None
    secure: SecurePart | None = None
    within_s: Annotated[Seconds, Field(gt=0)]

    #: sha256 of the text that it was read from, where that is not how this Photon would write it.
    _came_as: str | None = None

    @model_validator(mode="after")
    def _one_task(self) -> Ask:
        part = self.part
        if {name for name in ("fit", "evaluate", "secure") if getattr(self, name)} != {part}:
            raise ValueError(f"kind {self.kind!r} comes with a {part!r} part and no other")
        return self

    def __eq__(self, other: object) -> bool:
        """The same, however it was written."""
        return isinstance(other, Ask) and dict(self) == dict(other)

    @property
    def round(self) -> int:
        part = self.fit or self.evaluate or self.secure
        assert part is not None
        return part.round

    @property
    def task_id(self) -> str:
        """Names the task: asked again under the same name, a silo answers the same."""
        return f"{self.run.id}/{self.kind}/{self.round}/{self.silo}"

    @property
    def sha256(self) -> str:
        """Of the text that is signed: names it in the Reply."""
        return self._came_as or hashlib.sha256(encoded(self)).hexdigest()

    @property
    def question_sha256(self) -> str:
        """sha256 of what an answer depends on.

        A state that lies elsewhere in the store is the same state, and a later deadline is the
        same question. An aggregator that went back to an older checkpoint may ask another one
        under the same name.
        """
        fit = self.fit.model_dump() if self.fit is not None else None
        if fit is not None and fit["sealing"] is None:
            del fit["sealing"]
        record = {
            "kind": self.kind,
            "silo": self.silo,
            "run": self.run.id,
            "config": self.run.config,
            "model": self.run.model,
            "round": self.round,
            "state": self.state.sha256,
            "fit": fit,
            "scored_with": self.evaluate.node_round if self.evaluate is not None else None,
        }
        if self.secure is not None:
            record["secure"] = self.secure.text
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def fit_task(self, run: str) -> FitTask:
        """As the node takes it.

        Args:
            run: name of the run.
        """
        assert self.fit is not None
        told: dict[str, Any] = dict(self.fit) | {"sealing": self.fit.sealing or ""}
        return FitTask(run=run, silo=self.silo, **told)


@checked(frozen=True, kw_only=True, config=CLOSED)
class FitAnswer(Measures):
    """Measures, and where the update lies; a failure (a loss that is not finite) has none.

    What went up is what the update's reference says, and stands nowhere else.
    """

    bytes_down: Bytes = 0
    update: Ref | None = None

    @model_validator(mode="after")
    def _update_or_failure(self) -> FitAnswer:
        if (self.update is None) == (self.failure is None):
            raise ValueError("an answer has an update or a failure, not both or neither")
        if self.update is not None and not self.tokens:
            raise ValueError("an update of no tokens has no weight")
        return self

    def receipt(self, round_number: int, silo: str) -> Receipt:
        bytes_up = self.update.wire_bytes if self.update is not None else 0
        return Receipt(round_number, silo, bytes_up=bytes_up, **_figures(Measures, self))

    @classmethod
    def of(cls, receipt: Receipt, update: Ref | None) -> FitAnswer:
        figures = _figures(Measures, receipt)
        for words in ("failure", "failure_hint"):
            figures[words] = _fitting(figures[words])
        return cls(update=update, **figures)


@checked(frozen=True, kw_only=True, config=CLOSED)
class EvalAnswer(Score):
    """The score of the silo that was asked."""

    bytes_down: Bytes = 0

    def receipt(self, silo: str) -> EvalReceipt:
        return EvalReceipt(silo, **vars(self))

    @classmethod
    def of(cls, receipt: EvalReceipt) -> EvalAnswer:
        return cls(**_figures(Score, receipt))


class Refusal(Record):
    """A silo will not, or can't, and says why in words that reach the aggregator's operator."""

    code: Code
    message: Text
    hint: Text | None = None

    @classmethod
    def of(cls, error: PhotonError) -> Refusal:
        message = _fitting(error.message) or ""
        return cls(code=error.exit_code, message=message, hint=_fitting(error.hint))


class Reply(_Letter):
    """Silo to aggregator: what its signature covers.

    Attributes:
        ask: sha256 of the Ask that it answers; run, round, task and state say the same in the
            clear, for those who read the log.
        log_head: of that Ask, so that the silo has signed what it was told of the log.
        state: sha256 of the state that was trained from, or scored.
        data: sha256 of the manifest of the text that was trained on, as registered.
    """

    ask: Sha256
    run: _RunId
    round: Count
    task: Annotated[
        str, Field(max_length=200, pattern=f"^{_RUN_ID}/[a-z]{{3,9}}/[0-9]+/{SEGMENT}$")
    ]
    state: Sha256
    data: Sha256 | None = None
    fit: FitAnswer | None = None
    evaluate: EvalAnswer | None = None
    secure: Annotated[str, Field(max_length=MOST_BYTES)] | None = None
    refused: Refusal | None = None

    @model_validator(mode="after")
    def _one_answer(self) -> Reply:
        parts = (self.fit, self.evaluate, self.secure, self.refused)
        given = [part for part in parts if part is not None]
        if len(given) != 1 or (self.refused is None and getattr(self, self.part) is None):
            raise ValueError("a reply is an answer of its kind, or a refusal")
        return self

    def require_answer_to(self, ask: Ask) -> None:
        """Refuse an answer to another question.

        Raises:
            ProtocolError: it names another Ask, or run, round, silo, kind, task, state or log
                head are not those asked for.
        """
        for name, found, wanted in (
            ("run", self.run, ask.run.id),
            ("kind", self.kind, ask.kind),
            ("silo", self.silo, ask.silo),
            ("round", self.round, ask.round),
            ("task", self.task, ask.task_id),
            ("state", self.state, ask.state.sha256),
            ("log_head", self.log_head, ask.log_head),
            ("ask", self.ask, ask.sha256),
        ):
            if found != wanted:
                raise ProtocolError(
                    f"{ask.silo} answered {name} {found!r}; {wanted!r} was asked for",
                    hint="An old answer, or another node's; nothing of it is used.",
                )


def parse_ask(text: bytes) -> Ask:
    """An Ask's own text; that the aggregator signed it is open_ask's to know.

    Raises:
        ProtocolError: it is none, or of another protocol; says the first thing that is wrong.
    """
    ask: Ask = parsed(text, Ask)
    came_as = hashlib.sha256(text).hexdigest()
    if came_as != ask.sha256:  # another version has fields that this one fills in, say
        ask._came_as = came_as
    return ask


def parse_reply(data: bytes) -> Reply:
    """A Reply from outside; whether its signature holds is another question.

    Raises:
        ProtocolError: it is none, or of another protocol; says the first thing that is wrong.
    """
    return parsed(data, Reply)


def encoded(document: BaseModel) -> bytes:
    """As it travels and is signed: JSON, sorted keys, no spaces."""
    record = document.model_dump(mode="json", exclude_none=True)
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def _figures(kind: type, source: object) -> dict[str, Any]:
    """The fields of a dataclass, from one that has them too."""
    return {one.name: getattr(source, one.name) for one in fields(kind)}


def _fitting(text: str | None) -> str | None:
    """Words as a document takes them."""
    return printable(text)[:MOST_TEXT] if text else None


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def parsed(data: bytes, kind: Any) -> Any:
    """A document of some kind, from outside.

    Raises:
        ProtocolError: see `parse_ask`.
    """
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
        raise ProtocolError(f"no {kind.__name__}: {first_fault(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no {kind.__name__}: {str(error)[:200]}") from error


class SealedAsk(Record):
    """An Ask as it travels, the same bytes all the way: the text that was signed, and the
    signature over it (base64)."""

    protocol: Literal[3] = PROTOCOL
    ask: str
    signature: Annotated[str, Field(max_length=200)]


def sealed(ask: Ask, key: NodeKey) -> bytes:
    """An Ask as it travels.

    Args:
        key: the aggregator's.
    """
    text = encoded(ask)
    signature = sign_document(key, ASK, text)
    return encoded(SealedAsk(ask=text.decode(), signature=signature))


def open_ask(data: bytes, public_pem: str) -> Ask:
    """An Ask from outside, once it is sure that the aggregator asks it.

    Args:
        public_pem: the aggregator's key, as it was pinned at joining.

    Raises:
        SignatureError: another key signed it, or it was changed on its way.
        ProtocolError: it is none, or of another protocol; says the first thing that is wrong.
    """
    found: SealedAsk = parsed(data, SealedAsk)
    text = text_of(found)
    verify_document(public_pem, ASK, text, found.signature)
    return parse_ask(text)


def text_of(found: SealedAsk) -> bytes:
    """What was signed; lone surrogates among it are no UTF-8 later, and refused as such."""
    return found.ask.encode("utf-8", "surrogatepass")


#: Tables of a run file that are the aggregator's own, or the site's: never sent.
_NOT_DICTATED = ("compute", "energy", "serve", "train")


def dictated(config: RunConfig) -> dict[str, Any]:
    """The part of a run file that a federation may dictate: what an Ask carries."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for table in _NOT_DICTATED:
        tree.pop(table, None)
    tree["data"].pop("path")
    # Members here, of whom each knows its own part alone.
    tree["federation"] |= {"children": {}, "levels": "at_once"}
    tree["federation"].pop("branches", None)
    return tree


def node_config(run: RunPart, site: Mapping[str, Any]) -> RunConfig:
    """A run file for this node: what the federation dictates, and what only the site decides.

    Args:
        run: from an Ask.
        site: tables "compute", "energy" and "data" (its path) of the site's own; the first two may
            not be in `run`.

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
    config = parse_run_config(tree, source="the run that the aggregator offers")
    # Else one member could be told that others clip to nothing.
    if config.federation.children or config.federation.branches:
        raise ProtocolError("the run dictates what groups others are in")
    return config
