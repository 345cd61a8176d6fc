"""Codecs from their specs (the grammar is photon.config.codecs')."""

from __future__ import annotations

from photon.compression.blockwise import Fp4, Int4, Int8, Sign
from photon.compression.casts import Bf16, Fp16, Fp32
from photon.compression.codec import Codec
from photon.compression.low_rank import LowRank, PowerSGD
from photon.compression.ring import Ring
from photon.compression.sparseloco import SparseLoco
from photon.compression.topk import TopK
from photon.compression.zstd import Zstd
from photon.config.codecs import CodecSpec, StageSpec, parse_codec
from photon.errors import PluginError
from photon.plugins import CODECS as GROUP
from photon.plugins import load_plugin

#: By name.
CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (
        Fp32,
        Bf16,
        Fp16,
        Int8,
        Int4,
        Fp4,
        Sign,
        SparseLoco,
        TopK,
        LowRank,
        PowerSGD,
        Ring,
        Zstd,
    )
}


def build_codec(spec: str | CodecSpec) -> Codec:
    """The codec that a spec describes, for instance "topk(density=0.02)+int8+zstd".

    Raises:
        ValueError: the spec is wrong, or a plugin refuses its parameters; says what is allowed.
        PluginError: a plugin can't be loaded, or is not what its entry point promises.
    """
    found = parse_codec(spec) if isinstance(spec, str) else spec
    codec = _values(found.values)
    for stage in (found.structure, found.zstd):
        if stage is not None:
            codec = CODECS[stage.name](**{"inner": codec, **stage.parameters})
    return codec


def _values(stage: StageSpec) -> Codec:
    if not stage.plugin:
        return CODECS[stage.name](**stage.parameters)
    kind = load_plugin(GROUP, stage.name, Codec)
    if getattr(kind, "name", None) != stage.name:
        raise PluginError(
            f"plugin {stage.name!r} of group {GROUP!r} calls itself "
            f"{getattr(kind, 'name', None)!r}; entry point and `name` must agree"
        )
    try:
        return kind(**stage.parameters)
    except TypeError as error:
        raise ValueError(f"codec {stage.name}: {error}") from error
