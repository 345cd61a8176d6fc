"""node.toml: what only the site decides. It beats whatever a run asks for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from photon.config.addresses import network_or_host
from photon.config.compute import ComputeConfig, PowerConfig
from photon.config.privacy import LEAST_SUMMED
from photon.config.section import LocalPath, Positive, Section
from photon.config.watch import WatchConfig


class NodeDataConfig(Section):
    """[data]: the site's text. It is read here and never leaves."""

    path: LocalPath = Field(
        description="Folder made by `photon data prepare`; relative to the current directory."
    )
    silo: str | None = Field(
        default=None,
        description="Which silo of that folder is this site's; by default the one that is called "
        "as the site is, or the only one.",
    )


class PolicyConfig(Section):
    """[policy]: which runs this site takes part in. What a run asks beyond it is refused."""

    runs: list[str] = Field(
        default=["*"],
        description='Runs whose name matches one of these shell patterns, for instance ["med-*"].',
    )
    peers: list[str] = Field(
        default=["*"],
        description="Every other silo of a run must match one of these shell patterns.",
    )
    min_participants: Positive = Field(
        default=1,
        description="Fewest silos whose updates a round merges. Of two, each can compute the "
        "other's update exactly; 3 is the least at which none can.",
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Take part in runs alone whose aggregator sees sums of updates, and none of "
        "them; needs min_participants of 3 or more.",
    )
    pins: dict[str, Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]] = Field(
        default_factory=dict,
        description="Fingerprints of the other silos' keys, as these silos say them: for secure "
        "aggregation with no other, and with no other key. Without any it holds against an honest "
        "operator only, whose word it is who the others are.",
    )
    evaluate: Literal["always", "once", "never"] = Field(
        default="once",
        description="Whether the aggregator may have states scored on this site's held-out text: "
        "one state a round, any number, or none. Scores of states that were made up for it say "
        "something of that text.",
    )
    max_rounds: Positive | None = Field(
        default=None, description="Most rounds of a run: each says a little more of the text."
    )
    max_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Refuse runs without differential privacy, and tasks with which this site's "
        "text would have spent more than this over all its runs, at the run's privacy.delta or "
        "1e-5, whichever is less; docs/privacy.md.",
    )
    max_local_steps: Positive | None = Field(
        default=None, description="Most optimizer steps that one task may ask for."
    )
    max_parameters: Positive | None = Field(
        default=None, description="Most parameters of a model that is trained here."
    )
    model_paths: list[str] = Field(
        default_factory=list,
        description="Values of model.path that runs may name, as shell patterns: folders of this "
        "site, or hf:OWNER/NAME on the Hugging Face hub. None by default: a run can't make this "
        "site read or download anything.",
    )
    trust_tokenizer: str | None = Field(
        default=None,
        description="sha256 of the only tokenizer.json that runs may use; the data's by default.",
    )

    @model_validator(mode="after")
    def _sums_of_three(self) -> PolicyConfig:
        if self.secure_aggregation and self.min_participants < LEAST_SUMMED:
            raise ValueError(
                f"secure_aggregation = true needs min_participants of {LEAST_SUMMED} or more "
                f"(found {self.min_participants}): of a sum of two, each silo knows both updates"
            )
        return self


class NetworkConfig(Section):
    """[network]: how this site's link is used."""

    mbit_per_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Cap over both directions, in Mbit/s; none by default."
    )
    streams: Annotated[int, Field(ge=1, le=64)] = Field(
        default=8, description="Connections that move model state at once."
    )
    silence_s: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="A transfer is given up when no byte moved for so many seconds."
    )
    allow_private_addresses: list[str] = Field(
        default_factory=list,
        description="Where a store that the aggregator names may lie inside this site's own "
        'network or machine: ranges, addresses or host names, for instance ["10.1.0.0/16", '
        '"minio.hospital.example.org"]. None by default; the aggregator itself needs no entry.',
    )

    @field_validator("allow_private_addresses")
    @classmethod
    def _ranges(cls, entries: list[str]) -> list[str]:
        return [str(network_or_host(entry)) for entry in entries]


class DiskConfig(Section):
    """[disk]: room for what is kept between rounds."""

    min_free_gib: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Refuse tasks once so little disk is free under the node's home."
    )
    keep_answers: Positive = Field(
        default=2,
        description="Finished tasks kept, updates and all: asked for again, none is trained again.",
    )


class GatewayConfig(Section):
    """[gateway]: a site whose GPUs are on another machine than its way out."""

    folder: LocalPath | None = Field(
        default=None,
        description="Folder that both machines share: `photon join --gateway` dials out and has "
        "the key, `photon join --trainer` works in this folder and needs no network.",
    )
    wait_s: Annotated[float, Field(gt=0)] = Field(
        default=3600.0,
        description="A question is kept open for so long after the last trainer was here, within "
        "its own deadline; then the aggregator goes on without this site.",
    )


class NodeConfig(Section):
    """A whole node.toml."""

    data: NodeDataConfig
    compute: ComputeConfig = ComputeConfig()
    policy: PolicyConfig = PolicyConfig()
    network: NetworkConfig = NetworkConfig()
    disk: DiskConfig = DiskConfig()
    watch: WatchConfig = WatchConfig()
    energy: PowerConfig = PowerConfig()
    gateway: GatewayConfig = GatewayConfig()
