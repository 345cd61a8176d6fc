"""[serve] and [comply]: what the aggregator's host decides. None of it is sent to silos."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from photon.config.addresses import host_name
from photon.config.children import ChildConfig
from photon.config.section import LocalPath, Positive, Section
from photon.config.watch import LogForm, Metrics, MetricsOpen, closed_unless_said

_LISTEN = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[^:\s/]+):(\d{1,5})$")


class ServeConfig(Section):
    """[serve]: `photon serve`, the aggregator's host: addresses, store, who is waited for."""

    listen: str = Field(
        default="0.0.0.0:8443",
        description="Address and port of the one public door; everything else is on loopback.",
    )
    host: str | None = Field(
        default=None,
        description="Name or address by which silos reach this machine, as certificates and "
        "invitations have it, without scheme, port or path; the machine's own name by default.",
    )
    public_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port that silos dial, where a router forwards another one than listen's.",
    )
    home: LocalPath = Field(
        default="photon-server",
        description="Folder of what outlives runs: certificates, members, logs, the embedded "
        "store. Relative to the current directory.",
    )
    certificate: LocalPath | None = Field(
        default=None,
        description="PEM file of a certificate for the door, with its chain; made by Photon's own "
        "authority by default.",
    )
    key: LocalPath | None = Field(
        default=None, description="PEM file of the certificate's private key."
    )
    ca: LocalPath | None = Field(
        default=None,
        description="PEM file of the authority that signed the certificate; its fingerprint goes "
        "into invitations. Needed with certificate.",
    )
    store: str | None = Field(
        default=None,
        description='Where updates and states lie: "s3://bucket/folder", "gs://..." or "az://...", '
        "credentials and AWS_ENDPOINT_URL from the environment. By default SeaweedFS is started "
        "here, behind the door.",
    )
    control: Literal["desk", "flower"] = Field(
        default="desk",
        description="Who carries Asks and Replies: the desk behind the door, or a Flower "
        "federation of yours (docs/flower.md). All else goes to the door.",
    )
    silos: list[str] = Field(
        default_factory=list,
        description="Members that take part; every active one by default.",
    )
    min_silos: Positive = Field(
        default=1,
        description="A round begins once so many silos are here (and federation.quorum, "
        "federation.sample).",
    )
    gather_s: Annotated[float, Field(gt=0)] = Field(
        default=86_400.0,
        description="Seconds that serve waits for min_silos, or draws a round again that loses its "
        "quorum, before it gives up.",
    )
    grant_s: Annotated[int, Field(ge=60, le=604_800)] = Field(
        default=300,
        description="Seconds that a presigned URL is valid. A transfer that began goes on, and "
        "silos ask for new ones. In a store of your own, whoever is expelled can use those it has "
        "for as long; the door refuses them at once.",
    )
    keep_rounds: Positive = Field(
        default=2, description="Rounds whose states and updates stay in the store."
    )
    min_free_gib: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="The embedded store takes no more once so little disk is free."
    )
    metrics: Metrics = None
    metrics_open: MetricsOpen = False
    log: LogForm = "text"

    _closed = model_validator(mode="after")(closed_unless_said)

    parent: LocalPath | None = Field(
        default=None,
        description="Of a federation inside another: the node file by which it is a member there. "
        "`photon serve --parent` sets it.",
    )
    child: ChildConfig | None = Field(
        default=None,
        description="What it is like there, as [federation.children.NAME]. Photon writes it, from "
        "the federation's own file.",
    )

    @field_validator("listen")
    @classmethod
    def _address(cls, listen: str) -> str:
        found = _LISTEN.match(listen)
        if found is None or not 1 <= int(found[2]) <= 65535:
            raise ValueError(f"{listen!r} is not ADDRESS:PORT, for instance 0.0.0.0:8443")
        return listen

    @field_validator("host")
    @classmethod
    def _host(cls, host: str | None) -> str | None:
        return host if host is None else host_name(host)

    @model_validator(mode="after")
    def _whole_certificate(self) -> ServeConfig:
        given = {"certificate": self.certificate, "key": self.key, "ca": self.ca}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(
                f"a certificate of your own needs certificate, key and ca; {', '.join(missing)} "
                "is missing"
            )
        return self

    @property
    def port(self) -> int:
        """Of the door on this machine."""
        return int(self.listen.rpartition(":")[2])

    @property
    def address(self) -> str:
        """On which the door listens, without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")


class ComplyConfig(Section):
    """[comply]. docs/cards.md says how; a prediction, not legal advice."""

    cards: LocalPath | None = Field(
        default=None,
        description="Folder with the cards: project.toml, data/SILO.toml, models/NAME.toml "
        "(`photon cards init DIR --run-file RUN.toml` writes them). `photon serve` predicts from "
        "them whenever members or cards change, and logs what changed. None: RUN/cards, and "
        "`photon serve` does not look at it.",
    )
    require: Literal["met", "unknown", "not_met"] | None = Field(
        default=None,
        description="The worst verdict that is put up with (out_of_scope is better than met; worst "
        "is prohibited). A run does not start on a worse one, and a member with whom it would be "
        "worse takes no part.",
    )
    law: LocalPath | None = Field(
        default=None,
        description="A law file of the federation's own; None: the EU's AI Act as Photon has it.",
    )

    @model_validator(mode="after")
    def _whole(self) -> ComplyConfig:
        if self.cards is None and (self.require is not None or self.law is not None):
            raise ValueError("require and law need cards, the folder to predict from")
        return self
