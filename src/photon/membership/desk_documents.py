"""What nodes and the desk say to each other, defined once for both.

Bodies are read by the desk, strictly: what it does not know is refused. Answers are read by nodes,
who pass over what a newer desk says besides. Nothing in here knows HTTP.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from photon.errors import PhotonError, ProtocolError, error_of, first_fault
from photon.membership.records import Facts, MemberName, Presence, SignedReply, printable
from photon.store.presign import Grant

#: Under which the front door forwards to the desk.
DESK_PATH = "/photon/v2"

#: Most bytes of what is said to the desk: a Reply (photon.federation.envelopes) in base64, leave
#: for 256 objects, and all the rest; of what strangers say: a key, a token and some hashes.
MOST_REPLY_BYTES = 1408 << 10
MOST_GRANTS_BYTES = 256 << 10
MOST_SMALL_BYTES = 32 << 10
MOST_JOIN_BYTES = 4 << 10

#: In one request for grants.
MOST_WANTS = 256

#: A node waits for the answer to a poll for so long, or as long as it says in this header; the desk
#: answers LEAST_LEFT_S before. What it says with its answer is the patience that it would like.
POLL_PATIENCE_S, MOST_PATIENCE_S, LEAST_LEFT_S = 45.0, 180.0, 5.0
PATIENCE_HEADER = "Photon-Patience"

#: Of why there is no answer, so many characters are sent.
MOST_WORDS = 1000

#: Letters that a node says it holds.
_MOST_LETTERS = 64

_Whole = Annotated[int, Field(ge=0, lt=2**53)]
_Boot = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9-]*\z")]
_LetterId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class JoinBody(_Part):
    """Redeem an invitation. The request is signed with the key that it brings."""

    token: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-~]+\z")]
    name: MemberName
    public_key: Annotated[str, Field(max_length=2000)]
    facts: Facts


class Want(_Part):
    """Leave asked for one object. Keys are judged one by one (`Granting`): each gets its words."""

    verb: Literal["GET", "HEAD", "PUT"]
    key: Annotated[str, Field(max_length=2000)]
    bytes: _Whole | None = None
    sha256: Annotated[str, Field(max_length=64)] | None = None


class GrantsBody(_Part):
    """Leave asked for a task's objects."""

    task_id: Annotated[str, Field(min_length=1, max_length=300)]
    wants: Annotated[list[Want], Field(min_length=1, max_length=MOST_WANTS)]


class CheckBody(_Part):
    """What a member may ask without being here for it: nothing to say."""


class TaskBody(_Part):
    """Wait for a question.

    Attributes:
        boot: photon.membership.roster.Presence.boot.
        have: ids of letters that the node holds: those are not given again.
    """

    boot: _Boot
    have: Annotated[list[_LetterId], Field(max_length=_MOST_LETTERS)] = []


class AnswerPart(_Part):
    """photon.membership.records.SignedReply, as the trainer gave it."""

    text: Base64Bytes
    signature: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9+/=]+\z")]
    fingerprint: Annotated[str, Field(max_length=100, pattern=r"^sha256:[0-9a-f]{64}\z")]


class ReplyBody(_Part):
    """The answer to a letter, or why there is none."""

    boot: _Boot
    letter: _LetterId
    answer: AnswerPart | None = None
    words: Annotated[str, Field(max_length=MOST_WORDS)] | None = None

    def reply(self) -> SignedReply | str:
        """Raises ProtocolError where it is neither, or both."""
        if (self.answer is None) == (self.words is None):
            raise ProtocolError("a reply is an answer, or words why there is none")
        if self.answer is None:
            return printable(self.words or "")
        return SignedReply("", **dict(self.answer))


class DrainBody(_Part):
    """The operator: begin no other round; or, false, go on."""

    draining: bool


Body = TypeVar("Body", DrainBody, JoinBody, Presence, GrantsBody, CheckBody, TaskBody, ReplyBody)


#: Making one takes milliseconds.
_adapter = functools.cache(TypeAdapter)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """A request's body, from outside.

    Raises:
        ProtocolError: it is no such JSON; says the first thing that is wrong, and no value, as a
            value may be a secret.
    """
    try:
        return _adapter(kind).validate_json(data)
    except ValidationError as error:
        what = kind.__name__.removesuffix("Body").lower()
        raise ProtocolError(
            printable(f"the {what} request can't be read: {first_fault(error)}"),
            hint="Install the same version of Photon on both sides.",
        ) from None


# --- answers


class _Answer(BaseModel):
    # What a newer desk says besides is passed over.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


AnswerKind = TypeVar("AnswerKind", bound=_Answer)


class ErrorPart(_Answer):
    code: Annotated[int, Field(ge=1, le=255)]
    message: str
    hint: str | None = None

    def raised(self) -> PhotonError:
        """As it was raised over there, cut to a length and without what moves a cursor."""
        hint = printable(self.hint)[:2000] if self.hint else None
        return error_of(self.code)(printable(self.message)[:2000], hint=hint)


class Failure(_Answer):
    error: ErrorPart


class GrantPart(_Answer):
    verb: Literal["GET", "HEAD", "PUT"] | None = None
    key: Annotated[str, Field(max_length=2000)] = ""
    url: Annotated[str, Field(max_length=8192)] = ""
    headers: Annotated[
        dict[
            Annotated[str, Field(max_length=100, pattern=r"^[a-z0-9-]+\z")],
            Annotated[str, Field(max_length=1000, pattern=r"^[ -~]*\z")],
        ],
        Field(max_length=20),
    ] = {}
    expires_at: float = 0.0
    error: ErrorPart | None = None

    def leave(self) -> Grant | PhotonError | None:
        """The grant, or why there is none; None where it says neither."""
        if self.error is not None:
            return self.error.raised()
        if self.verb is None:
            return None
        return Grant(self.verb, self.url, self.headers, self.expires_at)


class CheckAnswer(_Answer):
    """How a member stands, by its name; leave to look at the store."""

    server_time: float
    name: Annotated[str, AfterValidator(lambda name: printable(name)[:100])]
    member_status: Annotated[str, Field(max_length=100), AfterValidator(printable)]
    store: GrantPart


class GrantsAnswer(_Answer):
    server_time: float
    grants: Annotated[list[GrantPart], Field(max_length=MOST_WANTS)]


class Delivery(_Answer):
    """A question for a node.

    Attributes:
        id: of its letter; names it in the reply.
        left_s: nobody waits for the answer after so many seconds.
        message: a sealed Ask's bytes.
    """

    id: _LetterId
    left_s: float
    message: Annotated[Base64Bytes, Field(strict=False)]


class TaskAnswer(_Answer):
    letter: Delivery | None
    patience_s: Annotated[float, Field(ge=POLL_PATIENCE_S, le=MOST_PATIENCE_S)] = POLL_PATIENCE_S


class CertificateAnswer(_Answer):
    certificate: Annotated[str, Field(max_length=8000)]
    left_s: Annotated[float, Field(gt=0)]


def error_record(error: PhotonError) -> dict[str, Any]:
    """As errors travel: {"code", "message", "hint"}."""
    return {"code": error.exit_code, "message": error.message, "hint": error.hint}
