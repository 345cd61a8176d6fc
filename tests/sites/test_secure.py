"""Secure aggregation across hosts: pinned keys, and kills while a phase is under way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

import pytest
from site_runs import run_file, simulated

from photon.deploy.join import PENDING_KEY_FILE
from photon.federation.secure_rounds import COHORTS_FILE
from photon.membership.keys import NodeKey

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]

ROUNDS = 12
SECURE = "\n[privacy]\nsecure_aggregation = true\n"


def pin_all(federation) -> None:
    """As sites that told each other their fingerprints before the first run."""
    keys = {
        silo: NodeKey.load_or_create(federation.node_home(silo) / PENDING_KEY_FILE).fingerprint
        for silo in federation.silos
    }
    for silo in federation.silos:
        node = federation.folder / f"{silo}.toml"
        pins = "".join(f'{name} = "{key}"\n' for name, key in keys.items() if name != silo)
        policy = "[policy]\nmin_participants = 3\nsecure_aggregation = true\n[policy.pins]\n"
        node.write_text(f"{node.read_text()}\n{policy}{pins}")


def phase_of(federation) -> tuple[int, str]:
    """The newest round with a cohort, and how far it came."""
    with contextlib.suppress(OSError, ValueError):
        rounds = json.loads((federation.run / COHORTS_FILE).read_text())["rounds"]
        number = max(map(int, rounds))
        one = rounds[str(number)]
        done = "unmask" if one["survivors"] else "fit" if one["dealt"] else "share"
        return number, done if one["cohort"] else "advertise"
    return 0, "advertise"


def hold(federation, silo: str, wanted: str) -> tuple[int, int]:
    """Stop a trainer where the aggregator waits for it in a phase; its pid, and the round."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        number, phase = phase_of(federation)
        pid = federation.pid(federation.node_home(silo), "trainer")
        if phase != wanted or pid is None:
            continue
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)  # others answer meanwhile
        if phase_of(federation) == (number, wanted) and number not in merged(federation):
            return pid, number
        os.kill(pid, signal.SIGCONT)
    raise AssertionError(f"{silo} was never caught in {wanted}; {federation.log()}")


def merged(federation) -> list[int]:
    return [one["round"] for one in federation.events("round_merged")]


def test_five_hosts_with_secure_aggregation_and_kills_come_to_the_weights_of_simulate(
    make_federation, silo_data, tmp_path
) -> None:
    text = run_file(silo_data, rounds=ROUNDS, steps=6) + SECURE
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, silo_data)
    pin_all(federation)
    federation.begin()
    caught = []
    for phase, killed in (
        ("fit", "aggregator"),
        ("share", "aggregator"),
        ("unmask", "aggregator"),
        ("fit", "trainer"),
        ("share", "join"),
        ("unmask", "trainer"),
    ):
        pid, number = hold(federation, "lab-b", phase)
        caught.append(phase)
        if killed == "aggregator":
            federation.kill_aggregator()
            federation.serve()
            os.kill(pid, signal.SIGCONT)
        elif killed == "trainer":
            os.kill(pid, signal.SIGKILL)
        else:
            joined = federation.joined["lab-b"]
            joined.kill()
            joined.wait()
            os.kill(pid, signal.SIGCONT)
            federation.join("lab-b")
        over = lambda number=number: number in merged(federation)  # noqa: E731
        federation.wait(f"round {number}, {killed} killed in {phase}", over, within_s=200)
    assert len(caught) == 6
    summary = federation.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    rounds = federation.audit()
    assert [one["body"]["round"] for one in rounds] == list(range(1, ROUNDS + 1))
    for one in rounds:
        assert [each["silo"] for each in one["body"]["merged"]] == federation.silos
    attempts = json.loads((federation.run / COHORTS_FILE).read_text())["rounds"].values()
    assert {one["attempt"] for one in attempts} == {1}
