"""Ports of this machine: free ones, taken ones, and by whom."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from itertools import islice
from pathlib import Path

from photon.errors import DeployError, PortInUseError

#: Below the range that systems hand out for outgoing connections, so that a port stays free for
#: its service while that is being restarted.
_FROM, _TO = 20_000, 32_000
_LISTENING = "0A"


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now, and that stay free while they are not used.

    Raises:
        DeployError: there are not so many.
    """
    candidates = random.SystemRandom().sample(range(_FROM, _TO), _TO - _FROM)
    found = list(islice((port for port in candidates if is_free("127.0.0.1", port)), count))
    if len(found) < count:
        raise DeployError(f"only {len(found)} of {count} free ports found in {_FROM}-{_TO}")
    return found


def is_free(host: str, port: int) -> bool:
    """Whether a service could listen there. Raises DeployError for an address that is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As services do: connections that were just closed are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Two sockets may be bound so; only one may listen.
            probe.listen(1)
        except PermissionError as error:
            raise DeployError(
                f"this user may not listen on port {port}",
                hint="Ports below 1024 need root, or CAP_NET_BIND_SERVICE (the systemd unit has "
                "it); or choose a higher one and forward to it.",
            ) from error
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                return False
            raise DeployError(
                f"can't listen on {host}: {error}",
                hint="Name an address of this machine; 0.0.0.0 is all of them.",
            ) from error
    return True


def require_free(host: str, port: int) -> None:
    """Raise PortInUseError, which says by whom, unless a service could listen there."""
    if not is_free(host, port):
        raise PortInUseError(
            f"port {port} on {host} is taken by {holder(port) or 'another program'}",
            hint="End that program, or choose another port.",
        )


def holder(port: int) -> str | None:
    """Who listens on a port, as "caddy (pid 4711)"; None if that can't be seen."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if any(_target(one) in wanted for one in (process / "fd").iterdir()):
                name = (process / "comm").read_text(encoding="utf-8", errors="replace")
                return f"{name.strip()} (pid {process.name})"
    return None


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
            for fields in map(str.split, lines):
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found
