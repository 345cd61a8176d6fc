"""Updates in fewer bytes: codecs on single tensors, pure maths."""

from photon.compression.blockwise import Blockwise, Fp4, Int4, Int8, Sign
from photon.compression.casts import Bf16, Fp16, Fp32
from photon.compression.codec import Codec, Parts, bytes_of

#: By name.
CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Fp32, Bf16, Fp16, Int8, Int4, Fp4, Sign)
}

__all__ = [
    "CODECS",
    "Bf16",
    "Blockwise",
    "Codec",
    "Fp4",
    "Fp16",
    "Fp32",
    "Int4",
    "Int8",
    "Parts",
    "Sign",
    "bytes_of",
]
