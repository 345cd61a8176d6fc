"""The keys of [energy]: watts where no counter can be read, and what else figures are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from photon.config.section import Section

Amount = Annotated[float, Field(ge=0, le=1e5)]


class PowerConfig(Section):
    """[energy]: what a site's machines draw. docs/energy.md says where defaults are from."""

    core_busy_w: Amount = Field(
        default=3.5, description="Watts of a logical core at work, with its share of the server."
    )
    core_idle_w: Amount = Field(default=0.74, description="Watts of one that waits.")
    device_busy_w: Amount = Field(
        default=407.0, description="Watts of a GPU that trains or scores, where it can't be asked."
    )
    device_idle_w: Amount = Field(default=46.0, description="Watts of one that waits.")


class EnergyConfig(PowerConfig):
    """[energy]: what machines draw where no counter can be read; docs/energy.md."""

    network_kwh_per_gb: Amount = Field(
        default=0.001, description="kWh that networks take for 1e9 bytes; always modelled."
    )
    carbon_g_per_kwh: Amount | None = Field(
        default=None, description="Grams of CO2 equivalent a kWh; without it none is claimed."
    )
