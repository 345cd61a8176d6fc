"""[watch], and the same keys of [serve]: how an operator's own tools look in."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from photon.config.addresses import host_and_port, joined
from photon.config.section import Section

_S = TypeVar("_S")

Metrics = Annotated[
    Annotated[str, AfterValidator(lambda text: joined(*host_and_port(text)))] | None,
    Field(
        description='Address and port of /metrics for Prometheus, for instance "127.0.0.1:9464"; '
        "none by default."
    ),
]
MetricsOpen = Annotated[
    bool,
    Field(
        description="Lets metrics be an address that other machines reach. It has no password: "
        "whoever reaches it reads silos' names and the run's figures."
    ),
]
LogForm = Annotated[
    Literal["text", "json"],
    Field(
        description='"json" writes each line of the readable log again, to a file beside it that '
        "ends in .jsonl: an object with at (RFC 3339, UTC), service and text."
    ),
]


def closed_unless_said(section: _S) -> _S:
    """Refuse an address of metrics that others reach, unless metrics_open allows it.

    Raises:
        ValueError: as said.
    """
    given: Any = section
    if given.metrics is not None and not given.metrics_open:
        host, _ = host_and_port(given.metrics)
        try:
            own = ipaddress.ip_address(host).is_loopback
        except ValueError:
            own = host == "localhost"
        if not own:
            raise ValueError(
                f"metrics = {given.metrics!r} can be read from other machines; use 127.0.0.1, or "
                "say metrics_open = true"
            )
    return section


class WatchConfig(Section):
    """[watch]: how this site's own tools look at its node."""

    metrics: Metrics = None
    metrics_open: MetricsOpen = False
    log: LogForm = "text"

    _closed = model_validator(mode="after")(closed_unless_said)
