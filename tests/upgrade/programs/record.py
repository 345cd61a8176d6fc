"""Records what this version of Photon says between sites, and how it keeps it, for later versions.

    PYTHONPATH=tests/shared python tests/upgrade/programs/record.py FOLDER

FOLDER gets home.sql (the databases of an aggregator's home before the requests) and documents.json:
requests as a node sends them, with the answers, and sealed Asks with signed Replies. All keys are
made for this, and no private half of one is kept.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from envelope_documents import RUN_ID, ask, reply

from photon.deploy import desk_server
from photon.deploy.desk import Desk
from photon.deploy.desk_server import Caller
from photon.federation.envelopes import encoded, sealed
from photon.membership.keys import NodeKey
from photon.membership.records import Facts, OpenTask, Presence, SignedReply
from photon.membership.roster import Roster
from photon.membership.signing import RECEIPT, sign_document
from photon.silo.desk_client import DeskClient
from photon.store.presign import S3Presigner

#: Nothing that is recorded expires.
LONG_S = 3e9
FACTS = Facts("a" * 64, "b" * 64, 1000, "0.1.0")
CHUNK = "c" * 64


def main() -> None:
    """Record."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    requests: list[dict[str, Any]] = []
    add = desk_server.Routes.add

    def recorded(self: Any, method: str, path: str, handle: Any, most_bytes: int) -> None:
        async def both(caller: Caller) -> dict[str, Any]:
            answer = handle(caller)
            answer = await answer if asyncio.iscoroutine(answer) else answer
            kept = {"headers": _own(caller.headers), "body": caller.body.decode(), "answer": answer}
            requests.append({"at": time.time(), "method": method, "path": path, **kept})
            return answer

        add(self, method, path, both, most_bytes)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(desk_server.Routes, "add", recorded),
        Roster(Path(folder) / "members.sqlite") as roster,
    ):
        keys = {name: NodeKey.create(Path(folder) / name) for name in ("asker", "red", "blue")}
        token = _prepared(roster, keys)
        (out / "home.sql").write_text("\n".join(_dumped(sorted(Path(folder).glob("*.sqlite")))))
        presigner = S3Presigner("https://s", "box", region="r", access_key_id="a", secret="b")
        desk = Desk(roster, presigner)
        desk.start()
        address = f"http://127.0.0.1:{desk.port}"
        clients = {name: DeskClient(address, None, keys[name]) for name in ("red", "blue")}
        try:
            told = _said(clients, keys, token)
        finally:
            for client in clients.values():
                client.close()
            desk.stop()
    for one in told.values():
        one["aggregator_key"] = keys["asker"].public_pem
        one["key"] = keys["red"].public_pem
    document = {"requests": requests, "letters": told}
    (out / "documents.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _own(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("photon-")}


def _prepared(roster: Roster, keys: dict[str, NodeKey]) -> str:
    """A home in the middle of a run; the token of an invitation for blue."""
    now = time.time()
    roster.redeem(roster.invite("red", LONG_S), "red", keys["red"].public_pem, FACTS)
    token = roster.invite("blue", LONG_S)
    for number, kind in ((3, "fit"), (4, "fit")):
        task_id = f"{RUN_ID}/{kind}/{number}/red"
        own = f"{RUN_ID}/silos/red/"
        roster.tasks.open(
            OpenTask(
                *(task_id, RUN_ID, number, "red", kind, now, now + LONG_S, 1 << 30),
                readable=(f"{RUN_ID}/global/",),
                writable=(f"{own}chunks/{{sha256}}", f"{own}update.json"),
            )
        )
    text = encoded(reply())
    signature = sign_document(keys["red"], RECEIPT, text)
    kept = SignedReply("", text, signature, keys["red"].fingerprint, encoded(ask()))
    roster.tasks.close(f"{RUN_ID}/fit/3/red", kept)
    roster.letters.push(f"{RUN_ID}/fit/4/red", sealed(ask(), keys["asker"]))
    roster.all_seen({"red": (Presence("idle", boot="boot-1"), now)})
    roster.set_setting("run", "/srv/runs/med")
    roster.journal.note("198.51.100.7", "refused join", "no such invitation", refusal=True)
    roster.journal.note("operator", "drain", "")
    return token


def _dumped(paths: list[Path]) -> Iterable[str]:
    """SQL that makes each file again, after a line with its name."""
    for path in paths:
        db = sqlite3.connect(path)
        yield f"-- {path.name}"
        yield from db.iterdump()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        yield f"PRAGMA user_version = {version};"
        db.close()


def _said(
    clients: dict[str, DeskClient], keys: dict[str, NodeKey], token: str
) -> dict[str, dict[str, Any]]:
    """All that nodes ask; the Asks and Replies that went along, and others."""
    red, blue = clients["red"], clients["blue"]
    blue.join(token, "blue", keys["blue"].public_pem, FACTS)
    red.presence(
        Presence("training", RUN_ID, 4, 3, 9, f"{RUN_ID}/fit/4/red", "words", "boot-1", 5.5, 1e-3)
    )
    letter = red.task("boot-1", [])
    assert letter is not None
    key = f"{RUN_ID}/silos/red/chunks/{CHUNK}"
    wants = [
        {"verb": "GET", "key": f"{RUN_ID}/global/state.json"},
        {"verb": "PUT", "key": key, "bytes": 500, "sha256": CHUNK},
        {"verb": "GET", "key": "another/thing"},
    ]
    red.ask_grants(f"{RUN_ID}/fit/4/red", wants)
    red.standing()
    told: dict[str, dict[str, Any]] = {}
    for kind in ("fit", "evaluate", "refused"):
        asked = ask("evaluate" if kind == "evaluate" else "fit")
        own = {"evaluate": {"task": f"{RUN_ID}/evaluate/3/red"}}.get(kind, {})
        text = encoded(reply(kind, **own))
        signature = sign_document(keys["red"], RECEIPT, text)
        told[kind] = {
            "ask": sealed(asked, keys["asker"]).decode(),
            "ask_sha256": asked.sha256,
            "question_sha256": asked.question_sha256,
            "reply": text.decode(),
            "signature": signature,
        }
    signed = SignedReply(
        "", told["fit"]["reply"].encode(), told["fit"]["signature"], keys["red"].fingerprint
    )
    red.reply("boot-1", letter.id, signed)
    red.health()
    return told


if __name__ == "__main__":
    main()
