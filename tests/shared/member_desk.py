"""A real desk with a roster, its members' clients and their tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from photon.deploy.desk import Desk
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask
from photon.membership.roster import Facts, Roster
from photon.silo.desk_client import DeskClient
from photon.store.presign import S3Presigner

RUN = "0" * 32
FACTS = Facts("a" * 64, "b" * 64, 1000, "0.1.0")


class Aggregator:
    """A desk without a door; `client` is a member's, over plain HTTP on this machine."""

    def __init__(self, folder: Path, presigner: S3Presigner, **options: Any) -> None:
        self.folder = folder
        self.roster = Roster(folder / "members.sqlite")
        self.desk = Desk(self.roster, presigner, **options)
        self.desk.start()
        self.address = f"http://127.0.0.1:{self.desk.port}"
        self.clients: list[DeskClient] = []

    def client(self, key: NodeKey | None, *, timeout_s: float = 20) -> DeskClient:
        self.clients.append(DeskClient(self.address, None, key, timeout_s=timeout_s))
        return self.clients[-1]

    def member(self, name: str) -> DeskClient:
        key = NodeKey.create(self.folder / f"{name}.key")
        token = self.roster.invite(name, 60)
        client = self.client(key)
        client.join(token, name, key.public_pem, FACTS)
        return client

    def task(self, name: str, *, most_bytes: int = 1 << 30) -> OpenTask:
        now = time.time()
        own = f"{RUN}/silos/{name}/"
        task = OpenTask(
            *(f"{RUN}/fit/1/{name}", RUN, 1, name, "fit", now, now + 600, most_bytes),
            readable=(f"{RUN}/global/", own),
            writable=(f"{own}chunks/{{sha256}}", f"{own}a", f"{own}b"),
        )
        self.roster.tasks.open(task)
        return task

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.desk.stop()
        self.roster.close()


def fake_store() -> S3Presigner:
    return S3Presigner("https://s", "box", region="r", access_key_id="a", secret="b")
