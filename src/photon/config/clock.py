"""clock.toml: how fast silos compute and send, and when they fail (`photon simulate --clock`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from photon.config.section import LocalPath, Section

Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class SiloClock(Section):
    """[silos.NAME]: one silo; [silos."*"] is of those that are not named."""

    step_s: Rate = Field(default=1.0, description="Seconds of a local step.")
    down_mbit_s: Rate = Field(default=100.0, description="Of its line, to it.")
    up_mbit_s: Rate = Field(default=100.0, description="Of its line, from it.")
    latency_s: Seconds = Field(default=0.0, description="Before a transfer begins.")
    from_s: Seconds = Field(default=0.0, description="When it joins.")
    until_s: Seconds | None = Field(default=None, description="When it leaves; never by default.")


class FailureClock(Section):
    """[failures]: when silos are down. What one was at then is lost, and begun again after it."""

    mean_up_s: Rate | None = Field(
        default=None,
        description="Mean time from one end of a failure to the next failure, of each silo by "
        "itself (exponential); none by default.",
    )
    mean_down_s: Rate = Field(default=600.0, description="Mean length of a failure (exponential).")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the failures drawn.")
    trace: LocalPath | None = Field(
        default=None, description="CSV file of failures instead: silo,down_s,up_s in each line."
    )
    asked: Literal["up", "all"] = Field(
        default="up",
        description="Who is drawn for a round: those that are up when it begins, or all, as where "
        "nobody can go on without everybody.",
    )


class ClockConfig(Section):
    """A whole clock.toml."""

    silos: dict[str, SiloClock] = Field(default_factory=dict)
    failures: FailureClock = FailureClock()
    merge_s: Seconds = Field(default=0.0, description="What the aggregator takes for a step.")
    until_s: Rate | None = Field(
        default=None, description="No round begins after this; federation.rounds by default."
    )
    time_only: bool = Field(
        default=False,
        description="Nothing is trained: for large studies of time. The silos are those named "
        "here, and a model of `parameters` is sent.",
    )
    parameters: Annotated[int, Field(ge=1)] = Field(
        default=125_000_000, description="Of the model, where time_only."
    )

    def of(self, silo: str) -> SiloClock:
        """A silo's own, or that of all others."""
        return self.silos.get(silo) or self.silos.get("*") or SiloClock()
