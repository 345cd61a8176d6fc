"""A site on two machines, of which the one that trains has no network at all."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
from site_runs import run_file, simulated

from photon.errors import DeployError

PHOTON = (sys.executable, "-m", "photon.cli.main")
pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]


def test_a_trainer_without_a_network_behind_its_gateway(
    make_federation, pair, pair_data, tmp_path
) -> None:
    """Killed, ended as SLURM does, and away for a while; so is the gateway: the same weights."""
    text = run_file(pair_data, rounds=8, steps=40)
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, pair_data, only=pair, extra_hosts=["gpu"])
    shared, gateway_log = tmp_path / "shared", tmp_path / "lab-a.log"
    with (tmp_path / "lab-a.toml").open("a") as file:
        file.write(f'\n[gateway]\nfolder = "{shared}"\n')
    gpu = federation.network["gpu"]
    federation.network.cut_off("gpu")
    federation.serve()
    federation.await_door()
    for host in ("aggregator", "lab-a"):
        assert not gpu.reaches(federation.network[host].address, 8443)
    # Without its gateway a trainer says what is missing.
    node = ("--node", tmp_path / "lab-a.toml")
    early = gpu.run(*PHOTON, "join", "--trainer", *node, check=False)
    assert early.returncode == DeployError.exit_code
    assert "photon join --gateway" in early.stderr
    federation.join("lab-a", federation.invite("lab-a"), part="gateway")
    federation.join("lab-b", federation.invite("lab-b"))
    federation.wait("it waits", lambda: "waits for a trainer" in said(gateway_log), within_s=60)
    started = lambda: [one["round"] for one in federation.events("round_started")]  # noqa: E731

    def train() -> None:
        federation.join("lab-a", part="trainer", host="gpu")

    def trains(number: int) -> None:
        step = f"round {number}, step"
        federation.wait(step, lambda: step in said(shared / "logs/trainer.log"), within_s=200)

    train()
    trains(2)
    # The time of its job is over: told to end, and started again later, on another machine maybe.
    end(federation, "gpu", signal.SIGTERM)
    waiting = "the aggregator's question is kept open"
    federation.wait("it is awaited", lambda: waiting in said(gateway_log), within_s=90)
    at = started()[-1]
    train()
    trains(at + 1)
    end(federation, "gpu", signal.SIGKILL)
    train()
    trains(started()[-1] + 1)
    os.kill(federation.pid(shared, "trainer"), signal.SIGKILL)
    time.sleep(1.0)
    end(federation, "lab-a", signal.SIGKILL)
    federation.join("lab-a", part="gateway")
    summary = federation.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    for one in federation.audit():
        assert [merged["silo"] for merged in one["body"]["merged"]] == pair
    # The key never was where the trainer is.
    assert (federation.node_home("lab-a") / "node.key").exists()
    assert not list(shared.rglob("*.key"))
    assert json.loads((shared / "membership.json").read_text())["name"] == "lab-a"


def end(federation, host: str, number: signal.Signals) -> None:
    process = federation.joined[host]
    process.send_signal(number)
    process.wait(60)


def said(log) -> str:
    return log.read_text() if log.exists() else ""
