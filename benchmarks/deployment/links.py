"""Links between network namespaces: a relay in user space that queues, delays and drops segments.

For kernels without netem. It takes a core of its own where the rate is high.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The relay moves what is due this often: a wake-up per packet would cost it a core.
QUANTUM_S = 0.0002


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def inside(namespace: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]


@contextlib.contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends when the block does."""
    process = subprocess.Popen(command, text=True, preexec_fn=die_with_parent, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def die_with_parent() -> None:
    """Whatever ends this script, kill -9 included, ends the child too."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def relayed(
    ends: tuple[tuple[str, str], tuple[str, str]],
    *,
    bit_per_s: float,
    delay_s: float,
    loss: float,
    queue_s: float,
) -> Iterator[int]:
    """Two tun devices, and the process between them: it ends with its standard input.

    Args:
        ends: of each, the namespace and what the device is called there.
        delay_s: each way.
        loss: share of the segments, each way.
        queue_s: how long a segment waits before the link at most.
    """
    task = json.dumps([ends, bit_per_s, delay_s, loss, queue_s])
    command = [sys.executable, str(Path(__file__).resolve()), task]
    with child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("The relay did not start.")
        yield process.pid


_VNET = struct.Struct("<BBHHHH")  # flags, gso type, header, gso size, checksum start and offset
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_INFO, _VNET_HEADER = 0x0001, 0x1000, 0x4000
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4 = 0x01, 0x02
_GSO_TCP4, _FIN_PSH = 1, 0x09


def open_tun(namespace: str, device: str) -> int:
    """A tun device in a namespace. It takes and gives runs of TCP segments, as a real card does."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open("rb") as handle:
        if libc.setns(handle.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _TUN | _NO_INFO | _VNET_HEADER
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    fcntl.ioctl(tun, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | _OFFLOAD_TCP4)
    return tun


class Way:
    """One direction of the link: a queue before a bottleneck, a delay after it, loss."""

    def __init__(self, rate: float, delay_s: float, loss: float, queue_s: float) -> None:
        self._rate = rate
        self._delay_s = delay_s
        self._loss = loss
        self._queue_s = queue_s
        self._free_at = 0.0
        self._passing = self._passes()
        self.line: deque[tuple[float, bytes]] = deque()

    def take(self, packet: bytes, now: float) -> None:
        for piece, on_wire in self._survivors(packet):
            start = max(now, self._free_at)
            if start - now <= self._queue_s:
                self._free_at = start + on_wire * 8 / self._rate
                self.line.append((self._free_at + self._delay_s, piece))

    def _passes(self) -> int:
        """Segments until the next that is lost."""
        return int(random.expovariate(1) / self._loss) if self._loss else 1 << 60

    def _survivors(self, packet: bytes) -> Iterator[tuple[bytes, int]]:
        """What is left of a packet, each piece with its bytes on the wire."""
        flags, kind, _, gso_size, *checksum = _VNET.unpack_from(packet)
        count, header, payload = 1, 0, 0
        if kind & 0x7F == _GSO_TCP4:
            tcp = 10 + (packet[10] & 15) * 4
            header = tcp + (packet[tcp + 12] >> 4) * 4
            payload = len(packet) - header
            count = -(-payload // gso_size)
        if count <= self._passing:
            self._passing -= count
            yield packet, (count - 1) * (header - 10) + len(packet) - 10
            return
        runs, first = [], 0
        while first + self._passing < count:
            runs.append((first, first + self._passing))
            first += self._passing + 1
            self._passing = self._passes()
        runs.append((first, count))
        self._passing -= count - first
        for begin, end in runs:
            if begin < end:
                shape = (flags, kind, gso_size, checksum)
                piece = part_of(packet, header, begin, end, shape)
                yield piece, (end - begin - 1) * (header - 10) + len(piece) - 10


def part_of(packet: bytes, header: int, begin: int, end: int, shape: Any) -> bytes:
    """Segments [begin, end) of a run of them, itself a run.

    The TCP checksum stays what the kernel left for a network card to finish: both ends are on this
    machine, so nobody does.
    """
    flags, kind, gso_size, checksum = shape
    payload = packet[header + begin * gso_size : header + end * gso_size]
    head = bytearray(packet[:header])
    alone = len(payload) <= gso_size
    kind, size = (0, 0) if alone else (kind, gso_size)
    _VNET.pack_into(head, 0, flags, kind, header - 10, size, *checksum)
    tcp = 10 + (packet[10] & 15) * 4
    struct.pack_into("!H", head, 12, header - 10 + len(payload))
    number = struct.unpack_from("!I", head, tcp + 4)[0] + begin * gso_size
    struct.pack_into("!I", head, tcp + 4, number & 0xFFFFFFFF)
    if header + end * gso_size < len(packet):
        head[tcp + 13] &= ~_FIN_PSH
    struct.pack_into("!H", head, 20, 0)
    total = sum(struct.unpack_from(f"!{(tcp - 10) // 2}H", head, 10))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", head, 20, ~total & 0xFFFF)
    return bytes(head) + payload


def relay(task: list[Any]) -> None:
    """Carry packets both ways until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends, *shape = task
    tuns = [open_tun(namespace, device) for namespace, device in ends]
    ways = {tuns[0]: (Way(*shape), tuns[1]), tuns[1]: (Way(*shape), tuns[0])}
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        for way, out in ways.values():
            while way.line and way.line[0][0] <= now:
                packet = way.line.popleft()[1]
                with contextlib.suppress(OSError):  # that side is not up yet, or any more
                    os.write(out, packet)
        if any(way.line for way, _ in ways.values()):
            time.sleep(QUANTUM_S)
        elif 0 in select.select([*tuns, 0], [], [])[0]:
            return
        for tun in tuns:
            for _ in range(256):
                try:
                    packet = os.read(tun, 70_000)
                except BlockingIOError:
                    break
                ways[tun][0].take(packet, time.monotonic())


if __name__ == "__main__":
    relay(json.loads(sys.argv[1]))
