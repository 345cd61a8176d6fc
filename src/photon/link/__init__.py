"""How model state moves: named tensors in files that are written whole or not at all."""

from photon.link.tensorfile import (
    TensorFile,
    file_sha256,
    require_disk,
    sync_to_disk,
    tensors_sha256,
    write_tensors,
    writing,
)

__all__ = [
    "TensorFile",
    "file_sha256",
    "require_disk",
    "sync_to_disk",
    "tensors_sha256",
    "write_tensors",
    "writing",
]
