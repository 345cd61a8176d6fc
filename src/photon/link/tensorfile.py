"""Files of named tensors (safetensors), whole or absent, read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from photon.errors import CheckpointCorruptError
from photon.store.disk import sync_to_disk, writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, durable: bool = True) -> int:
    """Write tensors to `path` through a sibling that is renamed when complete.

    Args:
        tensors: by name; any device, moved to CPU and made contiguous.
        durable: also wait until the disk has it (a power cut can't undo it).

    Returns:
        Payload bytes: the sum of the tensors' sizes, without the header.

    Raises:
        DiskFullError: no room; the partial file is removed.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing("tensors", path):
            save_file(ready, partial)
            if durable:
                sync_to_disk(partial)
            partial.replace(path)
            if durable:
                sync_to_disk(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return sum(tensor.nbytes for tensor in ready.values())


class TensorFile:
    """A tensor file open for reading; one tensor is in memory at a time.

    Raises:
        CheckpointCorruptError: the file is missing, truncated or not a tensor file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointCorruptError(f"can't read tensor file {path}: {error}") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file = None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._file.keys():  # noqa: SIM118 - not a mapping
            yield name, self._file.get_tensor(name)

    def sha256(self, prefix: str = "") -> str:
        """As `tensors_sha256` of what is in it: of names with a prefix, which is taken off."""
        found = sorted(name for name in self.names() if name.startswith(prefix))
        return stream_sha256(
            (name.removeprefix(prefix), self._file.get_tensor(name)) for name in found
        )

    def read(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own (the file may go away afterwards)."""
        return {name: tensor.clone() for name, tensor in self.named_tensors()}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and raw bytes, in the order of names."""
    return stream_sha256((name, tensors[name]) for name in sorted(tensors))


def stream_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """As `tensors_sha256`, in the order in which they come, one in memory at a time."""
    digest = hashlib.sha256()
    for name, found in tensors:
        tensor = found.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
