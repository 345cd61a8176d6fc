"""[outer]: what the aggregator makes of the merged update."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from photon.config.section import Positive, Section
from photon.plugins import OUTER_OPTIMIZERS, plugin_names

#: outer.lr where a run file leaves it out. Adaptive ones move a coordinate by about lr a round,
#: whatever the pseudo-gradient's size; 1 would wreck a model in its first round.
_OUTER_LR = {
    "fedavg": 1.0,
    "fedavgm": 0.1,  # Hsu et al. 2019 (arXiv 1909.06335): lr / (1 - momentum) is what counts
    "nesterov": 0.7,  # DiLoCo (arXiv 2311.08105)
    "delayed_nesterov": 0.7,
    "fedadam": 0.01,  # these three: in the middle of the grids of Reddi et al. 2021
    "fedyogi": 0.01,
    "fedadagrad": 0.03,
}
OUTER_NAMES = tuple(_OUTER_LR)


def known_name(builtin: tuple[str, ...], group: str) -> AfterValidator:
    """Of a name: one of Photon's own, or a plugin registered it in this group."""

    def known(name: str) -> str:
        # Asked last: plugins are looked for among all packages that are installed.
        if name not in builtin and name not in (plugins := plugin_names(group)):
            raise ValueError(f"{name!r} is not one of {', '.join([*builtin, *plugins])}")
        return name

    return AfterValidator(known)


class OuterConfig(Section):
    """[outer]: the aggregator's optimizer."""

    name: Annotated[str, known_name(OUTER_NAMES, OUTER_OPTIMIZERS)] = Field(
        default="fedavg", description=", ".join(OUTER_NAMES) + ", or one a plugin registered."
    )
    lr: Annotated[float, Field(gt=0, le=1e38)] = Field(
        default=None,  # pyright: ignore[reportAssignmentType]  # `_lr_by_name` puts it in
        description="Outer learning rate; by default 1 for fedavg, 0.1 for fedavgm (lr / (1 - "
        "momentum) is then 1), 0.7 for nesterov (DiLoCo), 0.01 for fedadam and fedyogi, 0.03 for "
        "fedadagrad (from the grids of Reddi et al. 2021), 1 for a plugin's.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Momentum of fedavgm, nesterov and delayed_nesterov."
    )
    delay: Positive = Field(
        default=4,
        description="Of delayed_nesterov, for buffered rounds: merges between two steps of its "
        "momentum, about as many as bring one update of each silo.",
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="First-moment decay of fedadam, fedyogi, fedadagrad."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="Second-moment decay of fedadam, fedyogi."
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(
        default=1e-3, description="Adaptivity tau of Reddi et al. 2021: added to the root of v."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Passed as they are to a plugin's outer optimizer."
    )

    @model_validator(mode="before")
    @classmethod
    def _lr_by_name(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("lr") is None:
            name = table.get("name", OUTER_NAMES[0])
            return {**table, "lr": _OUTER_LR.get(name, 1.0) if isinstance(name, str) else 1.0}
        return table
