"""Where a machine's HTTP goes: never through a proxy to itself, never inside for others' sake."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from photon.config.addresses import network_or_host
from photon.errors import AccessRefusedError, UnreachableError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: IPv6 that a gateway turns into the IPv4 in its last 32 bits (RFC 6052).
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

#: Where IPv6 addresses of the internet are; all others are a site's own, or nobody's (RFC 4291).
_INTERNET = ipaddress.IPv6Network("2000::/3")


class _WithoutQueries(logging.Filter):
    """httpx logs each URL; presigned ones carry signatures in their queries."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                one.copy_with(query=None) if isinstance(one, httpx2.URL) else one
                for one in record.args
            )
        return True


# Whatever in this process makes a client: also one that Photon did not make.
logging.getLogger("httpx2").addFilter(_WithoutQueries())


def http_client(
    url: str, trust: ssl.SSLContext | None, timeout: httpx2.Timeout, **options: Any
) -> httpx2.Client:
    """A client for one host. Redirects are not followed; the proxy is as `proxy_to` says.

    Args:
        url: scheme, host and port are looked at.
        trust: certificate authorities; None: the system's.

    Raises:
        UnreachableError: the environment names a proxy that can't be used.
    """
    proxy = proxy_to(url)
    return httpx2.Client(
        verify=trust or httpx2.create_ssl_context(),
        timeout=timeout,
        headers={"accept-encoding": "identity", "user-agent": "photon"},
        follow_redirects=False,
        trust_env=False,
        proxy=proxy.url if proxy is not None else None,
        **options,
    )


@dataclass(frozen=True)
class Proxy:
    """A proxy that the environment names; as a string without its password.

    Attributes:
        variable: that names it.
    """

    variable: str
    url: str = field(repr=False)

    def __str__(self) -> str:
        scheme, _, rest = self.url.partition("://")
        return f"{self.variable}={scheme}://{rest.rpartition('@')[2][:200]}"


def proxy_to(url: str) -> Proxy | None:
    """The proxy that the environment names for a URL. This machine is reached without.

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY count.

    Raises:
        UnreachableError: as `keep_to_this_machine`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host) or _in_a_range(host, getproxies().get("no", "")):
        return None
    proxies = _proxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def keep_to_this_machine(environment: MutableMapping[str, str]) -> None:
    """Let what is on loopback be reached past proxies, by libraries that read them themselves.

    Raises:
        UnreachableError: a proxy that can't be used: only those that take CONNECT can.
    """
    _proxies()
    spellings = ("NO_PROXY", "no_proxy")
    kept = [one for name in spellings for one in environment.get(name, "").split(",") if one]
    left_out = ",".join(dict.fromkeys([*kept, "127.0.0.1", "localhost", "::1"]))
    for name in spellings:
        environment[name] = left_out


def _proxies() -> dict[str, Proxy]:
    """By scheme, and "all". Libraries make all of them ready, whichever is used then."""
    found = {
        scheme: Proxy(f"{scheme.upper()}_PROXY", proxy if "://" in proxy else f"http://{proxy}")
        for scheme, proxy in getproxies().items()
        if scheme in ("http", "https", "all")
    }
    for proxy in found.values():
        if not proxy.url.lower().startswith(("http://", "https://")):
            raise UnreachableError(
                f"the proxy {proxy} can't be used: Photon speaks to http:// and https:// proxies",
                hint="Name one that takes CONNECT, or take that variable out of the environment.",
            )
    return found


def _in_a_range(host: str, left_out: str) -> bool:
    """Whether NO_PROXY has a range of addresses with this one in it."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        for one in left_out.split(","):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(one.strip()):
                    return True
    return False


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name or address."""
    try:
        return _plain(ipaddress.ip_address(host)).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Allowed:
    """Which addresses of its own network a site lets others name.

    Public addresses always are. Names are looked up when a connection is made; where a proxy makes
    it, the proxy does that, by its own rules.

    Args:
        entries: ranges, addresses, names of hosts: [network] allow_private_addresses.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        rules = [network_or_host(entry) for entry in entries]
        self._hosts = {rule for rule in rules if isinstance(rule, str)}
        self._networks = [rule for rule in rules if not isinstance(rule, str)]

    def require(self, host: str, port: int) -> None:
        """Look at all that a host's name stands for, before a byte goes there.

        Raises:
            AccessRefusedError: an address that the site does not let others name.
        """
        try:
            found = {str(one[4][0]) for one in socket.getaddrinfo(host, port)}
        except (OSError, UnicodeError):
            return  # the connection will say so
        for address in sorted(found):
            self.require_address(host, address)

    def require_address(self, host: str, address: str) -> None:
        """As `require`, for one address of a host."""
        plain = _plain(ipaddress.ip_address(address.partition("%")[0]))
        public = plain in _INTERNET if plain.version == 6 else not plain.is_multicast
        if public and plain.is_global:
            return
        if host.lower() in self._hosts or any(plain in one for one in self._networks):
            return
        named = host if host == address else f"{host} ({address})"
        raise AccessRefusedError(
            f"the aggregator names a store at {named}, which is inside this site's own network",
            hint="If that is meant, say so in node.toml: under [network], "
            f'allow_private_addresses = ["{plain}"].',
        )

    def watching(self, host: str, port: int) -> Callable[[str, dict[str, Any]], None]:
        """httpx's "trace" of a request: ends it where a connection would break these rules.

        A name may stand for another address by the time of connecting: that one counts too.
        """

        def trace(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.started":
                self.require(host, port)
            elif event == "connection.connect_tcp.complete":
                stream = info["return_value"]
                try:
                    self.require_address(host, stream.get_extra_info("server_addr")[0])
                except AccessRefusedError:
                    stream.close()
                    raise

        return trace


def _plain(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def distrust(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The refusal of a certificate, if that lies behind an error: it will be refused again."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None
