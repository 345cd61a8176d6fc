"""Updates in fewer bytes: codecs on single tensors, pure maths."""

from photon.compression.blockwise import Fp4, Int4, Int8, Sign
from photon.compression.build import CODECS, build_codec, spec_of
from photon.compression.casts import Bf16, Fp32
from photon.compression.codec import Codec, Parts, bytes_of
from photon.compression.low_rank import LowRank, PowerSGD
from photon.compression.sparseloco import SparseLoco
from photon.compression.topk import TopK
from photon.compression.zstd import Zstd

__all__ = [
    "CODECS",
    "Bf16",
    "Codec",
    "Fp4",
    "Fp32",
    "Int4",
    "Int8",
    "LowRank",
    "Parts",
    "PowerSGD",
    "Sign",
    "SparseLoco",
    "TopK",
    "Zstd",
    "build_codec",
    "bytes_of",
    "spec_of",
]
