"""What members and aggregator say to each other. All of it comes from outside, and is bounded."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from photon.config.privacy import LEAST_SUMMED
from photon.errors import ProtocolError, first_fault
from photon.secure.graph import Graph, mask_graph, share_graph, threshold_of

#: A weight is a whole number up to this, so that a member's part is right to 0.4% of the largest.
MOST_WEIGHT = 255
#: Of a word of the ring that sums are taken in.
MOST_BITS = 16
MOST_MEMBERS = 2000

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
_Name = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\z")]
_Names = Annotated[list[_Name], Field(max_length=MOST_MEMBERS)]
_Box = Annotated[str, Field(max_length=100)]
_Number = Annotated[int, Field(ge=1, lt=2**31)]
_Run = Annotated[str, Field(max_length=100)]
_Positive = Annotated[float, Field(gt=0, lt=1e30)]


class Document(BaseModel):
    """As JSON it has one form, whose sha256 names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @cached_property
    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Call(Document):
    """Aggregator to member: advertise keys for this attempt at a round."""

    run: _Run
    round: _Number
    attempt: _Number


class Advert(Document):
    """A member's two X25519 public keys, fresh for this attempt: of masks, and of boxes."""

    round: _Number
    attempt: _Number
    mask_key: _Digest
    box_key: _Digest


class Member(Document):
    """One of a cohort: its advert, and what it is asked for."""

    name: _Name
    weight: Annotated[int, Field(ge=1, le=MOST_WEIGHT)]
    steps: _Number
    advert: Advert


class Cohort(Document):
    """Who is in a sum, and how it is taken: the same for all, or their masks don't cancel.

    Attributes:
        question: sha256 of all else that members are asked alike: model, recipe, state, clock.
        bits: of a word of the ring.
        floor: fewest updates of the sum.
        ranges: by tensor, the largest magnitude that a member's values may have.
        clip: the norm that members scale their updates down to, for noise on the sum; None where
            there is none.
        counted: whether members also say, under masks, if theirs were within it.
    """

    run: _Run
    round: _Number
    attempt: _Number
    question: _Digest
    bits: Annotated[int, Field(ge=8, le=MOST_BITS)]
    floor: Annotated[int, Field(ge=LEAST_SUMMED, le=MOST_MEMBERS)]
    members: Annotated[list[Member], Field(max_length=MOST_MEMBERS)]
    ranges: dict[Annotated[str, Field(max_length=300)], _Positive]
    clip: _Positive | None = None
    counted: bool = False

    @model_validator(mode="after")
    def _of_one_attempt(self) -> Cohort:
        if self.names != sorted(set(self.names)):
            raise ValueError("members are not in the order of their names, each once")
        if len(self.names) < self.floor:
            raise ValueError(f"{len(self.names)} members; at least {self.floor} are to be in a sum")
        adverts = [one.advert for one in self.members]
        if {(one.round, one.attempt) for one in adverts} != {(self.round, self.attempt)}:
            raise ValueError(f"adverts are not all for round {self.round}, attempt {self.attempt}")
        return self

    @cached_property
    def names(self) -> list[str]:
        return [one.name for one in self.members]

    @cached_property
    def by_name(self) -> dict[str, Member]:
        return {one.name: one for one in self.members}

    def place(self, name: str) -> int:
        """At which shares for a member are taken of polynomials."""
        return 1 + self.names.index(name)

    @cached_property
    def masks(self) -> Graph:
        return mask_graph(self.names, self.id)

    @cached_property
    def holders(self) -> Graph:
        return share_graph(self.names, self.id)

    @property
    def threshold(self) -> int:
        """Shares that open a secret."""
        return threshold_of(len(self.members))


class Dealt(Document):
    """A member's shares of its two secrets, each in a box of its own, by who can open it.

    Attributes:
        boxes: by holder: with a share of the key of masks, and of the secret of the own mask.
        own: sha256 of the latter secret.
    """

    cohort: _Digest
    boxes: dict[_Name, tuple[_Box, _Box]]
    own: _Digest


class Closing(Document):
    """Aggregator to member: whose updates are in the sum."""

    cohort: Cohort
    survivors: _Names


class Revealed(Document):
    """Keys of boxes that a member holds, by who dealt them: one of each two."""

    cohort: _Digest
    keys: dict[_Name, _Digest]


_D = TypeVar("_D", bound=Document)


def read(text: str, kind: type[_D], who: str) -> _D:
    """A document from outside.

    Raises:
        ProtocolError: it is none; names who sent it, and the first thing that is wrong.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ProtocolError(f"{who} sent no {kind.__name__}: {first_fault(error)}") from None
