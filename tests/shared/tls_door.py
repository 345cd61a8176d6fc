"""A certificate authority, and a TLS door in front of a port."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    file: Path

    @classmethod
    def made(cls, folder: Path, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        file = folder / f"{name}.crt"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(key, certificate, file)

    def server(
        self, host: str = "127.0.0.1", *, from_days: float = -1, to_days: float = 1
    ) -> ssl.SSLContext:
        """A server's side of TLS with a certificate for one host and time."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=from_days))
            .not_valid_after(now + timedelta(days=to_days))
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        pem += key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        file = self.file.with_name(f"server-{certificate.serial_number}.pem")
        file.write_bytes(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@contextmanager
def door(context: ssl.SSLContext | None, to_port: int, *, connect: bool = False) -> Iterator[str]:
    """TLS on a free port, forwarded to a port of this machine; yields host:port.

    Args:
        connect: it is a proxy, to be asked with CONNECT before.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    open_ = True
    threads: list[threading.Thread] = []

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(raw: socket.socket) -> None:
        raw.settimeout(20)
        try:
            if connect:
                assert raw.recv(65536).startswith(b"CONNECT ")
                raw.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with (
                context.wrap_socket(raw, server_side=True) if context else raw as line,
                socket.create_connection(("127.0.0.1", to_port), timeout=20) as inner,
            ):
                back = threading.Thread(target=copy, args=(inner, line))
                back.start()
                copy(line, inner)
                back.join()
        except OSError:
            raw.close()

    def accept() -> None:
        while open_:
            try:
                raw, _ = listener.accept()
            except OSError:
                continue
            threads.append(threading.Thread(target=serve, args=(raw,), daemon=True))
            threads[-1].start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        open_ = False
        thread.join()
        listener.close()
