"""Across hosts: the same weights as on one machine, thirty kills in one run, other machines."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import Any

import pytest
from site_runs import run_file, simulated

pytestmark = [pytest.mark.sites, pytest.mark.timeout(1800)]


def test_five_hosts_train_what_one_machine_simulates(make_federation, silo_data, tmp_path) -> None:
    text = run_file(silo_data, rounds=4, steps=6, codec="int8")
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, silo_data)
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
        elif what == "join":
            silo = self.draw.choice(self.federation.silos)
            joined = self.federation.joined[silo]
            joined.kill()
            joined.wait()
            self.federation.join(silo)
        else:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
        self.killed[what] = self.killed.get(what, 0) + 1
        return True

    def _pid(self, what: str) -> int | None:
        federation = self.federation
        if what == "trainer":
            home = federation.node_home(self.draw.choice(federation.silos))
            return federation.pid(home, what)
        if what == "join":
            return min(one.pid for one in federation.joined.values() if one.poll() is None)
        if what == "aggregator":
            return federation.serving.pid if federation.serving.poll() is None else None
        return federation.pid(federation.home, what)


KINDS = ["trainer", "join", "loop", "door", "store"]
KILLS = 30
#: Enough that the last kill finds the run at work, on a machine with nothing else to do too.
ROUNDS = 80


def test_thirty_kills_lose_nothing_and_merge_nothing_twice(
    make_federation, silo_data, tmp_path
) -> None:
    text = run_file(silo_data, rounds=ROUNDS, steps=16)
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, silo_data)
    federation.begin()
    draw = random.Random(5)
    killer = Killer(federation, draw)
    # Each kind five times, and the whole aggregator as often.
    plan = KINDS * 5 + ["aggregator"] * 5
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
    assert {one: killer.killed[one] for one in KINDS} == dict.fromkeys(KINDS, 5)
    # Nothing was lost, and nothing counted twice: the very same weights.
    assert summary["weights_sha256"] == expected["weights_sha256"]
    rounds = federation.audit()
    assert [one["body"]["round"] for one in rounds] == list(range(1, ROUNDS + 1))
    assert all(len(one["body"]["merged"]) == 4 for one in rounds)


def test_another_machine_takes_over_the_round_that_the_first_was_in(
    make_federation, pair, pair_data, tmp_path
) -> None:
    """docs/deploy.md's eight steps: copies at other paths, an address that nobody knew."""
    text = run_file(pair_data, rounds=5, steps=8)
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, pair_data, only=pair, extra_hosts=["spare"])
    federation.begin()
    started = lambda: [one["round"] for one in federation.events("round_started")]  # noqa: E731
    federation.wait("round 3 begins", lambda: 3 in started(), within_s=300)
    # Round 3 can't end: one silo answers it, the other is held.
    held = federation.pid(federation.node_home("lab-b"), "trainer")
    os.kill(held, signal.SIGSTOP)
    answered = lambda: "answered" in _of_round(federation, "lab-a", 3)  # noqa: E731
    federation.wait("lab-a's answer", answered, within_s=60)
    assert "answered" not in _of_round(federation, "lab-b", 3)
    federation.kill_aggregator()
    os.kill(held, signal.SIGCONT)
    federation.move("spare")
    assert not (tmp_path / "server").exists()
    assert not (tmp_path / "run").exists()
    federation.serve()
    federation.await_door()
    for silo in pair:
        federation.joined[silo].terminate()
        federation.joined[silo].wait(60)
        federation.join(silo, address=f"{federation.aggregator.address}:8443")
    summary = federation.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    rounds = federation.audit()
    assert [one["body"]["round"] for one in rounds] == [1, 2, 3, 4, 5]
    assert all(len(one["body"]["merged"]) == 2 for one in rounds)
    # What lab-a had finished it did not train again: it read that round's state once.
    assert federation.trainer_log("lab-a").count("the state after round 2") == 1


def test_a_silo_of_two_machines_trains_what_two_ranks_on_one_do(
    make_federation, pair, pair_data, tmp_path
) -> None:
    """lab-a's ranks are on two hosts, lab-b's on one; a rank is killed and the task done again."""
    ranks = 'processes = 2\nstrategy = "ddp"\n'
    text = run_file(pair_data, rounds=4, steps=12).replace("[compute]\n", f"[compute]\n{ranks}")
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, pair_data, only=pair, extra_hosts=["second"])
    for silo in pair:
        node = tmp_path / f"{silo}.toml"
        node.write_text(node.read_text().replace("[compute]\n", f"[compute]\n{ranks}"))
    federation.serve()
    federation.await_door()
    first, second = federation.network["lab-a"], federation.network["second"]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": first.address,
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    federation.join("lab-a", federation.invite("lab-a"), env={**common, "RANK": "0"})
    federation.join("lab-b", federation.invite("lab-b"))
    home = federation.node_home("lab-a")
    federation.wait("lab-a is a member", (home / "membership.json").exists, within_s=60)
    silo = f"{sys.executable} -m photon.silo --home {home} --node {tmp_path}/lab-a.toml"
    log = tmp_path / "second.log"
    second.start(
        *("sh", "-c", f"until {silo}; do echo again; sleep 1; done"),
        log=log,
        env={**common, "RANK": "1"},
    )
    trained = lambda: "round 2, step" in federation.trainer_log("lab-a")  # noqa: E731
    federation.wait("lab-a trains in round 2", trained, within_s=300)
    before = federation.pid(home, "trainer")
    os.kill(_rank_of(silo), signal.SIGKILL)
    federation.wait("rank 1 starts again", lambda: "again" in log.read_text(), within_s=60)
    federation.wait(
        "so does rank 0",
        lambda: federation.pid(home, "trainer") not in (before, None),
        within_s=120,
    )
    summary = federation.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert federation.trainer_log("lab-a").count(", ddp: ") >= 2


def _of_round(federation: Any, silo: str, number: int) -> str:
    """What a trainer said from the moment it was asked to train in a round."""
    return federation.trainer_log(silo).partition(f"/fit/{number}/")[2]


def _rank_of(command: str) -> int:
    """The process that was started with these words (not the shell that did it)."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().decode().rstrip("\0").split("\0")
            except OSError:
                continue
            if " ".join(words) == command:
                return int(entry)
    raise AssertionError(f"nobody runs {command}")
