"""The one file that a new silo gets: where the aggregator is, how to know it, and a secret to join.

It is TOML, so that whoever gets it can see what it says before using it. At its end is the
federation's tokenizer, as all text must be cut by the same one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import re
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from photon.config.addresses import host_name, joined
from photon.errors import InvitationError, MembershipError
from photon.membership.keys import FINGERPRINT, canonical_pem
from photon.membership.records import MEMBER_NAME, SHA256, printable, utc
from photon.store.disk import write_whole

_FORMAT = 2
#: Of the file; of a tokenizer in it, compressed and as it is.
_MOST_BYTES, _MOST_PACKED_BYTES, _MOST_TOKENIZER_BYTES = 6 << 20, 4 << 20, 64 << 20
_HINT = "Ask the aggregator's operator for a new one (`photon invite NAME`)."
_BEGINS = "# Makes its first user the member "
_TOKEN = re.compile(r"[A-Za-z0-9_-]{20,200}")
#: One line, nothing invisible.
_EOS = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,200}")


@dataclass(frozen=True)
class SharedTokenizer:
    """The tokenizer by which all text of a federation is cut.

    Attributes:
        sha256: of its tokenizer.json, as `photon data prepare` writes it.
        eos_token: what ends a document.
        json: tokenizer.json itself; None where it is too large to go with an invitation.
    """

    sha256: str
    eos_token: str
    json: bytes | None

    @cached_property
    def packed(self) -> str | None:
        """As it travels: zstd, base64 in lines; None where it does not."""
        if self.json is None or len(self.json) > _MOST_TOKENIZER_BYTES:
            return None
        packed = zstandard.compress(self.json, 19)
        if len(packed) > _MOST_PACKED_BYTES:
            return None
        return base64.encodebytes(packed).decode("ascii")


@dataclass(frozen=True)
class Invitation:
    """What the file says.

    Attributes:
        name: of the member that its bearer becomes.
        host, port: the aggregator's door; an IPv6 address without brackets.
        ca_pem: certificate of the authority that signed the door's.
        ca_fingerprint: of that, to be compared by telephone; see `certificate_fingerprint`.
        aggregator_key: public half of the key that signs the aggregator's Asks and log, PEM.
        token: the secret; it works once.
        expires_at: seconds since the epoch.
        tokenizer: the federation's; None where it was not known when the invitation was made.
        key_fingerprint: of the only key that may join with it; None: the first that comes.
    """

    name: str
    host: str
    port: int
    ca_pem: str
    ca_fingerprint: str
    aggregator_key: str
    token: str
    expires_at: float
    tokenizer: SharedTokenizer | None = None
    key_fingerprint: str | None = None

    @property
    def address(self) -> str:
        """ "host:port", with the brackets that an IPv6 address needs."""
        return joined(self.host, self.port)

    def require_unexpired(self, now: float) -> None:
        """The aggregator decides by its own clock; this spares the way to it.

        Args:
            now: seconds since the epoch.

        Raises:
            InvitationError: it has expired.
        """
        if now >= self.expires_at:
            raise InvitationError(
                f"the invitation for {self.name} expired at {utc(self.expires_at)}", hint=_HINT
            )


def certificate_fingerprint(pem: str) -> str:
    """Names a certificate: "sha256:" and the sha256 of its DER form, hexadecimal.

    `openssl x509 -noout -fingerprint -sha256 -in ca.crt` says the same, in capitals with colons.

    Args:
        pem: certificates; the first one counts.

    Raises:
        ValueError: there is none.
    """
    found = x509.load_pem_x509_certificate(pem.encode())
    return "sha256:" + found.fingerprint(hashes.SHA256()).hex()


def require_writable(path: Path) -> None:
    """Whether an invitation may be written there; an older one may be replaced.

    Raises:
        InvitationError: there is no such folder, or something else is there.
    """
    if not path.parent.is_dir():
        raise InvitationError(
            f"can't write {path}: there is no folder {path.parent}", hint="Choose another --out."
        )
    if path.exists():
        try:
            read_invitation(path)
        except InvitationError:
            raise InvitationError(
                f"{path} is there already and is no invitation; it is not replaced",
                hint="Choose another --out.",
            ) from None


def write_invitation(path: str | os.PathLike[str], invitation: Invitation) -> None:
    """Write the file, readable by its owner only; an older invitation there is replaced.

    Raises:
        InvitationError: something else is there, or it can't be written.
        DiskFullError: no room.
    """
    path = Path(path)
    require_writable(path)
    own = ("name", "host", "port", "token", "ca_fingerprint", "ca_pem", "aggregator_key")
    record = {"photon_invitation": _FORMAT} | {name: getattr(invitation, name) for name in own}
    record["expires_at"] = datetime.fromtimestamp(invitation.expires_at, UTC)
    if invitation.key_fingerprint is not None:
        record["key_fingerprint"] = invitation.key_fingerprint
    text = (
        f"{_BEGINS}{invitation.name}, once: keep it as you keep a "
        f"password.\n# On the node: photon join --invite {path.name} --node node.toml\n"
        + tomli_w.dumps(record, multiline_strings=True)
        + _tokenizer_text(invitation.tokenizer)
    )
    try:
        write_whole(path, text, "the invitation", mode=0o600)
    except OSError as error:
        raise InvitationError(f"can't write the invitation {path}: {error}") from error


def is_invitation(path: Path) -> bool:
    """Whether a file looks like an invitation, whole or not."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".toml" or file.read(len(_BEGINS)) == _BEGINS.encode()
    except OSError:
        return False


def read_invitation(path: str | os.PathLike[str]) -> Invitation:
    """Read the file. Whether it has expired is another question (`require_unexpired`).

    Raises:
        InvitationError: no such file, not an invitation, or it was changed or cut short.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InvitationError(
            f"can't read the invitation {path}: {error.strerror}", hint=_HINT
        ) from error
    if len(data) > _MOST_BYTES:
        raise InvitationError(
            f"{path} is no invitation: it has more than {_MOST_BYTES} bytes", hint=_HINT
        )
    try:
        record = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InvitationError(
            f"{path} is no invitation: {printable(str(error))[:200]}", hint=_HINT
        ) from error
    if record.get("photon_invitation") != _FORMAT:
        raise InvitationError(
            f"{path} is no invitation of this Photon's: photon_invitation is "
            f"{str(record.get('photon_invitation'))[:40]!r}, {_FORMAT} is what it reads",
            hint="Install the same version of Photon on both sides.",
        )
    return _parsed(record, path)


def _parsed(record: dict[str, Any], path: Path) -> Invitation:
    name = _text(record, "name", MEMBER_NAME, path)
    host = _text(record, "host", None, path)
    token = _text(record, "token", _TOKEN, path)
    pem = _text(record, "ca_pem", None, path)
    said = _text(record, "ca_fingerprint", None, path)
    key = _text(record, "aggregator_key", None, path)
    port, expires_at = record.get("port"), record.get("expires_at")
    try:
        host_name(host)
    except ValueError as error:
        raise _wrong(path, "host", host, str(error)) from None
    if not (type(port) is int and 0 < port < 65_536):
        raise _wrong(path, "port", port, "a port, 1 to 65535")
    if not (isinstance(expires_at, datetime) and expires_at.tzinfo is not None):
        raise _wrong(path, "expires_at", expires_at, "a time with its zone")
    try:
        seconds = expires_at.timestamp()
        found = certificate_fingerprint(pem)
    except (ValueError, OverflowError) as error:
        raise _wrong(path, "ca_pem", pem, "a certificate in PEM") from error
    if found != said:
        raise InvitationError(
            f"{path}: the certificate in it has fingerprint {found}, it says "
            f"{printable(said[:80])}",
            hint=f"It was changed or damaged on its way: do not use it. {_HINT}",
        )
    if not math.isfinite(seconds):
        raise _wrong(path, "expires_at", expires_at, "a time with its zone")
    try:
        key = canonical_pem(key)
    except MembershipError as error:
        raise _wrong(path, "aggregator_key", key, "a public key in PEM") from error
    tokenizer = _parsed_tokenizer(record.get("tokenizer"), path)
    bound = None
    if "key_fingerprint" in record:
        bound = _text(record, "key_fingerprint", FINGERPRINT, path)
    return Invitation(name, host, port, pem, said, key, token, seconds, tokenizer, bound)


def _tokenizer_text(shared: SharedTokenizer | None) -> str:
    """The last table of the file; empty without one."""
    if shared is None:
        return ""
    record = {"tokenizer": {"sha256": shared.sha256, "eos_token": shared.eos_token}}
    packed = shared.packed
    # A literal string: thousands of lines are read at once.
    json = f"zstd_base64 = '''\n{packed}'''\n" if packed is not None else ""
    return f"\n# What the text at the node must be cut by.\n{tomli_w.dumps(record)}{json}"


def _parsed_tokenizer(record: object, path: Path) -> SharedTokenizer | None:
    if record is None:
        return None
    if not isinstance(record, dict):
        raise _wrong(path, "tokenizer", record, "a table")
    sha256 = _text(record, "sha256", SHA256, path)
    eos_token = _text(record, "eos_token", _EOS, path)
    if "zstd_base64" not in record:
        return SharedTokenizer(sha256, eos_token, None)
    try:
        packed = base64.b64decode("".join(str(record["zstd_base64"]).split()), validate=True)
        if not 0 <= zstandard.frame_content_size(packed) <= _MOST_TOKENIZER_BYTES:
            raise ValueError("its size is not said, or too much")
        json = zstandard.ZstdDecompressor().decompress(packed)
    except (binascii.Error, zstandard.ZstdError, ValueError, MemoryError) as error:
        raise _wrong(path, "tokenizer", str(error), "zstd in base64") from error
    if hashlib.sha256(json).hexdigest() != sha256:
        raise InvitationError(
            f"{path}: the tokenizer in it is not the one that it names, {sha256}",
            hint=f"It was changed or damaged on its way: do not use it. {_HINT}",
        )
    return SharedTokenizer(sha256, eos_token, json)


def _text(record: dict[str, Any], key: str, shape: re.Pattern[str] | None, path: Path) -> str:
    value = record.get(key)
    if not isinstance(value, str) or (shape is not None and not shape.fullmatch(value)):
        wanted = f"as `photon invite` writes it ({shape.pattern})" if shape else "text"
        raise _wrong(path, key, value, wanted)
    return value


def _wrong(path: Path, key: str, value: object, wanted: str) -> InvitationError:
    # A damaged token is a secret still.
    found = "missing" if value is None else ("damaged" if key == "token" else repr(value)[:80])
    return InvitationError(f"{path}: {key} is {found}; it must be {wanted}", hint=_HINT)
