"""What a flood of connections without a certificate costs: the door's memory, members' time.

    python benchmarks/flood.py [--connections 200] [--seconds 60] [--kinds join ...]

A desk and a door are started on this machine. Strangers open connections and send all they can:
bodies to closed paths and to the store's, requests to join with garbage or signed by a key that
nobody invited, health, half requests. Meanwhile a member asks how it stands, over the connection it
has and over new ones. Prints one JSON object: times in seconds, memory in bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from photon.deploy.certificates import keep_certificate, keep_member_authority
from photon.deploy.desk import Desk
from photon.deploy.front_door import SERVICE, DoorSettings, front_door
from photon.deploy.ports import free_ports
from photon.deploy.supervisor import Supervisor
from photon.errors import UnreachableError
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.roster import Facts, Roster
from photon.membership.signing import sign_request
from photon.silo.desk_client import DeskClient
from photon.store.presign import S3Presigner

KINDS = ("reply", "store", "join", "signed", "health", "half", "headers")
FACTS = Facts("a" * 64, "b" * 64, 1000, "0.1.0")


def main() -> None:
    """Measure, or (--strangers) be the flood."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of requests")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--strangers", nargs=2, metavar=("PORT", "CA"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.strangers:
        port, ca = chosen.strangers
        asyncio.run(flood(int(port), ca, chosen))
        return
    with tempfile.TemporaryDirectory(prefix="photon-flood-") as folder:
        found = measured(Path(folder), chosen)
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


# --- the aggregator, and members -----------------------------------------------------------------


def measured(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Memory and members' times, before and during the flood."""
    with aggregator(folder) as (port, roster, ca, door):
        address = f"127.0.0.1:{port}"
        member = joined(roster, address, ca, folder / "member.key", "member")
        ask = member.standing
        quiet = [timed(ask) for _ in range(20)]
        before = [door.memory_info().rss, psutil.Process().memory_info().rss]
        command = [sys.executable, __file__, "--strangers", str(port), str(ca)]
        command += ["--connections", str(chosen.connections), "--seconds", str(chosen.seconds)]
        command += ["--kinds", *chosen.kinds]
        strangers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak, asked, again = list(before), [], []
        while strangers.poll() is None:
            asked.append(timed(ask))
            if len(asked) % 20 == 10:  # a member that starts: no certificate, no connection yet
                fresh = DeskClient(address, ca, NodeKey.load(folder / "member.key"))
                again.append(timed(fresh.standing))
                fresh.close()
            now = [door.memory_info().rss, psutil.Process().memory_info().rss]
            peak = [max(pair) for pair in zip(peak, now, strict=True)]
            time.sleep(0.05)
        said = json.loads(strangers.communicate()[0])
        member.close()
        return {
            "connections": chosen.connections,
            "seconds": chosen.seconds,
            "sent": said,
            "door_grew_bytes": peak[0] - before[0],
            "desk_grew_bytes": peak[1] - before[1],
            "member_quiet_s": spread(quiet),
            "member_s": spread(asked),
            "member_starting_s": spread(again),
        }


@contextlib.contextmanager
def aggregator(folder: Path) -> Iterator[tuple[int, Roster, Path, psutil.Process]]:
    """A desk and a door, without a store: strangers never get as far."""
    files, members = keep_certificate(folder, "127.0.0.1"), keep_member_authority(folder)
    roster = Roster(folder / "members.sqlite")
    presigner = S3Presigner("https://s", "photon", region="r", access_key_id="a", secret="b")
    audience = certificate_fingerprint(files.ca.read_text())
    desk = Desk(roster, presigner, audience=audience, authority=members)
    desk.start()
    port, nobody = free_ports(2)
    settings = DoorSettings(
        *("127.0.0.1", port, files.certificate, files.key, members / "ca.crt"),
        desk_port=desk.port,
        store_port=nobody,
    )
    supervisor = Supervisor(folder / "serve.json", folder / "logs", log=lambda _: None)
    try:
        with supervisor:
            supervisor.start(front_door(settings, folder / "door"))
            (pid,) = (one.pid for one in supervisor.status() if one.name == SERVICE)
            yield port, roster, files.ca, psutil.Process(pid)
    finally:
        desk.stop()
        roster.close()


def joined(roster: Roster, address: str, ca: Path, file: Path, name: str) -> DeskClient:
    """A member that has its certificate."""
    key = NodeKey.create(file)
    client = DeskClient(address, ca, key)
    client.join(roster.invite(name, 600), name, key.public_pem, FACTS)
    client.standing()
    return client


def timed(ask: Callable[[], object]) -> float:
    """Seconds; an answer that asks for patience counts as none."""
    began = time.perf_counter()
    try:
        ask()
    except UnreachableError:
        return float("inf")
    return time.perf_counter() - began


def spread(seconds: list[float]) -> dict[str, float]:
    """How many, the median and the longest."""
    if not seconds:
        return {"asked": 0}
    return {
        "asked": len(seconds),
        "median": round(statistics.median(seconds), 4),
        "longest": round(max(seconds), 4),
    }


# --- strangers -----------------------------------------------------------------------------------


class Speaker(NamedTuple):
    """What one stranger says."""

    chance: random.Random
    kinds: Sequence[str]
    key: NodeKey


async def flood(port: int, ca: str, chosen: argparse.Namespace) -> None:
    """Send what can be sent; prints how often each was answered how."""
    trust = ssl.create_default_context(cafile=ca)
    until = time.monotonic() + chosen.seconds
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        key = NodeKey.create(Path(folder) / "key")
    async with asyncio.TaskGroup() as group:
        for number in range(chosen.connections):
            speaks = Speaker(random.Random(number), chosen.kinds, key)
            group.create_task(stranger(port, trust, until, speaks, counts))
    print(json.dumps(counts))


async def stranger(
    port: int,
    trust: ssl.SSLContext,
    until: float,
    speaks: Speaker,
    counts: Counter[str],
) -> None:
    """One connection after another."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=trust, server_hostname="127.0.0.1"
                )
                try:
                    while True:
                        counts[await spoken(reader, writer, speaks)] += 1
                finally:
                    writer.transport.abort()


async def spoken(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, speaks: Speaker
) -> str:
    """One request; the name of its kind, and the status."""
    kind = speaks.chance.choice(speaks.kinds)
    verb, path, body, more, length = "POST", "/photon/v2/join", b"x" * 4096, {}, None
    match kind:
        case "reply":
            path, body = "/photon/v2/reply", b"x" * (1408 << 10)
        case "store":
            verb, path, length = "PUT", "/photon/key?X-Amz-Signature=0", 2 << 30
            body = b"x" * (8 << 20)
        case "signed":
            body = b"{}"
            more = sign_request(speaks.key, verb, path, body, now=time.time())
        case "health":
            verb, path, body = "GET", "/photon/v2/health", b""
        case "half":
            length, body = 4096, b"x" * 4000
        case "headers":
            more = {f"h{number}": "y" * 1000 for number in range(14)}
    lines = [f"{verb} {path} HTTP/1.1", "host: x", f"content-length: {length or len(body)}"]
    lines += [f"{name}: {value}" for name, value in more.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()
    if kind == "half":
        await asyncio.sleep(speaks.chance.uniform(0.1, 5.0))
        raise ConnectionResetError
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
    await reader.readexactly(length)
    return f"{kind} {head.split()[1]}"


if __name__ == "__main__":
    main()
