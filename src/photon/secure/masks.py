"""Keys, and the streams of numbers that masks are made of.

Two members agree on a key by X25519, HKDF makes one of it that holds for one sealing alone, and
AES-256 in counter mode draws from it: a stream for each tensor, which begins at the hash of its
name, so that they may come in any order. One member adds the stream, the other takes it away.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from photon.errors import ProtocolError

#: Words drawn at once: they stay in the processor's cache.
_PIECE = 1 << 16
_NOTHING = bytes(2 * _PIECE)

#: Words modulo 2^16: numpy's sums of them wrap around.
Words = np.ndarray[tuple[int], np.dtype[np.uint16]]


def derived(secret: bytes, *words: object, size: int = 32) -> bytes:
    """Bytes for one purpose (HKDF, RFC 5869)."""
    info = "\0".join(["photon secure aggregation", *map(str, words)]).encode()
    return HKDF(hashes.SHA256(), size, salt=None, info=info).derive(secret)


def public_of(private: bytes) -> str:
    """The public half of an X25519 key, hexadecimal."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def agreed(private: bytes, public: str, *words: object) -> bytes:
    """What two members both have, and nobody else, for one purpose.

    Raises:
        ProtocolError: the other's key is one with which everybody agrees.
    """
    theirs = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
    try:
        return derived(X25519PrivateKey.from_private_bytes(private).exchange(theirs), *words)
    except ValueError:
        raise ProtocolError(f"the key {public[:16]}... is none that keeps a secret") from None


def boxed(key: bytes, text: bytes) -> str:
    """For whoever has the key, which must hold for this text alone."""
    return base64.b64encode(ChaCha20Poly1305(key).encrypt(bytes(12), text, None)).decode()


def unboxed(key: bytes, box: str) -> bytes | None:
    """What is in it; None where it was made with another key, or changed."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), base64.b64decode(box, validate=True), None)
    except (InvalidTag, ValueError):
        return None


class Masks:
    """The streams of some keys.

    Args:
        keys: each with 1 where its stream is added, -1 where it is taken away.
    """

    def __init__(self, keys: Mapping[bytes, int]) -> None:
        nothing = modes.CTR(bytes(16))
        self._streams = [
            (Cipher(algorithms.AES(key), nothing).encryptor(), np.add if sign > 0 else np.subtract)
            for key, sign in keys.items()
        ]

    def add(self, words: Words, name: str) -> None:
        """Every key's stream for the tensor of this name, to its words, in place."""
        drawn = bytearray(2 * _PIECE + 16)
        first = hashlib.sha256(name.encode()).digest()[:8] + bytes(8)  # 2^64 blocks for each name
        for stream, combine in self._streams:
            stream.reset_nonce(first)
            for start in range(0, len(words), _PIECE):
                piece = words[start : start + _PIECE]
                stream.update_into(memoryview(_NOTHING)[: 2 * len(piece)], drawn)
                combine(piece, np.frombuffer(drawn, "<u2", len(piece)), out=piece)
