"""How model state moves: parcels of encoded tensors in stores, and files of tensors on disk."""

from photon.link.manifest import Expected, Header, Manifest, Part, Ref, shapes_fingerprint
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
from photon.store.contract import FolderStore, Store
from photon.store.disk import file_sha256, require_disk, sync_to_disk, writing
from photon.store.garbage import Collected, collect
from photon.store.granted_store import GrantedStore, Grants
from photon.store.object_store import ObjectStore, open_store, presigner_for
from photon.store.presign import Grant, Presigner, S3Presigner
from photon.store.transfer import Sent, Transfer, Wanted

__all__ = [
    "Carrier",
    "Collected",
    "Entry",
    "Expected",
    "FolderStore",
    "Grant",
    "GrantedStore",
    "Grants",
    "Header",
    "Manifest",
    "ObjectStore",
    "Parcel",
    "Part",
    "Presigner",
    "Ref",
    "S3Presigner",
    "Sent",
    "Store",
    "TensorFile",
    "Transfer",
    "Wanted",
    "collect",
    "entries_bytes",
    "file_sha256",
    "open_store",
    "plain_bytes",
    "plain_entries",
    "presigner_for",
    "require_disk",
    "shapes_fingerprint",
    "sync_to_disk",
    "tensors_sha256",
    "write_parcel",
    "write_tensors",
    "writing",
]
