"""A ServerApp for tests: pushes the asks that lie in a folder, writes down what comes back.

Where there are words instead of an answer, it asks again, as photon.engines.remote does.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from photon.engines.flower.post import FlowerPost
from photon.engines.flower.server_app import make_app, run_folder
from photon.errors import DiskFullError, UnknownMemberError

_PAUSE_S = 0.5


def run(post: FlowerPost) -> None:
    folder = run_folder()
    write(folder / "loop.pid", str(os.getpid()))
    waiting: dict[str, Path] = {}
    later: dict[Path, float] = {}
    while True:
        for path in sorted((folder / "asks").glob("*.json")):
            answered = folder / "answers" / path.name
            if answered.exists() or path in waiting.values() or later.get(path, 0) > time.time():
                continue
            ask = json.loads(path.read_text())
            if ask.get("fail"):
                write(answered, "{}")
                raise DiskFullError("no room for a test", hint="Make some.")
            if ask.get("finish"):
                write(answered, "{}")
                return
            try:
                name = post.push(ask["silo"], path.read_bytes(), ttl_s=ask["until"] - time.time())
                waiting[name] = path
            except UnknownMemberError as error:
                note(folder, path, str(error))
                later[path] = time.time() + _PAUSE_S
        for name, answer in (post.pull(waiting) if waiting else {}).items():
            path = waiting.pop(name)
            if isinstance(answer, str):
                note(folder, path, answer)
                later[path] = time.time() + _PAUSE_S
                continue
            record = {
                "reply": answer.text.decode(),
                "signature": answer.signature,
                "fingerprint": answer.fingerprint,
            }
            write(folder / "answers" / path.name, json.dumps(record))
        write(folder / "present.json", json.dumps(sorted(post.present())))
        time.sleep(0.2)  # as photon.engines.remote


def write(path: Path, text: str) -> None:
    """Whole, or not at all: the test reads while this writes, and kills it."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def note(folder: Path, path: Path, words: str) -> None:
    with (folder / "words.txt").open("a") as file:
        file.write(f"{path.stem}: {words}\n")


app = make_app(run)
