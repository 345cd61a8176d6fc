"""A trainer for tests: answers on a unix socket, does each task once, remembers its answers.

python flower_trainer.py SOCKET FOLDER NAME
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path

from photon.membership.records import SignedReply
from photon.silo.socket import answer_of, bytes_of, frame, unframe


def main() -> None:
    path, folder, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)
    working = threading.Lock()
    while True:
        connection, _ = listener.accept()
        threading.Thread(
            target=serve, args=(connection, folder, name, working), daemon=True
        ).start()


def serve(connection: socket.socket, folder: Path, name: str, working: threading.Lock) -> None:
    with connection:
        received = bytearray()
        while (record := unframe(received)) is None:
            received += connection.recv(1 << 16)
        text = bytes_of(record, "ask")
        ask = json.loads(text)
        log(folder, f"asked {ask['task']}")
        with working:
            answer = folder / f"{ask['task']}.answer"
            if not answer.exists():
                time.sleep(ask.get("work_s", 0))
                while (gate := ask.get("gate")) and not Path(gate).exists():
                    time.sleep(0.02)
                partial = answer.with_suffix(".partial")  # the test kills this process
                partial.write_text(f"{name} did {ask['task']} ({len(text)} bytes)")
                partial.replace(answer)
                log(folder, f"trained {ask['task']}")
        reply = SignedReply("", answer.read_bytes(), f"signed by {name}", f"sha256:{name}")
        connection.sendall(frame(answer_of(reply)))


def log(folder: Path, words: str) -> None:
    with (folder / "log.txt").open("a") as file:
        file.write(words + "\n")


main()
