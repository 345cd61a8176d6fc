"""Requests as bytes to a running door, and paths that it lets nobody through."""

from __future__ import annotations

import re
import socket
import ssl


def raw(door, data: bytes, *, wait_s: float = 10.0, member: bool = True) -> bytes:
    """Bytes as they are to the door, and all it answers."""
    trust = ssl.create_default_context(cafile=str(door.files.ca))
    context = door.trust() if member else trust
    address = ("127.0.0.1", door.settings.port)
    with (
        socket.create_connection(address, timeout=wait_s) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(data)
        answer = b""
        while piece := tls.recv(65536):
            answer += piece
    return answer


def ask(door, verb: str, target: str, *headers: str, member: bool = True) -> int:
    """The status of a request whose target goes out exactly as it is."""
    lines = [
        f"{verb} {target} HTTP/1.1",
        f"host: 127.0.0.1:{door.settings.port}",
        "connection: close",
        "content-length: 0",
        *headers,
    ]
    answer = raw(door, "\r\n".join([*lines, "", ""]).encode("latin-1"), member=member)
    found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    assert found, answer[:200]
    return int(found[1])


def reached(door) -> int:
    return len(door.desk.asked)


CLOSED = [
    ("GET", "/"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/runtime/pull-task"),
    ("POST", "/v1/responses"),
    ("GET", "/health"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/fleet/pull-messages"),
    ("GET", "/photon/v2/task"),
    ("POST", "/photon/v2"),
    ("POST", "/photon/v1/presence"),
    ("POST", "/PHOTON/v2/task"),
    ("POST", "/photon/v2/task/more"),
    ("POST", "/photon/v2/%2e%2e/%2e%2e/operator/drain"),
    ("POST", "/operator/../photon/v2/task"),
    ("POST", "/operator%2f..%2fphoton/v2/task"),
    ("POST", "//photon/v2/task"),
    ("POST", "/photon//v2/task"),
    ("POST", "/photon/v2/task%00"),
    ("POST", "/photon/v2/task;x=1"),
    ("POST", "/photon/v2\\task"),
    ("GET", "/operator/status"),
    ("POST", "/operator/drain"),
    ("GET", "/photon/v2/join"),
    ("POST", "/photon/v2/"),
    ("POST", "/photon/v2/../../operator/drain"),
    ("PUT", "/photon/v2/join"),
    ("DELETE", "/photon/v2/presence"),
    ("GET", "/photon/"),
    ("GET", "/photon/?list-type=2&X-Amz-Signature=0"),
    ("GET", "/?X-Amz-Signature=0"),
    ("GET", "/photon/key"),
    ("DELETE", "/photon/key?X-Amz-Signature=0"),
    ("POST", "/photon/key?uploads&X-Amz-Signature=0"),
    ("GET", "/other-bucket/key?X-Amz-Signature=0"),
    ("GET", "/photon/../dir/status?X-Amz-Signature=0"),
    ("GET", "/x/../photon/key?X-Amz-Signature=0"),
    ("CONNECT", "127.0.0.1:22"),
    ("GET", "http://127.0.0.1:9333/dir/status"),
]


STORE = "/photon/key?X-Amz-Signature=0"
