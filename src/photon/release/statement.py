"""The signature of a folder, in the format of OpenSSF model-signing 1.0 (model.sig).

A Sigstore bundle around a DSSE envelope around an in-toto statement of every file's sha256, signed
with a key (ECDSA P-384 over SHA-384); `model_signing verify key` accepts it. That package brings
Sigstore's client, 70 MB in 36 packages, of which a key needs nothing. There is one way to write a
bundle here, so no byte of one can change unnoticed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping

from photon.errors import SignatureError
from photon.membership.keys import NodeKey, verify

SIGNATURE_FILE = "model.sig"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"


def sign_files(key: NodeKey, name: str, digests: Mapping[str, str]) -> bytes:
    """A bundle for a model of that name; digests are path -> sha256, of all files but itself."""
    payload = _statement(name, digests)
    return _bundle(key.public_pem, payload, key.sign(_pae(payload), 384))


def signed_files(raw: bytes, public_pem: str) -> dict[str, str]:
    """The files of which a bundle speaks: path -> sha256.

    Raises:
        SignatureError: it is not one as `sign_files` writes them, with this P-384 key.
    """
    try:
        envelope = json.loads(raw)["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        told = json.loads(payload)
        files = {one["name"]: one["digest"] for one in told["predicate"]["resources"]}
        text = base64.b64encode(signature).decode()  # its one spelling
        same = _statement(told["subject"][0]["name"], files) == payload
        if not same or _bundle(public_pem, payload, text) != raw:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SignatureError("no signature of a folder with that key, or it was changed") from None
    verify(public_pem, _pae(payload), text, 384)
    return files


def _statement(name: str, digests: Mapping[str, str]) -> bytes:
    paths = sorted(digests)
    whole = hashlib.sha256(b"".join(bytes.fromhex(digests[path]) for path in paths)).hexdigest()
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    files = [{"name": path, "algorithm": "sha256", "digest": digests[path]} for path in paths]
    serialization = {**how, "ignore_paths": [SIGNATURE_FILE]}
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": serialization, "resources": files},
    }
    return json.dumps(statement, separators=(",", ":")).encode()


def _bundle(public_pem: str, payload: bytes, signature: str) -> bytes:
    hint = hashlib.sha256(public_pem.encode()).hexdigest()
    signed = {"payload": base64.b64encode(payload).decode(), "payloadType": _PAYLOAD_TYPE}
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {**signed, "signatures": [{"sig": signature, "keyid": ""}]},
    }
    return json.dumps(bundle, separators=(",", ":")).encode()


def _pae(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload
