"""An aggregator's home with a desk that listens, and what anybody could ask of it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import httpx2

from photon.deploy.desk import Desk
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask
from photon.membership.roster import Facts, Roster
from photon.membership.signing import sign_request
from photon.store.presign import S3Presigner

RUN = "0" * 32
#: What a task of these tests may write, besides chunks.
WRITTEN = ("a", "b", *(f"part-{n}" for n in range(100)), *(f"p{n}" for n in range(5)))
DATA = b"some of an update"
SHA = hashlib.sha256(DATA).hexdigest()
FACTS = {
    "data_sha256": "a" * 64,
    "tokenizer_sha256": "b" * 64,
    "train_tokens": 1000,
    "photon_version": "0.1.0",
}


class Place:
    """An aggregator's home with a desk that listens, and members with their keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.roster = Roster(folder / "home" / "members.sqlite")
        self.socket = folder / "home" / "operator.sock"
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.desks: list[Desk] = []

    def presigner(self) -> S3Presigner:
        return S3Presigner(
            "https://store.example:8443",
            "photon",
            region="us-east-1",
            access_key_id="access",
            secret="very-secret",
        )

    def open(self, **options: Any) -> Desk:
        """Another desk, on a free port; `url` is the newest one's."""
        given: dict[str, Any] = {
            "on_event": lambda kind, detail: self.told.append((kind, detail)),
        }
        socket = options.pop("operator_socket", None)
        desk = Desk(self.roster, options.pop("presigner", self.presigner()), **given | options)
        self.desks.append(desk)
        desk.start(operator_socket=socket)
        self.url = f"http://127.0.0.1:{desk.port}"
        return desk

    def close(self) -> None:
        for desk in self.desks:
            desk.stop()
        self.roster.close()

    def key(self, name: str) -> NodeKey:
        path = self.folder / f"{name}.key"
        return NodeKey.load(path) if path.exists() else NodeKey.create(path)

    def member(self, name: str) -> NodeKey:
        """Somebody who joined."""
        key = self.key(name)
        token = self.roster.invite(name, 60)
        self.roster.redeem(token, name, key.public_pem, Facts(**FACTS))
        return key

    def task(self, name: str, *, most_bytes: int = 1000, until_s: float = 600.0) -> OpenTask:
        now = time.time()
        own = f"{RUN}/silos/{name}/"
        task = OpenTask(
            *(f"{RUN}/fit/1/{name}", RUN, 1, name, "fit", now, now + until_s, most_bytes),
            readable=(f"{RUN}/global/", own, f"{RUN}/one-key.json"),
            writable=(f"{own}chunks/{{sha256}}", *(own + key for key in WRITTEN)),
        )
        self.roster.tasks.open(task)
        return task

    def noted(self) -> list[str]:
        return [
            f"{one.actor}: {one.what}: {one.detail}" for one in self.roster.journal.events(1000)
        ]

    # --- requests, as anybody could make them ---

    def post(
        self,
        what: str,
        body: Any,
        key: NodeKey | None,
        *,
        now: float | None = None,
        signed_path: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = f"/photon/v2/{what}"
        signed = {}
        if key is not None:
            at = time.time() if now is None else now
            signed = sign_request(key, "POST", signed_path or path, content, now=at)
        return httpx2.post(
            self.url + path,
            content=content,
            headers={**signed, **(headers or {})},
            trust_env=False,
            timeout=20,
        )

    def join(self, token: str, name: str, key: NodeKey, **more: Any) -> httpx2.Response:
        signer = more.pop("signer", key)
        body = {"token": token, "name": name, "public_key": key.public_pem, "facts": FACTS}
        return self.post("join", body, signer, **more)

    def wants(self, key: NodeKey, task: str, *wants: dict[str, Any]) -> httpx2.Response:
        return self.post("grants", {"task_id": task, "wants": list(wants)}, key)


def refused(answer: httpx2.Response, status: int, code: int) -> str:
    """The words of a refusal, which is a JSON error of that status and code."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "hint"}
    assert error["code"] == code, error
    return error["message"]


def put(key: str, size: int = len(DATA), sha256: str = SHA) -> dict[str, Any]:
    return {"verb": "PUT", "key": key, "bytes": size, "sha256": sha256}


def own(name: str, key: str) -> str:
    return f"{RUN}/silos/{name}/{key}"
