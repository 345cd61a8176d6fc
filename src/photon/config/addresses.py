"""Names and addresses of machines, checked by one rule wherever an operator writes them."""

from __future__ import annotations

import ipaddress
import re

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_WANTED = "a name or an address alone, without scheme, port or path"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def host_name(text: str) -> str:
    """A host as certificates and invitations have it.

    IPv6 addresses lose their brackets, letters beyond ASCII become punycode.

    Raises:
        ValueError: it is no name and no address; says what it must be.
    """
    try:
        address = ipaddress.ip_address(_bare(text))
    except ValueError:
        pass
    else:
        if not getattr(address, "scope_id", None):
            return str(address)
        raise ValueError(f"{text!r} has a zone, which means something on one machine only")
    try:
        name = text if text.isascii() else text.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = name.split(".")
    # What ends in a number is read as an IPv4 address everywhere, and this is none.
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdecimal():
        raise ValueError(f"{text[:300]!r} must be {_WANTED}, for instance ai.example.org")
    return name


def host_and_port(text: str) -> tuple[str, int]:
    """HOST:PORT in its parts; the host as `host_name` has it.

    Raises:
        ValueError: it is not.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host != _bare(host)
    if not (colon and port.isascii() and port.isdecimal() and 0 < int(port) < 65_536) or (
        ":" in host and not bracketed
    ):
        raise ValueError(f"{text[:300]!r} is not HOST:PORT, for example fed.example.org:8443")
    return host_name(host), int(port)


def joined(host: str, port: int) -> str:
    """ "host:port", with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def network_or_host(text: str) -> Network | str:
    """A range (10.1.0.0/16), an address, which is a range of one, or the name of a host.

    Raises:
        ValueError: it is none of them.
    """
    try:
        return ipaddress.ip_network(_bare(text))
    except ValueError:
        if "/" in text:
            raise ValueError(
                f"{text[:100]!r} is no range of addresses, for instance 10.1.0.0/16"
            ) from None
    return host_name(text).lower()


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
