"""[privacy]: what is done to a silo's update before it leaves its node."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from photon.config.section import Section

if TYPE_CHECKING:
    from photon.config.run import FederationConfig, RunConfig

#: Fewest updates of a sum that says nothing of one: of two, each member knows the other's.
LEAST_SUMMED = 3


class PrivacyConfig(Section):
    """[privacy]: clip and noise, each node its own. docs/privacy.md has what they promise."""

    mechanism: Literal["none", "client", "dp_sgd"] = Field(
        default="none",
        description="client: each node scales its update down to clip_norm and adds Gaussian noise "
        "of its own (no epsilon is claimed yet). dp_sgd: not built yet.",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="C, of client: largest L2 norm of an update, all tensors that leave together.",
    )
    noise_multiplier: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="z, of client: each coordinate of each update gets noise of standard deviation "
        "z C, whatever the number of participants. 0 only clips.",
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Mask updates so that the aggregator sees their sum alone, of at least three "
        "(docs/secure-aggregation.md). Updates then travel in fixed point, of 12 bits a value for "
        "8 silos, with error feedback unless link.error_feedback = false.",
    )

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of an update, z C."""
        return (self.noise_multiplier or 0.0) * (self.clip_norm or 0.0)

    def noised_norm(self, norm: float, parameters: int) -> float:
        """About the norm of an update that had at most `norm` before clip and noise."""
        if self.clip_norm is None:
            return norm
        return min(norm, self.clip_norm) + self.deviation * math.sqrt(parameters)

    @model_validator(mode="after")
    def _whole(self) -> PrivacyConfig:
        if self.mechanism == "dp_sgd":
            raise ValueError('mechanism = "dp_sgd" is not built yet; there are "client" and "none"')
        acts = self.mechanism == "client"
        for key in ("clip_norm", "noise_multiplier"):
            if (getattr(self, key) is not None) != acts:
                needs = "needs" if acts else "(the default) makes nothing of"
                raise ValueError(f'mechanism = "{self.mechanism}" {needs} privacy.{key}')
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
    elif few is not None and few < LEAST_SUMMED:
        why = f"sample = {few} is fewer than the {LEAST_SUMMED} of a sum; of two each knows both"
    return why and f"secure_aggregation = true has nothing but a sum, and {why}"


def voided(privacy: PrivacyConfig, federation: FederationConfig) -> str | None:
    """What leaves beside the mechanism, or undoes it, in words; None where nothing does."""
    asked = f'mechanism = "{privacy.mechanism}"'
    if privacy.mechanism == "none":
        return None
    if federation.merge == "adopt":
        return (
            f'{asked} clips deltas, and federation.merge = "adopt" sends weights; use merge = '
            '"delta"'
        )
    if federation.optimizer_state == "average":
        return (
            f'{asked} would be void with federation.optimizer_state = "average": that state leaves '
            'unclipped and without noise; use "reset" or "keep"'
        )
    if federation.normalise:
        return (
            f"{asked} would be void with federation.normalise = true, which multiplies the updates "
            "of slow silos, and their noise, after the clip; leave it out"
        )
    return None
