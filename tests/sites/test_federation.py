"""Across hosts: the same weights as on one machine, thirty kills in one run, and an attacker."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.sites, pytest.mark.timeout(1800)]

RUN = """
[run]
name = "sites"
seed = 11

[model]
preset = "tiny"

[data]
path = "{data}"
sequence_length = 32

[federation]
rounds = {rounds}
silence_s = 45
optimizer_state = "keep"

[local]
steps = {steps}
batch_size = 4
lr = 2e-3

[compute]
device = "cpu"
threads = 1

[outer]
name = "nesterov"
lr = 0.7

[link]
update_codec = "{codec}"

[eval]
every = 4
max_tokens = 2000
"""


def run_file(data: Path, *, rounds: int, steps: int, codec: str = "fp32") -> str:
    return RUN.format(data=data, rounds=rounds, steps=steps, codec=codec)


def simulated(text: str, folder: Path) -> dict[str, Any]:
    """The same run on one machine."""
    folder.mkdir()
    (folder / "run.toml").write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "photon.cli.main", "simulate", str(folder / "run.toml")),
            *("--run-dir", str(folder / "run"), "--quiet", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return json.loads(done.stdout)


def test_five_hosts_train_what_one_machine_simulates(make_federation, silo_data, tmp_path) -> None:
    text = run_file(silo_data, rounds=4, steps=6, codec="int8")
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text)
    federation.begin()
    summary = federation.await_end(within_s=600)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["bytes_up"] == expected["bytes_up"]
    rounds = federation.audit()
    assert [one["body"]["round"] for one in rounds] == [1, 2, 3, 4]
    for one in rounds:
        assert [merged["silo"] for merged in one["body"]["merged"]] == federation.silos


class Killer:
    """Kills whatever is named, with -9, and counts what really died."""

    def __init__(self, federation: Any, draw: random.Random) -> None:
        self.federation = federation
        self.draw = draw
        self.killed: dict[str, int] = {}

    def strike(self, what: str) -> bool:
        """Kill one of a kind; whether there was one."""
        pid = self._pid(what)
        if pid is None:
            return False
        if what == "aggregator":
            serving = self.federation.serving
            serving.kill()
            serving.wait()
            self.federation.serve()
        else:
            import os
            import signal

            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
        self.killed[what] = self.killed.get(what, 0) + 1
        return True

    def _pid(self, what: str) -> int | None:
        federation = self.federation
        if what in ("trainer", "supernode", "shim"):
            home = federation.node_home(self.draw.choice(federation.silos))
            return federation.pid(home, what)
        if what == "serverapp":
            return federation.server_app()
        if what == "aggregator":
            return federation.serving.pid if federation.serving.poll() is None else None
        return federation.pid(federation.home, what)


KINDS = ["trainer", "supernode", "shim", "superlink", "superexec", "serverapp", "store"]
KILLS = 30
#: Enough that the last kill finds the run at work, on a machine with nothing else to do too.
ROUNDS = 40


def test_thirty_kills_lose_nothing_and_merge_nothing_twice(
    make_federation, silo_data, tmp_path
) -> None:
    text = run_file(silo_data, rounds=ROUNDS, steps=16)
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text)
    federation.begin()
    draw = random.Random(5)
    killer = Killer(federation, draw)
    # Each kind four times, and the whole aggregator twice.
    plan = KINDS * 4 + ["aggregator"] * 2
    draw.shuffle(plan)
    assert len(plan) == KILLS
    deadline = time.monotonic() + 300
    while not federation.events("round_started"):
        assert time.monotonic() < deadline, federation.log()
        time.sleep(0.2)
    for what in plan:
        time.sleep(draw.uniform(0.5, 12.0))
        until = time.monotonic() + 180
        while not killer.strike(what):
            assert federation.summary() is None, f"the run was over after {killer.killed}"
            assert time.monotonic() < until, f"no {what} came up again in 180 s"
            time.sleep(0.2)
    summary = federation.await_end(within_s=900)
    assert sum(killer.killed.values()) == KILLS
    assert {one: killer.killed[one] for one in KINDS} == dict.fromkeys(KINDS, 4)
    # Nothing was lost, and nothing counted twice: the very same weights.
    assert summary["weights_sha256"] == expected["weights_sha256"]
    rounds = federation.audit()
    assert [one["body"]["round"] for one in rounds] == list(range(1, ROUNDS + 1))
    assert all(len(one["body"]["merged"]) == 4 for one in rounds)
