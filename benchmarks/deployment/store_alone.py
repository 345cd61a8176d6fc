"""The aggregator's store by itself: as many clients at once as there are silos, in the clear."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployment.federation import Federation

#: Distinct text that the store is tried with; its objects are as large as Photon's.
_CHUNK_BYTES, _CHUNKS = 16 << 20, 4


def store_by_itself(federation: Federation, count: int) -> dict[str, float]:
    """MB/s of as many clients as there are silos, each writing and then reading so many bytes.

    They use Photon's transfer, on loopback and in the clear: no door, no TLS, no grants.
    """
    record = json.loads((federation.run / "serve.json").read_text(encoding="utf-8"))
    chunk = min(_CHUNK_BYTES, count)
    task = {"record": record, "chunk": chunk, "objects": math.ceil(count / chunk)}
    script, told = str(Path(__file__).resolve()), dict[str, float]()
    with contextlib.ExitStack() as ends:
        clients = [
            ends.enter_context(
                subprocess.Popen(
                    [sys.executable, script, json.dumps(task | {"name": name})],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for name in federation.silos
        ]
        for client in clients:
            ends.callback(client.kill)
        for verb in ("ready", "put", "get", "delete"):
            for client in clients:
                assert client.stdin is not None
                client.stdin.write(f"{verb}\n")
                client.stdin.flush()
            spans = [json.loads(_line(client)) for client in clients]
            span_s = max(one["ended"] for one in spans) - min(one["started"] for one in spans)
            told[verb] = task["objects"] * chunk * len(clients) / max(span_s, 1e-9) / 1e6
    return told


def _line(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise SystemExit("the store by itself could not be measured: see above")
    return line


def store_client(task: Mapping[str, Any]) -> None:
    """Does what standard input says, a word a line, and prints when it began and ended."""
    import random
    from hashlib import sha256

    from photon.store.object_store import open_store
    from photon.store.transfer import Transfer, Wanted

    record = task["record"]
    options = dict(record["store_options"])
    if record["secrets"] is not None:
        options |= json.loads(Path(record["secrets"]).read_text(encoding="utf-8"))
    store = open_store(record["store"], options)
    draw = random.Random(task["name"])
    chunks = [draw.randbytes(task["chunk"]) for _ in range(min(_CHUNKS, task["objects"]))]
    hashes = [sha256(chunk).hexdigest() for chunk in chunks]
    keys = [f"bench/{task['name']}/{number}" for number in range(task["objects"])]
    turn = range(len(keys))
    carrier = Transfer(store, streams=8)

    def get() -> None:
        wanted = (Wanted(keys[one], task["chunk"], hashes[one % len(hashes)]) for one in turn)
        for _ in carrier.fetch(wanted):
            pass

    verbs = {
        "ready": lambda: None,
        "put": lambda: carrier.send((keys[one], chunks[one % len(chunks)]) for one in turn),
        "get": get,
        "delete": lambda: store.delete(keys),
    }
    for line in sys.stdin:
        started = time.time()
        verbs[line.strip()]()
        print(json.dumps({"started": started, "ended": time.time()}), flush=True)


if __name__ == "__main__":
    store_client(json.loads(sys.argv[1]))
