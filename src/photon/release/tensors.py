"""The log's hash of a model's weights, from safetensors files, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

#: safetensors says F32 where torch says float32.
_KINDS = {"F": "float", "I": "int", "U": "uint", "B": "bool"}


def weights_sha256(
    files: Collection[Path], prefix: str = "", without: Collection[str] = ()
) -> tuple[str, set[str]]:
    """As photon.link.tensors_sha256 of the tensors in all files, and their names.

    Names with that prefix count; it is taken off. ValueError: a file can't be read, or holds
    what this hash is not made for.
    """
    digest, found = hashlib.sha256(), dict[str, tuple[Any, str]]()
    try:
        for path in files:
            file: Any = safe_open(path, framework="numpy")
            mine = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): (file, name) for name in mine}
        names = found.keys() - set(without)
        for name in sorted(names):
            file, full = found[name]
            told, values = file.get_slice(full), file.get_tensor(full)
            kind = _KINDS[told.get_dtype()[0]] + told.get_dtype().lstrip("FIUBOL")
            digest.update(f"{name} torch.{kind} {tuple(told.get_shape())}\n".encode())
            digest.update(values.reshape(-1).data)
    except (OSError, SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"the weights can't be read: {error}") from error
    return digest.hexdigest(), names
