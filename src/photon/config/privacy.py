"""[privacy]: what is done to a silo's update before it leaves its node."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from photon.config.section import Section

if TYPE_CHECKING:
    from photon.config.run import RunConfig

#: Fewest updates of a sum that says nothing of one: of two, each member knows the other's.
LEAST_SUMMED = 3
#: An adaptive clip stays within so many times clip_norm, and this part of it.
CLIP_MOVES = 100.0


class PrivacyConfig(Section):
    """[privacy]: clip and noise. docs/privacy.md has what they promise."""

    mechanism: Literal["none", "client", "dp_sgd"] = Field(
        default="none",
        description="client: each node scales its update down to clip_norm and adds Gaussian noise "
        "of its own (or see noise_at), which protects a silo's text as a whole. dp_sgd: each "
        "sequence's gradient is scaled down, and each optimizer step gets noise, which protects a "
        "sequence of data.sequence_length tokens; the choice for few silos.",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="C: largest L2 norm of an update, all tensors that leave together (client), or "
        "of a sequence's gradient, all that is trained together (dp_sgd).",
    )
    noise_multiplier: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="z: each coordinate of an update (client), or of a batch's summed gradients "
        "(dp_sgd), gets noise of standard deviation z C. 0 only clips. Either this or "
        "target_epsilon.",
    )
    target_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="In the place of noise_multiplier: each node takes the z with which the whole "
        "run costs its text this much. A task that would cost more is refused.",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="At which epsilon is told, well below 1 over the number of records: sequences "
        "(dp_sgd), silos (client). 1e-5 by default beside noise_multiplier.",
    )
    noise_at: Literal["node", "sum"] = Field(
        default="node",
        description="sum, with client and secure_aggregation: nodes only clip, and the aggregator "
        "adds the noise to their sum before anybody sees it: for n silos that takes the square "
        "root of n times less, and they trust the aggregator for it.",
    )
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="With noise_at = sum: clip_norm is where the clip begins; it then follows the "
        "norm that this part of the updates keep within, as a noised count tells it.",
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Mask updates so that the aggregator sees their sum alone, of at least three "
        "(docs/secure-aggregation.md). Updates then travel in fixed point, of 12 bits a value for "
        "8 silos, with error feedback unless link.error_feedback = false.",
    )

    @property
    def at_sum(self) -> bool:
        """Whether the noise is the aggregator's to add, and nodes only clip."""
        return self.noise_at == "sum"

    @property
    def promises(self) -> bool:
        """Whether what leaves a node has noise; without, its site promises nothing."""
        acts = self.mechanism != "none" and not self.at_sum
        return acts and bool(self.noise_multiplier or self.target_epsilon)

    @property
    def unit(self) -> Literal["sequence", "client"]:
        """What is protected."""
        return "sequence" if self.mechanism == "dp_sgd" else "client"

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of an update, z C."""
        client = self.mechanism == "client"
        return (self.noise_multiplier or 0.0) * (self.clip_norm or 0.0) if client else 0.0

    @property
    def at_delta(self) -> float:
        """What epsilon is told at."""
        return self.delta or 1e-5

    def noised_norm(self, norm: float, parameters: int) -> float:
        """About the norm of an update that had at most `norm` before clip and noise."""
        if self.clip_norm is None or self.mechanism != "client":
            return norm
        moves = CLIP_MOVES if self.clip_quantile else 1.0
        noise = self.deviation * math.sqrt(parameters)
        return min(norm, moves * self.clip_norm) + moves * noise

    @model_validator(mode="after")
    def _whole(self) -> PrivacyConfig:
        said, acts = f'mechanism = "{self.mechanism}"', self.mechanism != "none"
        for key in ("clip_norm", "noise_multiplier", "target_epsilon", "delta"):
            if getattr(self, key) is not None and not acts:
                raise ValueError(
                    f'{said} (the default) makes nothing of privacy.{key}; "client" and "dp_sgd" do'
                )
        if self.at_sum and not (self.mechanism == "client" and self.secure_aggregation):
            raise ValueError(
                'noise_at = "sum" needs mechanism = "client" and secure_aggregation = true (found '
                f"{said} and {str(self.secure_aggregation).lower()}): the aggregator would see "
                "single updates without noise"
            )
        if self.clip_quantile is not None and not self.at_sum:
            raise ValueError(
                'clip_quantile needs noise_at = "sum": updates are counted under masks, and the '
                "count gets noise there"
            )
        if not acts:
            return self
        if self.clip_norm is None:
            raise ValueError(f"{said} needs privacy.clip_norm")
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            found = "neither" if self.noise_multiplier is None else "both"
            raise ValueError(
                f"{said} needs one of privacy.noise_multiplier and privacy.target_epsilon, not "
                f"{found}"
            )
        if 0 < (self.noise_multiplier or 0) < 1e-6:
            raise ValueError(
                f"noise_multiplier = {self.noise_multiplier:g} is no noise to speak of; use 0, or "
                "1e-6 and more"
            )
        if self.target_epsilon is not None and self.delta is None:
            raise ValueError(
                "target_epsilon needs privacy.delta too: 1e-5, or less for more records than 10,000"
            )
        return self


def unsummable(config: RunConfig) -> str | None:
    """What secure aggregation has no single update for, in words; None where it is off or works."""
    federation, link, parts = config.federation, config.link, config.parts
    if not config.privacy.secure_aggregation:
        return None
    rule, bound, few = federation.merging_rule, federation.max_update_norm, federation.sample
    why = None
    if rule != "mean":
        why = (
            f'merging_rule = "{rule}" looks at single updates; use "mean": members keep within the '
            'round\'s range by themselves, and privacy.mechanism = "client" has them clip'
        )
    elif isinstance(bound, float):
        why = (
            f"max_update_norm = {bound:g} is for single updates; leave it out: nodes keep within "
            "the round's range, and the sum within what the recipe can move"
        )
    elif parts.key and parts.key_rule != "mean":
        why = f'parts.key_rule = "{parts.key_rule}" compares single updates; use "mean"'
    elif federation.policy.lets("out", "in"):
        why = "federation.policy.residuals has layers of single members travel; leave it out"
    elif federation.optimizer_state == "average":
        why = 'optimizer_state = "average" sends state without a mask; use "keep" or "reset"'
    elif federation.merge == "adopt":
        why = 'merge = "adopt" sends weights, which have no range; use merge = "delta"'
    elif federation.keeps_late:
        why = (
            f'pace = "{federation.pace}" takes late updates, which are of another cohort; use '
            '"synchronous", or "quorum" with late = "drop"'
        )
    elif federation.normalise:
        why = (
            "normalise = true scales updates that were sent; leave it out: with weighting = "
            '"tokens" who takes fewer steps counts less'
        )
    elif link.update_codec not in ("fp32", "int8"):
        why = (
            f'link.update_codec = "{link.update_codec}" has a form of its own for each update; '
            "leave it out: sealed ones travel in fixed point, about as small as int8"
        )
    elif config.privacy.at_sum and link.error_feedback:
        why = (
            'noise_at = "sum" has noise for what the clip lets through, and link.error_feedback = '
            "true adds to it what was left out of earlier updates; leave it out"
        )
    elif config.privacy.at_sum and (federation.children or federation.branches):
        why = (
            'noise_at = "sum" is for silos, which clip by themselves, and groups are among those '
            'of this sum; use it in the [privacy] of the groups, or noise_at = "node"'
        )
    elif few is not None and few < LEAST_SUMMED:
        why = f"sample = {few} is fewer than the {LEAST_SUMMED} of a sum; of two each knows both"
    return why and f"secure_aggregation = true has nothing but a sum, and {why}"


def voided(privacy: PrivacyConfig, config: RunConfig) -> str | None:
    """What leaves beside the mechanism, or undoes it, in words; None where nothing does.

    After the noise of dp_sgd all is post-processing: it may adopt, average and normalise.
    """
    federation, strategy, why = config.federation, config.compute.strategy, None
    if privacy.mechanism == "none":
        return None
    if privacy.target_epsilon is not None and federation.pace == "buffered":
        why = 'pace = "buffered", unless by noise_multiplier: nobody knows how often silos answer'
    elif privacy.mechanism == "dp_sgd":
        if config.data.mixture:
            why = "data.mixture, which repeats some; leave it out: sources then count by their size"
        elif config.parts.key_down == "best":
            why = 'parts.key_down = "best", a choice by losses without noise; use "attention"'
        elif strategy in ("fsdp", "hybrid"):
            why = f'compute.strategy = "{strategy}": it needs whole gradients; use "ddp"'
    elif federation.merge == "adopt":
        why = 'federation.merge = "adopt", which sends weights; use merge = "delta", or "dp_sgd"'
    elif federation.optimizer_state == "average":
        why = 'optimizer_state = "average", which leaves unclipped and without noise; use "keep"'
    elif federation.normalise:
        why = "federation.normalise = true, which scales update and noise after the clip"
    return why and f'mechanism = "{privacy.mechanism}" does not go with {why}'
