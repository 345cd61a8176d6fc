"""Updates in fewer bytes: codecs on single tensors, pure maths."""

from photon.compression.build import build_codec
from photon.compression.codec import Codec, Parts

__all__ = [
    "Codec",
    "Parts",
    "build_codec",
]
