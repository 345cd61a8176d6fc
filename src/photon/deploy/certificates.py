"""The aggregator's two authorities, what they sign, and what can be wrong with a certificate.

A silo trusts one authority, whose fingerprint its invitation names; the door's certificate may be
made anew as often as its operator likes (another name, a date that comes near). The other signs
members' certificates, which the door asks for; nobody but the door believes it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from photon.config.serve import ServeConfig
from photon.errors import CertificateError
from photon.store.disk import write_whole

#: What clients are told to give up on: longer ones are refused by some of them.
MOST_DAYS = 825
#: Made anew when `photon serve` starts with fewer days left.
RENEW_DAYS = 30
#: Made anew, also while it serves, once less than this part of its life is left.
RENEW_PART = 1 / 3

#: That a member's certificate is valid: its node renews it. Membership is asked at each request.
MEMBER_DAYS = 30

_AUTHORITY_DAYS = 3650
#: Clocks of silos may be a little behind.
_BACKDATED = timedelta(hours=1)
#: What no certificate of ours is used for.
_UNUSED = (
    *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("encipher_only", "decipher_only"),
)
#: Services on this machine meet each other by these names.
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class CertificateFiles:
    """Where a certificate, its key and the authority that signed it are, as PEM."""

    certificate: Path
    key: Path
    ca: Path


def given_files(serve: ServeConfig) -> CertificateFiles | None:
    """The operator's own; None where Photon makes them."""
    if serve.certificate is None or serve.key is None or serve.ca is None:
        return None
    return CertificateFiles(Path(serve.certificate), Path(serve.key), Path(serve.ca))


def server_files(home: Path) -> CertificateFiles:
    """Where `make_certificate` puts them."""
    return CertificateFiles(home / "server.crt", home / "server.key", home / "ca.crt")


def make_authority(home: Path) -> Path:
    """Make ca.crt and ca.key (EC P-256, ten years) unless they are there; returns ca.crt.

    Raises:
        CertificateError: one of the two is there without the other, or they don't belong together.
    """
    certificate_path, key_path = home / "ca.crt", home / "ca.key"
    there = [path for path in (certificate_path, key_path) if path.exists()]
    if len(there) == 2:
        _authority(home)
        return certificate_path
    if there:
        missing = (key_path if there == [certificate_path] else certificate_path).name
        raise CertificateError(
            f"{home} has {there[0].name} but no {missing}",
            hint="Restore it from a backup. A new authority (after removing both) has another "
            "fingerprint, so that every silo needs a new invitation.",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    # A serial in its name keeps two authorities apart where a system is given both.
    name = _name(f"Photon aggregator {secrets.token_hex(4)}")
    certificate = _signed(key, key.public_key(), name, _AUTHORITY_DAYS)
    # The certificate last: whoever sees it finds the key.
    _write(key_path, _key_pem(key), 0o600)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return certificate_path


def make_certificate(
    home: Path, hosts: Iterable[str], days: float = MOST_DAYS, *, calls: bool = False
) -> CertificateFiles:
    """Make server.crt and server.key, signed by the authority in `home`; older ones are replaced.

    Args:
        hosts: names and addresses by which silos reach the door; localhost and 127.0.0.1 are added.
        days: valid from now; never longer than the authority itself.
        calls: whoever has it may call others with it, too.

    Raises:
        CertificateError: no authority, a host that is none, days out of bounds.
    """
    if not 0 < days <= MOST_DAYS:
        raise CertificateError(
            f"a certificate can be valid for up to {MOST_DAYS} days, not {days:g}"
        )
    authority, authority_key = _authority(home)
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *_LOCAL])]
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH]
    if calls:
        purposes.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(str(names[0].value)[:64])
    own = (x509.ExtendedKeyUsage(purposes), x509.SubjectAlternativeName(names))
    certificate = _signed(authority_key, key.public_key(), name, days, authority, own)
    files = server_files(home)
    # A crash between the two leaves a pair that doesn't match: check_certificate sees it, and
    # keep_certificate makes another.
    _write(files.key, _key_pem(key), 0o600)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return files


def keep_certificate(home: Path, host: str, days: float = MOST_DAYS) -> CertificateFiles:
    """The door's certificate: authority and certificate are made where there are none, and the
    certificate anew where it is for another host, damaged, or due (`renewal_is_due`).

    Args:
        days: that a new one is valid.

    Raises:
        CertificateError: the authority is incomplete, or `host` is none.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_authority(home)
    files = server_files(home)
    found = files.certificate.exists() and files.key.exists()
    if (
        not found
        or check_certificate(files, host)
        or renewal_is_due(files.certificate)
        or days_left(files.certificate) < min(RENEW_DAYS, RENEW_PART * days)
    ):
        make_certificate(home, [host], days)
    return files


def keep_member_authority(home: Path) -> Path:
    """The authority of members' certificates, and its folder, which is returned.

    One that is near its end, damaged or incomplete is made anew: nodes get certificates of a new
    one by themselves.

    Raises:
        CertificateError: it can't be written.
    """
    folder = home / "members-authority"
    try:
        make_authority(folder)
        usable = days_left(folder / "ca.crt") > 2 * MEMBER_DAYS
    except CertificateError:
        usable = False
    if not usable:
        for name in ("ca.crt", "ca.key"):
            (folder / name).unlink(missing_ok=True)
        make_authority(folder)
    return folder


def member_certificate(
    authority: Path, public_pem: str, fingerprint: str, days: float = MEMBER_DAYS
) -> tuple[str, datetime]:
    """A certificate for a member's key, with which to call the door and nobody else.

    Args:
        authority: folder, of `keep_member_authority`.
        public_pem: a key that signed the request for this: no CSR needs to be read to prove it.
        fingerprint: of that key: the certificate's subject.

    Returns:
        The certificate, PEM, and until when it is valid.

    Raises:
        CertificateError: the authority can't be read.
    """
    issuer, issuer_key = _authority(authority)
    public = serialization.load_pem_public_key(public_pem.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)  # a member's always is
    subject = _name(fingerprint.partition(":")[2])
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = _signed(issuer_key, public, subject, days, issuer, (purpose,))
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return pem, certificate.not_valid_after_utc


def renewal_is_due(certificate: Path, *, at: datetime | None = None) -> bool:
    """Whether less than RENEW_PART of a certificate's life is left. Raises CertificateError."""
    leaf = _read_chain(certificate)[0]
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc - _BACKDATED
    return leaf.not_valid_after_utc - (at or datetime.now(UTC)) < RENEW_PART * life


def valid_until(certificate: Path) -> datetime:
    """When a certificate expires. Raises CertificateError."""
    return _read_chain(certificate)[0].not_valid_after_utc


def days_left(certificate: Path) -> float:
    """Days until a certificate expires; negative afterwards. Raises CertificateError."""
    return (valid_until(certificate) - datetime.now(UTC)) / timedelta(days=1)


def check_certificate(
    files: CertificateFiles, host: str, *, at: datetime | None = None
) -> list[str]:
    """What is wrong with a certificate, as sentences; empty: nothing.

    Args:
        files: intermediate certificates are behind the certificate, where there are any.
        host: name or address by which it must be known.
        at: a moment other than now.
    """
    certificate, key, ca = files.certificate, files.key, files.ca
    try:
        chain = _read_chain(certificate)
        roots = _read_chain(ca)
        private = _read_key(key)
    except CertificateError as error:
        return [error.message]
    now, leaf = at or datetime.now(UTC), chain[0]
    authority = [_date_problem(one, now, f"the authority in {ca}") for one in roots]
    found = [
        _date_problem(leaf, now, str(certificate)),
        authority[0] if all(authority) else None,
        f"{key} is not the key of {certificate}"
        if private.public_key() != leaf.public_key()
        else None,
        f"{key} may be read by others than its owner (chmod 600 {key})"
        if key.stat().st_mode & 0o077
        else None,
    ]
    problems = [one for one in found if one is not None]
    # What remains is as OpenSSL sees it; it takes the present for granted.
    if not problems and at is None and (problem := _handshake_problem(files, host)):
        problems.append(f"{certificate} {problem}")
    return problems


def require_certificate(files: CertificateFiles, host: str) -> None:
    """Raise CertificateError, with all that is wrong, unless the door can use the operator's."""
    if problems := check_certificate(files, host):
        raise CertificateError(
            "; ".join(problems),
            hint="Correct serve.certificate, serve.key and serve.ca, or give serve.host the name "
            "that silos use.",
        )


# --- parts ----------------------------------------------------------------------------------------


def _authority(home: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = _read_chain(home / "ca.crt")[0]
    key = _read_key(home / "ca.key")
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != certificate.public_key()
    ):
        raise CertificateError(
            f"{home / 'ca.key'} is not the key of {home / 'ca.crt'}",
            hint="Restore both from one backup.",
        )
    return certificate, key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _signed(
    signer: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    days: float,
    authority: x509.Certificate | None = None,
    more: Iterable[x509.ExtensionType] = (),
) -> x509.Certificate:
    """A certificate, valid from now for no longer than its authority; None makes an authority."""
    now = datetime.now(UTC)
    begin, until, issuer = now - _BACKDATED, now + timedelta(days=days), subject
    own = theirs = x509.SubjectKeyIdentifier.from_public_key(public)
    if authority is not None:
        theirs = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        begin = max(begin, authority.not_valid_before_utc)
        until, issuer = min(until, authority.not_valid_after_utc), authority.subject
    signs = authority is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(until)
        .add_extension(own, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(theirs), critical=False
        )
        .add_extension(x509.BasicConstraints(signs, 0 if signs else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not signs,
                key_cert_sign=signs,
                crl_sign=signs,
                **dict.fromkeys(_UNUSED, False),
            ),
            critical=True,
        )
    )
    for one in more:
        builder = builder.add_extension(one, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _general_name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        ascii_name = host.encode("idna").decode()
        if not all(letter.isalnum() or letter in "-._" for letter in ascii_name) or not host:
            raise ValueError
        return x509.DNSName(ascii_name)
    except (UnicodeError, ValueError):
        raise CertificateError(
            f"{host!r} is neither the name of a host nor an address",
            hint="Set serve.host to the name or address by which silos reach this machine.",
        ) from None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all; nobody else can read it even for a moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, data, "a certificate", mode=mode)
    except OSError as error:
        raise CertificateError(f"can't write {path}: {error.strerror}") from error


def read(path: Path) -> bytes:
    """A file of a certificate or key; raises CertificateError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"can't read {path}: {error.strerror}") from error


def _read_chain(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read(path))
    except ValueError as error:
        raise CertificateError(f"{path} holds no certificate in PEM") from error


def _read_key(path: Path):
    try:
        return serialization.load_pem_private_key(read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"{path} is no private key in PEM without a passphrase",
            hint="Remove the passphrase (`openssl pkey`): nobody is there to type it at a restart.",
        ) from error


def _date_problem(certificate: x509.Certificate, now: datetime, what: str) -> str | None:
    if now > certificate.not_valid_after_utc:
        return f"{what} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if now < certificate.not_valid_before_utc:
        return (
            f"{what} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
            f"this clock says {now:%Y-%m-%d %H:%M} UTC"
        )
    return None


def _hosts(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


def _handshake_problem(files: CertificateFiles, host: str) -> str | None:
    """Let OpenSSL be both sides, in memory."""
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(files.certificate, files.key)
        asking = ssl.create_default_context(cafile=str(files.ca))
        server = serving.wrap_bio(server_in, server_out, server_side=True)
        client = asking.wrap_bio(server_out, server_in, server_hostname=host)
        for side in (client, server, client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        match error.verify_code:  # OpenSSL's X509_V_ERR_...
            case 62 | 64:  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
                named = ", ".join(_hosts(_read_chain(files.certificate)[0])) or "no host at all"
                return f"is for {named}, not for {host}"
            case 7 | 18 | 19 | 20 | 21:  # what signed it is not there, or another one
                return f"was not signed by the authority in {files.ca}"
        return f"can't be used: {error.verify_message}"
    except (ssl.SSLError, OSError, ValueError) as error:
        return f"can't be used: {error}"
    return None
