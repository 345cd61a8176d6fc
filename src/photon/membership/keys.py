"""A node's key: made on the node, never leaves it, and everything the node says is signed with it.

One key on the curve P-384, in a file of OpenSSH's format. The aggregator has such a key too.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from photon.errors import DiskFullError, MembershipError, SignatureError
from photon.store.disk import write_new

#: The aggregator's key, in its home.
AGGREGATOR_KEY_FILE = "aggregator.key"

#: A P-384 key takes 215 characters as PEM, its signature at most 104 bytes; others are not parsed.
_MOST_PEM_CHARACTERS = 2000
_MOST_SIGNATURE_CHARACTERS = 200

#: Photon's own signatures are over SHA-256; those of OpenSSF model-signing over SHA-384.
_ECDSA = {256: ec.ECDSA(hashes.SHA256()), 384: ec.ECDSA(hashes.SHA384())}

#: What a key is called.
FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


class NodeKey:
    """A private key. `create` and `load` make one; there is no other way to hold one.

    Attributes:
        public_pem: its public half, PEM text (SubjectPublicKeyInfo).
        fingerprint: names it, "sha256:" and 64 hexadecimal digits.
    """

    def __init__(self, private: ec.EllipticCurvePrivateKey) -> None:
        self._private = private
        self.public_pem = _pem(private.public_key())
        self.fingerprint = fingerprint_of(self.public_pem)

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> NodeKey:
        """Make a key and write it, OpenSSH's format, readable by its owner only.

        A crash leaves either the whole file or none.

        Raises:
            MembershipError: there is a file already, or it can't be written.
        """
        path = Path(path)
        key = cls(ec.generate_private_key(ec.SECP384R1()))
        text = key._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise MembershipError(f"can't write the key {path}: {error}") from error
        try:
            write_new(path, text, "a key", mode=0o600)
        except FileExistsError:
            raise MembershipError(
                f"there is a key at {path} already; it is not replaced",
                hint="A node keeps its key. To change it, join with a rotation invitation "
                "(`photon members rotate NAME` on the aggregator), or choose another --home.",
            ) from None
        except (OSError, DiskFullError) as error:
            raise MembershipError(f"can't write the key {path}: {error}") from error
        return key

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NodeKey:
        """Read a key.

        Raises:
            MembershipError: no such file, not such a key, or others may read it.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o7777
                data = file.read(20_000)
        except FileNotFoundError:
            raise MembershipError(
                f"no key at {path}",
                hint="A node gets one when it joins: `photon join --invite FILE`.",
            ) from None
        except OSError as error:
            raise MembershipError(f"can't read the key {path}: {error}") from error
        if mode & 0o077:
            raise MembershipError(
                f"the key {path} may be read or changed by others (mode {mode:04o}; 0600 is right)",
                hint=f"`chmod 600 {path}`; if somebody may have copied it, ask the aggregator's "
                "operator for a rotation invitation.",
            )
        try:
            private = serialization.load_ssh_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise MembershipError(
                f"{path} is no OpenSSH private key without a passphrase: {error}",
                hint="Restore it from a backup, or join again with a new invitation.",
            ) from error
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name != "secp384r1":
            raise MembershipError(
                f"{path} is a key of another kind; nodes have EC keys on the curve P-384",
                hint="Join with a new invitation and another --home: it makes the right key.",
            )
        return cls(private)

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> NodeKey:
        """The key at a path, made there if it is missing; of several that make it, one does.

        Raises:
            MembershipError: see `load`, and `create`.
        """
        if not Path(path).exists():
            try:
                return cls.create(path)
            except MembershipError:
                if not Path(path).exists():
                    raise
        return cls.load(path)

    def sign(self, data: bytes, sha: Literal[256, 384] = 256) -> str:
        """ECDSA over SHA-256 or SHA-384, DER, as base64.

        Use `signing.sign_document`: a bare signature does not say what it was made for.
        """
        return base64.b64encode(self._private.sign(data, _ECDSA[sha])).decode()

    def encrypted_pem(self, passphrase: str) -> bytes:
        """The private key for a TLS library that reads keys from files only.

        What TLS signs begins otherwise than all that `sign_document` and `sign_request` do.
        """
        return self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase.encode()),
        )


def verify(public_pem: str, data: bytes, signature: str, sha: Literal[256, 384] = 256) -> None:
    """Check a signature of `NodeKey.sign`.

    Raises:
        SignatureError: it is not that key's over these bytes, or none at all.
        MembershipError: the key is no P-384 public key.
    """
    public = _public(public_pem)
    try:
        if len(signature) > _MOST_SIGNATURE_CHARACTERS:
            raise ValueError
        public.verify(base64.b64decode(signature, validate=True), data, _ECDSA[sha])
    except (InvalidSignature, ValueError, binascii.Error):
        raise SignatureError(
            f"the signature over {len(data)} bytes is not that of key {fingerprint_of(public_pem)}",
            hint="Nothing of it is used.",
        ) from None


def canonical_pem(public_pem: str) -> str:
    """The same key, written in the one way in which it is stored and compared.

    Raises:
        MembershipError: it is no P-384 public key.
    """
    return _pem(_public(public_pem))


def fingerprint_of(public_pem: str) -> str:
    """Names the key: "sha256:" and the sha256 of its DER form (SubjectPublicKeyInfo), hexadecimal.

    Raises:
        MembershipError: it is no P-384 public key.
    """
    der = _public(public_pem).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return "sha256:" + hashlib.sha256(der).hexdigest()


@functools.lru_cache(4096)  # a request of a member is not to cost another millisecond
def _public(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        if len(pem) > _MOST_PEM_CHARACTERS:
            raise ValueError(f"{len(pem)} characters")
        public = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MembershipError(f"no public key in PEM: {str(error)[:200]}") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp384r1":
        raise MembershipError("a public key of another kind; nodes have EC keys on the curve P-384")
    return public


def _pem(public: ec.EllipticCurvePublicKey) -> str:
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()
