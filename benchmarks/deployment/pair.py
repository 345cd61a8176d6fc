"""Two network namespaces and a link of a given rate, delay and loss between them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deployment.links import inside, ip, relayed

AGGREGATOR, SILO = "10.99.0.1", "10.99.0.2"
MTU = 1500
_DEVICE = "wire0"


@dataclass(frozen=True)
class Cell:
    """A link. The loss is a share of the segments."""

    mbit_per_s: float
    rtt_s: float
    loss: float

    @staticmethod
    def parse(text: str) -> Cell:
        rate, rtt_ms, percent = (float(part) for part in text.split("/"))
        return Cell(rate, rtt_ms / 1e3, percent / 100)

    def __str__(self) -> str:
        return f"{self.mbit_per_s:g} Mbit/s, RTT {self.rtt_s * 1e3:g} ms, loss {self.loss:.1%}"

    @property
    def only_rate(self) -> bool:
        return not (self.rtt_s or self.loss)

    @property
    def bandwidth_delay_bytes(self) -> float:
        return self.mbit_per_s * 1e6 / 8 * self.rtt_s

    @property
    def queue_s(self) -> float:
        """How long a packet waits before the link at most: one RTT of queue, at least 20 ms."""
        return max(self.rtt_s, 0.02)


@dataclass(frozen=True)
class Namespaces:
    aggregator: str
    silo: str
    #: The relay's process, if it is the link between them.
    relay: int | None = None

    def each(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.aggregator, AGGREGATOR), (self.silo, SILO)


@contextlib.contextmanager
def namespaces() -> Iterator[Namespaces]:
    names = Namespaces(f"photon-aggregator-{os.getpid()}", f"photon-silo-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        for name, _ in names.each():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def has_netem() -> bool:
    with namespaces() as names:
        command = ["tc", "-n", names.silo, "qdisc", "add", "dev", "lo", "root", "netem"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def link(cell: Cell, netem: bool) -> Iterator[Namespaces]:
    """Two namespaces with a link like that between them."""
    with namespaces() as names, contextlib.ExitStack() as stack:
        if netem or cell.only_rate:
            shaped_pair(cell, names)
        else:
            ends = (names.aggregator, _DEVICE), (names.silo, _DEVICE)
            shape = {"bit_per_s": cell.mbit_per_s * 1e6, "delay_s": cell.rtt_s / 2}
            way = relayed(ends, **shape, loss=cell.loss, queue_s=cell.queue_s)
            names = replace(names, relay=stack.enter_context(way))
        for name, address in names.each():
            ip("-n", name, "address", "add", f"{address}/24", "dev", _DEVICE)
            ip("-n", name, "link", "set", _DEVICE, "mtu", str(MTU), "txqueuelen", "20000", "up")
            tune(name, cell)
        yield names


def shaped_pair(cell: Cell, names: Namespaces) -> None:
    """A veth pair. It goes with its namespaces."""
    peer = ("peer", "name", _DEVICE, "netns", names.silo)
    ip("link", "add", _DEVICE, "netns", names.aggregator, "type", "veth", *peer)
    for name, _ in names.each():
        if not cell.only_rate:
            # Without this, netem counts and drops up to 64 KiB as one packet.
            ip("-n", name, "link", "set", _DEVICE, "gso_max_segs", "1")
        command = ["tc", "-n", name, "qdisc", "add", "dev", _DEVICE, "root"]
        subprocess.run([*command, *shaper(cell)], check=True)


def shaper(cell: Cell) -> list[str]:
    """tc's words for what shapes each direction."""
    rate = ["rate", f"{cell.mbit_per_s:g}mbit"]
    if cell.only_rate:
        return ["tbf", *rate, "burst", "256kb", "latency", f"{cell.queue_s * 1e3:g}ms"]
    # What is queued and what is on its way count alike.
    held_s = cell.queue_s + cell.rtt_s / 2
    packets = max(1000, round(cell.mbit_per_s * 1e6 / 8 * held_s / MTU))
    shape = ["limit", str(packets), "delay", f"{cell.rtt_s * 500:g}ms"]
    return ["netem", *shape, "loss", f"{cell.loss * 100:g}%", *rate]


def tune(name: str, cell: Cell) -> None:
    """Windows that hold the link's bandwidth times RTT; nothing remembered between connections."""
    window = max(16 * 2**20, round(4 * cell.bandwidth_delay_bytes))
    for setting in (
        f"net.ipv4.tcp_rmem=4096 131072 {window}",
        f"net.ipv4.tcp_wmem=4096 16384 {window}",
        "net.ipv4.tcp_no_metrics_save=1",
    ):
        subprocess.run(inside(name, "sysctl", "-q", "-w", setting), check=True)


def congestion_control() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="utf-8").strip()
