"""How model state moves: parcels of encoded tensors in stores, and files of tensors on disk."""

from photon.link.entryfile import EntryFile
from photon.link.manifest import Expected, Header, Ref
from photon.link.parcel import (
    Carrier,
    Entry,
    Parcel,
    entries_bytes,
    plain_bytes,
    plain_entries,
    write_parcel,
)
from photon.link.tensorfile import TensorFile, tensors_sha256, write_tensors

__all__ = [
    "Carrier",
    "Entry",
    "EntryFile",
    "Expected",
    "Header",
    "Parcel",
    "Ref",
    "TensorFile",
    "entries_bytes",
    "plain_bytes",
    "plain_entries",
    "tensors_sha256",
    "write_parcel",
    "write_tensors",
]
