"""Somebody with the authority's certificate and a cable: what the door lets through."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import pytest

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]

#: Asks the door for paths, over TLS that trusts the authority; prints {path: status}.
ASK = """
import http.client, json, ssl, sys
address, ca, requests = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
context = ssl.create_default_context(cafile=ca)
found = {}
for method, path, body, headers in requests:
    door = http.client.HTTPSConnection(address, 8443, context=context, timeout=20)
    door.request(method, path, body=body.encode() if body else None, headers=headers)
    answer = door.getresponse()
    found[method + " " + path] = [answer.status, answer.read(2000).decode(errors="replace")]
    door.close()
print(json.dumps(found))
"""

#: Which TCP ports of an address answer.
SCAN = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def open_(port):
    with socket.socket() as one:
        one.settimeout(1.0)
        return one.connect_ex((sys.argv[1], port)) == 0
with ThreadPoolExecutor(200) as pool:
    every = range(1, 65536)
    ports = [port for port, found in zip(every, pool.map(open_, every)) if found]
print(json.dumps(ports))
"""


#: Asks the desk for leave with a member's key, for what is not that member's.
TASK = """
import json, sys
from pathlib import Path
from photon.errors import PhotonError
from photon.membership.keys import NodeKey
from photon.silo.desk_client import DeskClient
place, ca, key = sys.argv[1:]
try:
    DeskClient(place, Path(ca), NodeKey.load(Path(key))).task("one", ())
    told = "given"
except PhotonError as error:
    told = type(error).__name__
print(json.dumps(told))
"""

GRANTS = """
import json, sys
from pathlib import Path
from photon.errors import PhotonError
from photon.membership.keys import NodeKey
from photon.silo.desk_client import DeskClient
address, ca, key, task, wants = sys.argv[1:6]
book = DeskClient(address, Path(ca), NodeKey.load(Path(key))).grants(task)
found = {}
for verb, name in json.loads(wants):
    try:
        grant = book(verb, name, 4, "0" * 64)
        found[verb + " " + name] = "granted"
    except PhotonError as error:
        found[verb + " " + name] = f"{error.exit_code}: {error.message}"
print(json.dumps(found))
"""

RUN = """
[run]
name = "attacked"

[model]
preset = "tiny"

[data]
path = "{data}"
sequence_length = 32

[federation]
rounds = 200
silence_s = 60

[local]
steps = 20
batch_size = 4

[compute]
device = "cpu"
threads = 1

[eval]
every = 0
max_tokens = 1000
"""


def test_an_attacker_with_the_certificate_and_a_cable(make_federation, silo_data, tmp_path) -> None:
    federation = make_federation(
        RUN.format(data=silo_data), silo_data, extra_hosts=["mallory"], only=["lab-a", "lab-b"]
    )
    federation.begin()
    _wait_for_rounds(federation, 1, 300)
    mallory = federation.network["mallory"]
    aggregator = federation.network["aggregator"]
    ca = federation.home / "ca.crt"

    # One port, and no other.
    assert mallory.python(SCAN, aggregator.address, timeout_s=400) == [8443]

    # Behind it: the desk, which wants a member's certificate and signature, or an invitation;
    # presigned paths of the store. Nothing else answers, and those not without a certificate.
    run_id = json.loads((federation.run / "serve.json").read_text())["run_id"]
    nothing = [
        *("/v1/fleet/pull-messages", "/photon/v1/presence", "/photon/v2", "/health"),
        *("/docs", "/openapi.json", "/photon//v2/task", "/operator/status"),
        *("/photon/v2/../../operator/status", "/photon/v2/%2e%2e/operator/drain", "/metrics"),
        *("/dir/status", "/cluster/status", "/vol/vacuum", "/photon?list-type=2", "/photon"),
    ]
    key = f"/photon/{run_id}/global/state"
    asked = [["POST", path, "{}", {}] for path in nothing]
    asked += [["GET", path, "", {}] for path in nothing]
    asked += [["GET", key, "", {}], ["PUT", key, "evil", {}], ["DELETE", key, "", {}]]
    answers = _ask(mallory, aggregator.address, ca, asked)
    assert {
        words: status for words, (status, _) in answers.items() if status not in (401, 404)
    } == {}
    forged = f"{key}?X-Amz-Signature={'0' * 64}&X-Amz-Algorithm=AWS4-HMAC-SHA256"
    closed = _ask(
        mallory,
        aggregator.address,
        ca,
        [
            ["GET", forged, "", {}],
            ["PUT", forged, "evil", {}],
            ["POST", "/photon/v2/grants", "{}", {}],
            ["POST", "/photon/v2/presence", "{}", {}],
            ["POST", "/photon/v2/join", json.dumps({"token": "x" * 43, "name": "mallory"}), {}],
            ["POST", "/photon/v2/task", "{}", {}],
            ["POST", "/photon/v2/reply", "{}", {}],
        ],
    )
    for words, (status, text) in closed.items():
        assert 400 <= status < 500, (words, status, text)
        assert status == 401 or words.endswith("/join"), (words, status, text)

    # With a key of its own that nobody invited there are no tasks.
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    mallory.python(
        "import sys; from pathlib import Path; from photon.membership.keys import NodeKey; "
        "NodeKey.create(Path(sys.argv[1])); print('null')",
        str(stranger / "node.key"),
    )
    place = f"{aggregator.address}:8443"
    told = mallory.python(TASK, place, str(ca), str(stranger / "node.key"))
    assert told == "UnknownMemberError"

    # A member's key opens that member's task only.
    task = f"{run_id}/fit/{_round(federation)}/lab-b"
    stolen = tmp_path / "stolen.key"
    shutil.copy(federation.node_home("lab-a") / "node.key", stolen)
    stolen.chmod(0o600)
    wants = [
        ["GET", f"{run_id}/silos/lab-b/update/round-000001/x.json"],
        ["PUT", f"{run_id}/silos/lab-b/update/round-000001/lab-b-{'0' * 16}.json"],
        ["PUT", f"{run_id}/global/state/round-000001/{'0' * 64}.json"],
    ]
    told = mallory.python(GRANTS, place, str(ca), str(stolen), task, json.dumps(wants))
    assert all(words != "granted" for words in told.values()), told

    # All of it was seen, and the run went on.
    before = len(federation.events("round_finished"))
    _wait_for_rounds(federation, before + 2, 120)


def _wait_for_rounds(federation: Any, rounds: int, timeout_s: float) -> None:
    """Until so many rounds were finished since the federation began."""
    until = time.monotonic() + timeout_s
    while len(federation.events("round_finished")) < rounds:
        assert time.monotonic() < until, federation.log()
        time.sleep(0.3)


def _ask(host: Any, address: str, ca: Any, requests: list[list[Any]]) -> dict[str, Any]:
    return host.python(ASK, address, str(ca), json.dumps(requests), timeout_s=200)


def _round(federation: Any) -> int:
    return federation.events("round_started")[-1]["round"]
