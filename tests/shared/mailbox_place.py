"""A mailbox with a desk before it, members' clients, and what stands for a site's trainer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from photon.deploy.desk import Desk, DeskLimits
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask, SignedReply
from photon.membership.roster import ROSTER_FILE, Facts, Roster
from photon.membership.signing import sign_request
from photon.silo.desk_client import Delivery, DeskClient
from photon.silo.socket import bytes_of, frame, unframe
from photon.store.presign import S3Presigner

RUN = "f" * 32
ASK = b'{"an": "ask", "of": "any bytes \xc3\xa9"}'
#: What takes no time takes no longer than this, s, on a machine that does other things as well.
AT_ONCE_S = 2.0
POLL_S = 4 * AT_ONCE_S


def answer(text: bytes = b"a reply, which is the loop's to read \xff") -> SignedReply:
    return SignedReply("", text, "c2lnbmVk", "sha256:" + "1" * 64)


class Place:
    """The two sides of a roster's file, a desk between, and members' clients."""

    def __init__(self, folder: Path, *, poll_s: float = POLL_S) -> None:
        self.folder, self._poll_s = folder, poll_s
        self.loop = Roster(folder / ROSTER_FILE)
        self.others = Roster(folder / ROSTER_FILE)
        self.pool = ThreadPoolExecutor(16)
        self.desk: Desk | None = None
        self.keys: dict[str, NodeKey] = {}
        self.start()

    def start(self, port: int = 0) -> None:
        signer = S3Presigner("https://s", "b", region="r", access_key_id="a", secret="s")
        self.desk = Desk(self.others, signer, limits=DeskLimits(poll_s=self._poll_s))
        self.desk.start(port)
        self.port = self.desk.port

    def close(self) -> None:
        assert self.desk is not None
        self.desk.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.loop.close()
        self.others.close()

    def member(self, name: str) -> DeskClient:
        key = self.keys[name] = NodeKey.create(self.folder / f"{name}.key")
        facts = Facts("d" * 64, "e" * 64, 1000, "0.1.0")
        self.loop.redeem(self.loop.invite(name, 60), name, key.public_pem, facts)
        return self.client(name)

    def client(self, name: str) -> DeskClient:
        return DeskClient(f"http://127.0.0.1:{self.port}", None, self.keys[name])

    def ask(self, name: str, message: bytes = ASK, *, number: int = 1, until_s: float = 60) -> str:
        """As the loop does; what the answer is called."""
        self.open(name, number=number, until_s=until_s)
        return self.loop.letters.push(f"{RUN}/fit/{number}/{name}", message)

    def open(self, name: str, *, number: int = 1, until_s: float = 60) -> None:
        now = time.time()
        one = f"{RUN}/fit/{number}/{name}"
        self.loop.tasks.open(
            OpenTask(one, RUN, number, name, "fit", now, now + until_s, 0, readable=(), writable=())
        )

    def took(self, letter: str, within_s: float = 20.0) -> SignedReply | str:
        """What the loop gets for a letter."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            self.loop.letters.wait(0.5)
            if found := self.loop.letters.pull([letter]):
                return found[letter]
        raise AssertionError("no answer came")

    @contextlib.contextmanager
    def cut_poll(self, name: str) -> Iterator[None]:
        """A node that polls, and is gone when the block ends."""
        body, path = b'{"boot": "one", "have": []}', "/photon/v2/task"
        signed = sign_request(self.keys[name], "POST", path, body, now=time.time())
        signed["photon-patience"] = "180"
        lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in signed.items()]
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as line:
            line.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            yield

    def waiting(self) -> int:
        """How many polls the desk holds."""
        assert self.desk is not None
        return self.desk.polls.count()

    def poll(self, client: DeskClient, *have: str, boot: str = "one") -> Future[Delivery | None]:
        """A poll that has begun to wait, if there is nothing to wait for."""
        found = self.pool.submit(client.task, boot, have)
        time.sleep(0.3)
        return found


class Trainer(threading.Thread):
    """Stands for a site's trainer: hears one question after another, at a Unix socket."""

    def __init__(self, path: Path, says: Callable[[bytes], dict[str, Any] | None]) -> None:
        super().__init__(daemon=True)
        self.says = says
        self.asked: list[bytes] = []
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        self.server.bind(str(path))
        self.server.listen()
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                received = bytearray()
                while (question := unframe(received)) is None:
                    received += connection.recv(1 << 16)
                self.asked.append(bytes_of(question, "ask"))
                said = self.says(self.asked[-1])
                if said is not None:  # else it dies over it
                    with contextlib.suppress(OSError):  # nobody listens any more
                        connection.sendall(frame(said))

    def end(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
