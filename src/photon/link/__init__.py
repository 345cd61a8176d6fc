"""How model state moves: named tensors in files that are written whole or not at all."""

from photon.link.tensorfile import (
    TensorFile,
    fingerprint,
    read_tensors,
    require_disk,
    tensors_sha256,
    write_tensors,
)

__all__ = [
    "TensorFile",
    "fingerprint",
    "read_tensors",
    "require_disk",
    "tensors_sha256",
    "write_tensors",
]
