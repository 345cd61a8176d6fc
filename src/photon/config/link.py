"""[link]: how updates and states are encoded and cut."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from photon.config.codecs import parse_codec
from photon.config.section import Section

#: Stages that only round values; what they leave out is not worth keeping.
_ROUNDING = {"fp32", "bf16", "fp16", "zstd"}
#: Stages that make sense of weights themselves, not only of deltas.
_OF_WEIGHTS = {*_ROUNDING, "lowrank"}


def _known(spec: str) -> str:
    if parse_codec(spec).values.name == "ring":
        raise ValueError("ring is how masked updates travel: privacy.secure_aggregation = true")
    return spec


CodecText = Annotated[str, AfterValidator(_known)]


class LinkConfig(Section):
    """[link]: bytes between nodes and aggregator."""

    update_codec: CodecText = Field(
        default="fp32",
        description="How updates are encoded: one codec, or stages joined by +, for instance "
        '"int8", "bf16+zstd", "topk(density=0.02)+int8+zstd", "sparseloco". docs/codecs.md lists '
        "them.",
    )
    broadcast_codec: CodecText = Field(
        default="fp32",
        description="How the aggregator's states are encoded. Lossless ones carry the whole state; "
        "with a lossy one, nodes that took part in the round before get the encoded outer update "
        "only, and what it leaves out goes into the next.",
    )
    error_feedback: bool | None = Field(
        default=None,
        description="Add to each update what the codec left out of the silo's earlier ones; by "
        "default with every codec that does more than round to 16 bits.",
    )
    feedback_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.95,
        description="Share of what was left out that is kept from round to round, those that a "
        "silo takes no part in included; 1 keeps all of it, however old.",
    )
    chunk_mib: Annotated[int, Field(ge=4, le=64)] = Field(
        default=16, description="Size of the objects that an update or state is cut into, in MiB."
    )

    @field_validator("broadcast_codec")
    @classmethod
    def _same_everywhere(cls, spec: str) -> str:
        factors = _stages(spec) & {"lowrank", "powersgd"}
        if factors:
            raise ValueError(
                f"{spec!r} can't be broadcast: the product of {factors.pop()}'s factors is rounded "
                "otherwise on other machines, and all must hold the same state; use int8, int4, "
                "fp4, sign, topk or sparseloco, or one of fp32, bf16, fp16, each with or without "
                "zstd"
            )
        return spec

    @property
    def feeds_back(self) -> bool:
        """Whether nodes keep what the codec leaves out."""
        if self.error_feedback is not None:
            return self.error_feedback and not _stages(self.update_codec) <= {"fp32", "zstd"}
        return not _stages(self.update_codec) <= _ROUNDING

    @property
    def lossy_broadcast(self) -> bool:
        """Whether nodes are sent outer updates, and the aggregator keeps what these leave out."""
        return not _stages(self.broadcast_codec) <= {"fp32", "zstd"}

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_mib << 20

    @property
    def update_spec(self) -> str:
        """`update_codec` with every parameter written out, as manifests have it."""
        return str(parse_codec(self.update_codec))

    @property
    def broadcast_spec(self) -> str:
        """`broadcast_codec` with every parameter written out."""
        return str(parse_codec(self.broadcast_codec))

    @property
    def whole_state_spec(self) -> str:
        """How whole states travel: without loss, through zstd if the broadcast goes through it."""
        zstd = parse_codec(self.broadcast_codec).zstd
        return "fp32" if zstd is None else f"fp32+{zstd}"

    @property
    def specs(self) -> frozenset[str]:
        """Every codec that a manifest of this run may name."""
        return frozenset({"fp32", self.update_spec, self.broadcast_spec, self.whole_state_spec})

    @property
    def takes_weights(self) -> bool:
        """Whether updates may be weights instead of deltas."""
        return _stages(self.update_codec) <= _OF_WEIGHTS and not self.error_feedback


def _stages(spec: str) -> set[str]:
    return {stage.name for stage in parse_codec(spec)}
