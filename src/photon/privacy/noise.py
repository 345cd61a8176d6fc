"""Gaussian noise of a node's own: from a secret that never leaves it, the same for the same key."""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import secrets
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Size, Tensor

from photon.errors import CheckpointCorruptError
from photon.store.disk import write_new

#: What a node's noise is drawn with, in the folder of its silos' kept states.
SECRET_FILE = "noise.key"
_SECRET_BYTES = 32
#: Values drawn at once, 32 bytes of working memory each; even.
_PIECE = 1 << 18


def node_secret(folder: Path) -> bytes:
    """What a node's noise is drawn with; made once, for its owner's eyes only.

    Raises:
        CheckpointCorruptError: the file holds something else.
        DiskFullError: no room for it.
    """
    path = folder / SECRET_FILE
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another worker of this run was faster
            secret = secrets.token_bytes(_SECRET_BYTES)
            write_new(path, secret, "the secret that noise is drawn with", mode=0o600)
    secret = path.read_bytes()
    if len(secret) != _SECRET_BYTES:
        raise CheckpointCorruptError(
            f"{path} has {len(secret)} bytes instead of {_SECRET_BYTES}",
            hint="Remove it: the node makes a new one, and other noise.",
        )
    return secret


def release_key(secret: bytes, *release: Any) -> bytes:
    """Of 32 bytes, for what is said of a release in JSON, and for nothing else."""
    return hmac.digest(secret, json.dumps(release).encode(), "sha256")


def gaussian(key: bytes, shape: Size, deviation: float) -> Tensor:
    """Independent N(0, deviation^2) in fp32: AES in counter mode, then Box and Muller.

    Not from torch's generator: on a CPU it takes 32 bits of its seed, few enough to try them all.
    The values are rounded as floating point is, which an attacker may use (Mironov, CCS 2012).

    Args:
        key: 32 bytes; the same give the same values on the same machine.
    """
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    drawn = torch.empty(shape.numel())
    for piece in (drawn[start : start + _PIECE] for start in range(0, len(drawn), _PIECE)):
        pairs = (len(piece) + 1) // 2
        words = torch.frombuffer(bytearray(stream.update(bytes(16 * pairs))), dtype=torch.int64)
        uniform = ((words & ((1 << 53) - 1)).double() + 0.5) / (1 << 53)
        radius = deviation * torch.sqrt(-2 * torch.log(uniform[:pairs]))
        angle = 2 * math.pi * uniform[pairs:]
        piece.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(piece)])
    return drawn.view(shape)
