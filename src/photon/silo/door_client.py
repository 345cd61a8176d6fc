"""Certificates: the one with which a node is let in at the aggregator's door, and the door's own.

The aggregator gives one to whoever proves, by a signature, to be a member. It is in memory only:
nothing to keep, to copy, or to find expired after a holiday.
"""

from __future__ import annotations

import secrets
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from photon.errors import CertificateError, PhotonError
from photon.membership.keys import NodeKey
from photon.membership.records import printable
from photon.store.dialling import Proxy, http_client

#: A certificate is renewed once this part of its life is left; where that fails, again after so
#: many seconds.
_RENEW_PART, _RENEW_AGAIN_S = 1 / 3, 60.0


class DoorClient:
    """A client that shows a certificate. Safe to share between threads.

    Args:
        ca_file: as DeskClient's.
    """

    def __init__(
        self,
        key: NodeKey,
        origin: str,
        ca_file: Path | None,
        timeout: httpx2.Timeout,
    ) -> None:
        self._key = key
        self._origin = origin
        self._ca_file = ca_file
        self._timeout = timeout
        #: The present one, and the one before it, with which others may still be speaking.
        self._clients: list[tuple[httpx2.Client, ssl.SSLContext]] = []
        self._renew_at, self._ends_at = 0.0, 0.0  # of the monotonic clock
        self._lock = threading.Lock()

    def client(self, ask: Callable[[], tuple[str, float]]) -> tuple[httpx2.Client, ssl.SSLContext]:
        """One whose certificate is valid for a while yet, and what it makes connections with.

        Args:
            ask: gives a certificate for the key, PEM, and for how many seconds it is valid: on the
                aggregator's clock, so that this machine's need not be right.

        Raises:
            PhotonError: as `ask`; CertificateError: what it gives can't be used.
        """
        with self._lock:
            now = time.monotonic()
            if now >= self._renew_at:
                try:
                    self._renew(now, ask)
                except PhotonError:
                    if now >= self._ends_at:
                        raise
                    self._renew_at = now + _RENEW_AGAIN_S
            return self._clients[-1]

    def doubt(self) -> None:
        """A connection failed: perhaps because of the certificate, whose authority may be gone."""
        self._renew_at = 0.0

    def close(self) -> None:
        """Close connections."""
        for client, _ in self._clients:
            client.close()

    def _renew(self, now: float, ask: Callable[[], tuple[str, float]]) -> None:
        certificate, left_s = ask()
        trust = ssl.create_default_context(cafile=str(self._ca_file) if self._ca_file else None)
        passphrase = secrets.token_urlsafe(24)
        try:
            # ssl takes keys from files only: what is on the disk for a moment tells nothing.
            with tempfile.NamedTemporaryFile(prefix="photon-") as file:
                file.write(self._key.encrypted_pem(passphrase) + certificate.encode())
                file.flush()
                trust.load_cert_chain(file.name, password=passphrase)
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            raise CertificateError(
                f"the certificate that {self._origin} gives this node can't be used: {error}",
                hint="Is there room for temporary files, and is Photon of the same version on both "
                "sides?",
            ) from error
        self._clients.append((http_client(self._origin, trust, self._timeout), trust))
        self._renew_at = now + (1 - _RENEW_PART) * left_s
        self._ends_at = now + left_s
        for client, _ in self._clients[:-2]:
            client.close()
        del self._clients[:-2]


def distrusted(error: ssl.SSLCertVerificationError, proxy: Proxy | None) -> tuple[str, str]:
    """What is wrong with a certificate that came through a proxy or none; what to do about it."""
    said = printable(str(error.verify_message))[:300]
    match error.verify_code:  # OpenSSL's X509_V_ERR_...
        case 10:  # CERT_HAS_EXPIRED
            return (
                "its certificate expired",
                "The aggregator's operator renews it (`photon serve --check` says how); if it is "
                "new, this machine's clock is ahead.",
            )
        case 9:  # CERT_NOT_YET_VALID
            return (
                "its certificate is not valid yet",
                "This machine's clock is behind, or the aggregator's was ahead when it was made.",
            )
        case 62 | 64:  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
            return (
                f"its certificate is another host's ({said})",
                "Use the address as the invitation has it; the aggregator's [serve] host says "
                "which.",
            )
    words = f"its certificate is not of the authority that the invitation names ({said})"
    if proxy is not None:
        return (
            f"{words}; the proxy {proxy} opens TLS, most likely, and shows one of its own",
            "Have the proxy's operator pass connections to the aggregator through unopened (by its "
            "host and port). Photon goes through no proxy that reads along.",
        )
    return (
        words,
        "A firewall opens TLS, or somebody else answers in the aggregator's place: ask its "
        "operator for the fingerprint of its authority. If that changed, a new invitation has it.",
    )
