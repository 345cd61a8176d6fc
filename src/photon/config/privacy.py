"""[privacy]: what is done to a silo's update before it leaves its node."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from photon.config.section import Section

if TYPE_CHECKING:
    from photon.config.run import FederationConfig


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
        description="Mask updates so that the aggregator sees their sum alone: not built yet.",
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
        if self.secure_aggregation:
            raise ValueError(
                "secure_aggregation is not built yet: the aggregator sees single updates"
            )
        acts = self.mechanism == "client"
        for key in ("clip_norm", "noise_multiplier"):
            if (getattr(self, key) is not None) != acts:
                needs = "needs" if acts else "(the default) makes nothing of"
                raise ValueError(f'mechanism = "{self.mechanism}" {needs} privacy.{key}')
        return self


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
