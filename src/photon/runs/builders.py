"""What each kind of run is made of: the engine that reaches its silos, and who they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.config import RunConfig
from photon.config.children import participants
from photon.config.clock import ClockConfig
from photon.engines.groups import with_groups
from photon.engines.simulated import SimulatedEngine, SimulatedFleet
from photon.federation import Engine, FixedFleet, Fleet, RunState
from photon.runs.nodes import CENTRALISED
from photon.telemetry import Event


@dataclass(frozen=True)
class Built:
    """A run's parts.

    Attributes:
        config: the run file as its federation reads it.
        pooled: see Federation.
        options: of Rounds.
    """

    config: RunConfig
    engine: Engine
    fleet: Fleet
    pooled: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)


def simulation(
    config: RunConfig,
    engine: Engine,
    silo_tokens: Mapping[str, int],
    folder: Path,
    on_event: Callable[[Event], None],
    clock: ClockConfig | None,
    state: RunState,
) -> Built:
    """All silos on this machine; with a clock, on simulated time.

    Args:
        engine: reaches them.
        silo_tokens: to train on, by silo of the data.
        folder: of the run.
        state: the run so far.
    """
    tokens = participants(config.federation.children, silo_tokens)
    if clock is None:
        fleet = FixedFleet(tokens, scored=sorted(silo_tokens))
        groups = with_groups(engine, config, silo_tokens, folder / "nodes", on_event)
        return Built(config, groups, fleet)
    silos = sorted(tokens)
    simulated = SimulatedEngine(engine, clock, silos, folder / "arrivals", state.clock)
    needed = config.federation.sample or config.quorum_of(len(silos))
    fleet = SimulatedFleet(dict(tokens), needed, simulated, clock)
    options = {"ended": fleet.ended, "clock": simulated.clock}
    return Built(config, simulated, fleet, options=options)


def centralised(
    config: RunConfig, engine: Engine, silo_tokens: Mapping[str, int], *, scored: Sequence[str]
) -> Built:
    """One participant on the pooled text of some silos: the baseline.

    Args:
        config: from `central_config`.
        scored: the silos on whose held-out text its versions are scored.
    """
    fleet = FixedFleet({CENTRALISED: sum(silo_tokens.values())}, scored=scored)
    return Built(config, engine, fleet, pooled=sorted(silo_tokens))


def served(config: RunConfig, engine: Engine, fleet: Fleet, ending: Callable[[], bool]) -> Built:
    """Silos elsewhere.

    Args:
        ending: whether no further round is to begin.
    """
    return Built(config, engine, fleet, options={"draining": ending})
