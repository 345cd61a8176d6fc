"""A whole run over Flower: two sites, and the weights of the same run on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flower_programs import Flower, needs_flower

from photon.deploy import tether
from photon.deploy.ports import free_ports
from photon.membership.roster import ROSTER_FILE, Roster

pytestmark = [pytest.mark.flower, needs_flower, pytest.mark.timeout(900)]

PHOTON = (sys.executable, "-m", "photon.cli.main")
SILOS = ("lab-a", "lab-b")
ROUNDS = 3

RUN = """
run = {{ name = "over-flower", seed = 11 }}
model = {{ preset = "tiny" }}
data = {{ path = "{data}", sequence_length = 32 }}
federation = {{ rounds = {rounds}, optimizer_state = "keep" }}
local = {{ steps = 4, batch_size = 4, lr = 2e-3 }}
compute = {{ device = "cpu", threads = 1 }}
outer = {{ name = "nesterov", lr = 0.7 }}
link = {{ update_codec = "int8" }}
eval = {{ every = 2, max_tokens = 2000 }}

[serve]
listen = "127.0.0.1:{port}"
host = "127.0.0.1"
home = "{home}"
control = "flower"
min_silos = 2
min_free_gib = 0.5
"""


def photon(*words: Any) -> str:
    done = subprocess.run(
        [*PHOTON, *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def awaited(what: str, true: Any, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.2)


def test_a_run_over_flower_trains_what_one_machine_simulates(tmp_path, prepare_text) -> None:
    data = prepare_text(tmp_path / "text", dict.fromkeys(SILOS, 16))
    home, run, (port,) = tmp_path / "server", tmp_path / "run", free_ports(1)
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(data=data, home=home, port=port, rounds=ROUNDS))
    node_file = tmp_path / "node.toml"
    mine = f'data = {{ path = "{data}" }}\ncompute = {{ device = "cpu", threads = 1 }}'
    node_file.write_text(mine)
    alone = photon("simulate", file, "--run-dir", tmp_path / "alone", "--quiet", "--json")
    with contextlib.ExitStack() as ends:

        def start(name: str, *words: Any) -> None:
            tied = [sys.executable, str(Path(tether.__file__)), "run", str(os.getpid())]
            log = ends.enter_context((tmp_path / f"{name}.log").open("wb"))
            process = subprocess.Popen([*tied, *PHOTON, *map(str, words)], stdout=log, stderr=log)
            ends.callback(process.wait, 60)
            ends.callback(process.terminate)

        start("serve", "serve", file, "--run-dir", run, "--quiet")
        awaited("the desk is up", (home / "operator.sock").exists, 180)
        for silo in SILOS:
            invitation = tmp_path / f"{silo}.invitation.toml"
            photon("invite", silo, "--run-file", file, "--out", invitation)
            words = ("--invite", invitation, "--node", node_file, "--home", tmp_path / silo)
            start(silo, "join", *words)
        roster = ends.enter_context(Roster(home / ROSTER_FILE))
        # Both are here, both are asked, and the desk gives neither its question.
        awaited("both are asked", lambda: len(roster.letters.unanswered()) == 2, 240)
        sites = {silo: tmp_path / silo for silo in SILOS}
        flower = ends.enter_context(Flower(tmp_path / "flower", home, sites))
        awaited("the run is over", (run / "summary.json").exists, 400)
        # The app ends with the run, as `flwr list` would say.
        flower.await_log("superlink", "Finished task")
    over = json.loads((run / "summary.json").read_text())
    assert over["weights_sha256"] == json.loads(alone)["weights_sha256"]
    photon("audit", run)
    assert over["rounds"] == ROUNDS
