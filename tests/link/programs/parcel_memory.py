"""Write and read a parcel of 40 x 16 MB; print by how much each raised this process's peak."""

import json
import sys
from pathlib import Path

import torch

from photon.freed_memory import share_freed_memory
from photon.link import Expected, Header, Parcel, plain_entries, write_parcel
from photon.store.contract import FolderStore
from photon.store.transfer import Transfer


def peak_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def tensors():
    for name in SHAPES:
        yield name, torch.full(SHAPES[name], 0.5)


SHAPES = {f"layer-{number}": (2000, 2000) for number in range(40)}
HEADER = Header(kind="update", run="a", round=1, silo="red", model="m")
share_freed_memory()
carrier = Transfer(FolderStore(Path(sys.argv[1]), durable=False), streams=4)
before = peak_mb()
# Every tensor is the same: written to the disk once, and 640 MB all the same.
ref = write_parcel(carrier, "x", HEADER, plain_entries(tensors()))
written = peak_mb()
expected = Expected(HEADER, SHAPES, frozenset({"fp32"}))
for _, tensor in Parcel(carrier, ref, expected).tensors():
    assert float(tensor[0, 0]) == 0.5
read = peak_mb()
print(
    json.dumps(
        {
            "payload_mb": ref.payload_bytes / 1e6,
            "write_mb": written - before,
            "read_mb": read - before,
        }
    )
)
