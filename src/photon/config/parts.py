"""[parts]: the role of each tensor of the model."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from photon.config.outer import known_name
from photon.config.section import Positive, Section
from photon.plugins import MERGING_RULES

Role = Literal["shared", "key", "personal", "frozen"]
ROLES: tuple[Role, ...] = ("shared", "key", "personal", "frozen")

#: Whatever no other list names.
REST = "*"

#: Rules that go by the norm of an update judge the whole of it, which is federation.merging_rule's.
ATTENTION_RULES = ("attention", "fedatt")
KEY_RULE_NAMES = ("mean", "median", "trimmed_mean", *ATTENTION_RULES)

_SHARE = re.compile(r"(first|last):(0?\.\d+|1|1\.0*)")


def share_of(pattern: str) -> tuple[str, float] | None:
    """ "last:0.3" as ("last", 0.3); None for a pattern of names."""
    found = _SHARE.fullmatch(pattern)
    return (found[1], float(found[2])) if found else None


def _pattern(text: str) -> str:
    share = share_of(text)
    if not text or (":" in text and share is None) or (share is not None and not share[1]):
        raise ValueError(
            f"{text!r} is neither a shell pattern of tensors' names nor a share of the model's "
            'parameters such as "last:0.3"'
        )
    return text


_Patterns = Annotated[list[Annotated[str, AfterValidator(_pattern)]], Field(default_factory=list)]


class PartsConfig(Section):
    """[parts]: the role of each tensor: shell patterns of names, first:0.3, or * for the rest.

    Lists name tensors by patterns ("lm_head*"), or by share of the trained parameters in the
    model's order ("last:0.3"). Two lists that name one tensor are an error.
    """

    shared: _Patterns = Field(
        default_factory=list, description="Merged. What no list names is shared."
    )
    key: _Patterns = Field(default_factory=list, description="Merged too, by key_rule.")
    personal: _Patterns = Field(
        default_factory=list,
        description='Trained and kept by each silo, and never sent: ["lm_head*"] is FedPer (arXiv '
        "1912.00818). Needs eval.per_silo: the global score is then the mean of the silos' own, "
        "weighted by tokens, as nobody has a whole global model.",
    )
    frozen: _Patterns = Field(
        default_factory=list,
        description="Never trained: sent once, and kept by its hash. Buffers, and parameters that "
        "the architecture itself does not train, always are.",
    )
    key_rule: Annotated[str, known_name(KEY_RULE_NAMES, MERGING_RULES)] = Field(
        default="mean",
        description="How tensors of the key list are merged: mean, median, trimmed_mean (with "
        "federation.trim), a plugin's rule, or layer by layer, by how alike updates are: "
        "attention (WorldLM, arXiv 2405.14446), fedatt (arXiv 1812.07108).",
    )
    key_down: Literal["replace", "attention", "mean", "keep", "best"] = Field(
        default="replace",
        description="What a silo, or a group, does with key tensors that come down: replace its "
        "own by them; or mix both by attention, or half and half (mean), or keep its own; or of "
        "each layer the best of these by the loss on the text that it trains on next (best, of "
        "silos). But for replace, it keeps its own beside inner-optimizer state.",
    )
    key_temperature: float = Field(
        default=0.5,
        gt=0,
        description="t of attention: a higher one is nearer to the mean, a lower one to the most "
        "alike, which going down is one's own.",
    )
    key_projection: Positive = Field(
        default=256, description="Numbers that a layer's update is projected to, to be compared."
    )
    residual_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="rho: how little of a layer leaves; docs/worldlm.md."
    )
    residual_cosine: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Who takes a residual is more alike to it than this."
    )

    @property
    def own_key(self) -> bool:
        """Whether participants keep key tensors of their own."""
        return bool(self.key) and self.key_down != "replace"

    @property
    def for_scores(self) -> PartsConfig:
        """How a silo's own model is put together; where it chooses, as its newest task left it."""
        return self.model_copy(update={"key_down": "keep"}) if self.key_down == "best" else self

    @property
    def kept(self) -> bool:
        """Whether participants keep tensors of their own, of whatever role."""
        return bool(self.personal) or self.own_key

    def require_compatible(self, optimizer_state: str, *, per_silo: bool) -> None:
        """Raise ValueError where roles can't be with the rest of the run file."""
        for name, value in self:
            default = type(self).model_fields[name].default
            if name.startswith(("key_", "residual_")) and value != default and not self.key:
                raise ValueError(f"parts.{name} only means something with parts.key")
        if self.personal and optimizer_state == "average":
            raise ValueError(
                'federation.optimizer_state = "average" would send inner optimizer state of '
                'parts.personal to the aggregator; use "reset" or "keep"'
            )
        if self.personal and not per_silo:
            raise ValueError(
                "with parts.personal nobody has a whole global model, and scores are those of the "
                "silos; use eval.per_silo = true"
            )

    def pooled(self) -> PartsConfig:
        """For training on pooled text, where nothing is anybody's own: all that is trained is
        shared.
        """
        every = [*self.shared, *self.key, *self.personal]
        shared = [pattern for pattern in every if pattern != REST]
        return PartsConfig(shared=shared, frozen=self.frozen)
