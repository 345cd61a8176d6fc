"""A thousand members at one desk and door: what they cost while idle, how soon a task is theirs.

    python benchmarks/thousand.py [--members 1000] [--killed 100] [--idle-s 60] [--quick]

A desk and a door (Caddy, TLS, client certificates) are started on this machine, and members in
processes of --killed each: real keys, certificates, signed requests and connections, but no
training. Each member polls for questions and says that it is here, as `photon join` does, over two
connections. Then: nothing happens for --idle-s; one task for all, answered by all; another, while
one process of members is killed (-9) and started again. This process is the federation's loop. CPU
is in percent of one core. Prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cryptography.hazmat.primitives import serialization

from flood import FACTS, aggregator
from photon.deploy.certificates import keep_member_authority, member_certificate
from photon.membership.desk_documents import PATIENCE_HEADER, POLL_PATIENCE_S
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask, Presence
from photon.membership.roster import Roster
from photon.membership.signing import ASK, RECEIPT, sign_document, sign_request

RUN = "0" * 32
#: Of an Ask's text: a run file of 4 KB and what goes with it.
ASK_BYTES, REPLY_BYTES = 5000, 1200
#: Handshakes that one process of members has under way at once.
HANDSHAKES = 8
WITHIN_S = 200.0


def main() -> None:
    """Measure, or be the desk (--desk) or some members (--hold)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--killed", type=int, default=100)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="20 members, 5 killed, 5 s idle")
    parser.add_argument("--out", type=Path, help="write the table here as well")
    parser.add_argument("--desk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hold", nargs=4, metavar=("FOLDER", "PORT", "FIRST", "COUNT"))
    chosen = parser.parse_args()
    if chosen.desk:
        with aggregator(chosen.desk) as (port, _, _, door):
            print(json.dumps([port, door.pid]), flush=True)
            sys.stdin.read()
    elif chosen.hold:
        folder, port, first, count = chosen.hold
        asyncio.run(held(Path(folder), int(port), range(int(first), int(first) + int(count))))
    else:
        if chosen.quick:
            chosen.members, chosen.killed, chosen.idle_s = 20, 5, 5.0
        with tempfile.TemporaryDirectory(prefix="photon-thousand-") as folder:
            text = table(chosen, measured(Path(folder), chosen))
        print(text)
        if chosen.out:
            chosen.out.write_text(text + "\n", encoding="utf-8")


def name_of(number: int) -> str:
    return f"silo-{number:04d}"


# --- the loop's side -----------------------------------------------------------------------------


@dataclass
class Sites:
    """Processes of members, and what they say."""

    folder: Path
    port: int
    processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    #: (what, member) -> seconds since the epoch.
    heard: dict[tuple[str, str], float] = field(default_factory=dict)
    news: threading.Condition = field(default_factory=threading.Condition)

    def start(self, first: int, count: int) -> None:
        own = [str(self.folder), str(self.port), str(first), str(count)]
        command = [sys.executable, __file__, "--hold", *own]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes[first] = process
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            what, name, at = line.split()
            with self.news:
                self.heard[what, name] = float(at)
                self.news.notify_all()

    def times(self, what: str, names: list[str], since: float = 0.0) -> list[float]:
        """When each of these said it, once all did."""

        def said() -> bool:
            return all(self.heard.get((what, name), -1.0) >= since for name in names)

        with self.news:
            if not self.news.wait_for(said, WITHIN_S):
                late = [n for n in names if self.heard.get((what, n), -1.0) < since]
                raise SystemExit(f"{len(late)} members did not say {what!r}: {late[:3]}")
            return [self.heard[what, name] for name in names]

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def measured(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    names = [name_of(number) for number in range(chosen.members)]
    began = time.perf_counter()
    enlist(folder, names)
    enlisted_s = time.perf_counter() - began
    with desk(folder) as (port, processes), Roster(folder / "members.sqlite") as roster:
        asker = NodeKey.create(folder / "asker.key")
        sites = Sites(folder, port)
        try:
            began = time.time()
            for first in range(0, chosen.members, chosen.killed):
                sites.start(first, min(chosen.killed, chosen.members - first))
            here_s = max(sites.times("here", names)) - began
            time.sleep(min(75.0, 1.5 * chosen.idle_s))  # until polls are as long as they become
            idle = cpu_percent(processes, chosen.idle_s)
            told("all here", here_s=here_s, **idle)
            memory = {what: one.memory_info().rss for what, one in processes.items()}
            first = asked(roster, asker, names, 1, sites, lambda: None)

            told("a task for all", **first)
            back: list[float] = []

            def kill() -> None:
                sites.times("task", names[: chosen.killed], since=time.time() - 5)
                sites.processes[0].send_signal(signal.SIGKILL)
                sites.processes[0].wait()
                back.append(time.time())
                sites.start(0, chosen.killed)

            second = asked(roster, asker, names, 2, sites, kill)
            back_s = max(sites.times("here", names[: chosen.killed], since=back[0])) - back[0]
            peak = {what: one.memory_info().rss for what, one in processes.items()}
        finally:
            sites.end()
    return {
        "enlisted_s": enlisted_s,
        "here_s": here_s,
        "idle": idle,
        "memory": memory,
        "peak": peak,
        "first": first,
        "second": second,
        "back_s": back_s,
    }


@contextlib.contextmanager
def desk(folder: Path) -> Iterator[tuple[int, dict[str, psutil.Process]]]:
    command = [sys.executable, __file__, "--desk", str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port, door = json.loads(process.stdout.readline())
            yield port, {"desk": psutil.Process(process.pid), "door": psutil.Process(door)}
        finally:
            process.stdin.close()


def enlist(folder: Path, names: list[str]) -> None:
    """Make members of them, with keys and certificates, as joining would one by one."""
    authority = keep_member_authority(folder)
    with Roster(folder / "members.sqlite") as roster, roster.together():
        for name in names:
            key = NodeKey.create(folder / name)
            roster.redeem(roster.invite(name, 600), name, key.public_pem, FACTS)
            pem, _ = member_certificate(authority, key.public_pem, key.fingerprint)
            (folder / f"{name}.pem").write_bytes(plain_pem(folder / name) + pem.encode())


def plain_pem(file: Path) -> bytes:
    """A key as TLS libraries read it: a thousand with passphrases take minutes."""
    private = serialization.load_ssh_private_key(file.read_bytes(), None)
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def cpu_percent(processes: dict[str, psutil.Process], seconds: float) -> dict[str, float]:
    """Of one core, over some time."""
    before = {what: sum(one.cpu_times()[:2]) for what, one in processes.items()}
    time.sleep(seconds)
    return {
        what: 100 * (sum(one.cpu_times()[:2]) - before[what]) / seconds
        for what, one in processes.items()
    }


def asked(
    roster: Roster,
    asker: NodeKey,
    names: list[str],
    number: int,
    sites: Sites,
    meanwhile: Callable[[], None],
) -> dict[str, Any]:
    """One task for all, as photon.engines.remote gives it; seconds from before it is opened."""
    began = time.time()
    text = json.dumps({"round": number, "config": random.Random(number).randbytes(1800).hex()})
    signed = [
        json.dumps(
            {"ask": text.ljust(ASK_BYTES), "signature": sign_document(asker, ASK, text.encode())}
        )
        for _ in names
    ]
    opened = time.time()
    letters: set[str] = set()
    with roster.together():
        for name, message in zip(names, signed, strict=True):
            task = f"{RUN}/fit/{number}/{name}"
            roster.tasks.open(
                OpenTask(*(task, RUN, number, name, "fit", opened, opened + 600, 1), ("a/",), ())
            )
            letters.add(roster.letters.push(task, message.encode()))
    pushed = time.time()
    meanwhile()
    taken = sites.times("task", names, since=opened)
    if late := [
        (name, one - opened) for name, one in zip(names, taken, strict=True) if one - opened > 5
    ]:
        print(f"late: {late[:5]}", file=sys.stderr)
    times = sorted(one - opened for one in taken)
    missing = set(letters)
    give_up = time.monotonic() + WITHIN_S
    while missing and time.monotonic() < give_up:
        roster.letters.wait(1.0)
        missing -= roster.letters.pull(missing).keys()
    if missing:
        raise SystemExit(f"{len(missing)} of {len(letters)} answers did not come")
    return {
        "signed_s": opened - began,
        "pushed_s": pushed - opened,
        "median_s": statistics.median(times),
        "p99_s": times[min(len(times) - 1, int(0.99 * len(times)))],
        "last_s": times[-1],
        "answered_s": time.time() - opened,
    }


def told(what: str, **figures: float) -> None:
    """Progress: the whole takes minutes."""
    shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"{what}: {shown}", file=sys.stderr, flush=True)


def table(chosen: argparse.Namespace, found: dict[str, Any]) -> str:
    first, second = found["first"], found["second"]
    lines = [
        f"| {chosen.members} members, {chosen.killed} of them killed | desk | door |",
        "|---|---|---|",
        "| CPU while idle, % of a core | {desk:.1f} | {door:.1f} |".format(**found["idle"]),
        *(
            "| memory {}, MB | {:.0f} | {:.0f} |".format(
                when, found[key]["desk"] / 1e6, found[key]["door"] / 1e6
            )
            for when, key in (("while idle", "memory"), ("at the end", "peak"))
        ),
        "",
        "| seconds | a task for all | another, some killed |",
        "|---|---|---|",
        *(
            f"| {words} | {first[key]:.2f} | {second[key]:.2f} |"
            for words, key in (
                ("signing all Asks", "signed_s"),
                ("opening and sending all, one transaction", "pushed_s"),
                ("delivered, median", "median_s"),
                ("delivered, 99 of 100", "p99_s"),
                ("delivered, the last", "last_s"),
                ("answered by all", "answered_s"),
            )
        ),
        "",
        f"Joined in bulk in {found['enlisted_s']:.0f} s; all connected after "
        f"{found['here_s']:.0f} s; those killed were back after {found['back_s']:.1f} s.",
    ]
    return "\n".join(lines)


# --- members -------------------------------------------------------------------------------------


async def held(folder: Path, port: int, numbers: range) -> None:
    """Members, for as long as this process."""
    ca = folder / "ca.crt"
    room = asyncio.Semaphore(HANDSHAKES)
    async with asyncio.TaskGroup() as group:
        for number in numbers:
            one = Member(folder, port, ca, name_of(number), room)
            group.create_task(one.poll())
            group.create_task(one.be_here())


class Member:
    """A node's courier and reporter, without a node."""

    def __init__(
        self, folder: Path, port: int, ca: Path, name: str, room: asyncio.Semaphore
    ) -> None:
        self.name = name
        self.key = NodeKey.load(folder / name)
        self.port = port
        self.trust = ssl.create_default_context(cafile=str(ca))
        self.trust.load_cert_chain(folder / f"{name}.pem")
        self.audience = certificate_fingerprint(ca.read_text())
        self.boot = os.urandom(8).hex()
        self.room = room
        self.have: set[str] = set()
        self.answers: set[asyncio.Task[None]] = set()
        self.polled = False

    def say(self, what: str) -> None:
        print(what, self.name, time.time(), flush=True)

    async def poll(self) -> None:
        line, patience_s = Line(self), POLL_PATIENCE_S
        while True:
            try:
                self.polled = True
                said = {PATIENCE_HEADER: f"{patience_s:.0f}"}
                body = {"boot": self.boot, "have": sorted(self.have)}
                answer = await line.ask("task", body, said)
                patience_s = answer.get("patience_s", POLL_PATIENCE_S)
            except OSError as error:
                print(f"{self.name}: {error}", file=sys.stderr)
                await asyncio.sleep(random.uniform(0.5, 2.0))
                continue
            letter = answer["letter"]
            if letter is not None:
                self.say("task")
                base64.b64decode(letter["message"])
                self.have.add(letter["id"])
                self.answers.add(asyncio.create_task(self.answer(letter["id"])))

    async def answer(self, letter: str) -> None:
        await asyncio.sleep(random.uniform(2.0, 6.0))  # trains
        text = os.urandom(REPLY_BYTES // 2).hex().encode()
        signature = sign_document(self.key, RECEIPT, text)
        own = {"signature": signature, "fingerprint": self.key.fingerprint}
        body = {"text": base64.b64encode(text).decode(), **own}
        line = Line(self)
        await line.ask("reply", {"boot": self.boot, "letter": letter, "answer": body})
        line.close()
        self.have.discard(letter)

    async def be_here(self) -> None:
        line, here = Line(self), False
        while True:
            every_s = 5.0
            try:
                answer = await line.ask("presence", asdict(Presence("idle", boot=self.boot)))
                every_s = answer.get("next_s", every_s)
                if not here and self.polled:
                    self.say("here")
                    here = True
            except OSError as error:
                print(f"{self.name}: {error}", file=sys.stderr)
            await asyncio.sleep(every_s)


class Line:
    """One connection to the door, made when it is needed."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self, what: str, body: dict[str, Any], said: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The desk's answer; OSError where it has none."""
        one, path = self.member, f"/photon/v2/{what}"
        content = json.dumps(body).encode()
        try:
            if self.streams is None:
                async with one.room:
                    self.streams = await asyncio.open_connection(
                        "127.0.0.1", one.port, ssl=one.trust, server_hostname="127.0.0.1"
                    )
            reader, writer = self.streams
            signed = sign_request(
                one.key, "POST", path, content, now=time.time(), audience=one.audience
            )
            lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(content)}"]
            lines += [f"{name}: {value}" for name, value in (signed | (said or {})).items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + content)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
            found = json.loads(await reader.readexactly(length))
            if head.split()[1] != "200":
                raise OSError(f"{head.split()[1]} to {what}: {found}")
        except (EOFError, ValueError, OSError) as error:
            self.close()
            raise OSError(f"{type(error).__name__}: {error}") from error
        return found

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].transport.abort()
        self.streams = None


if __name__ == "__main__":
    main()
