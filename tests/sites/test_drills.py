"""What an operator does when a disk, a key or the authority is lost: the table of docs/deploy.md.

Each ends with the very weights of the run that nothing happened to.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from site_runs import PHOTON, run_file, simulated

from photon.errors import CertificateError, UnknownMemberError

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]


@pytest.fixture
def drill(make_federation, pair, pair_data, tmp_path):
    """Begins one: a federation in its third round, which can't end before lab-b's trainer is let
    go on; the weights of the same run undisturbed; that trainer's id."""

    def begin(optimizer_state: str = "keep"):
        text = run_file(pair_data, rounds=5, steps=8, optimizer_state=optimizer_state)
        expected = simulated(text, tmp_path / "alone")
        federation = make_federation(text, pair_data, only=pair)
        federation.begin()
        started = lambda: [one["round"] for one in federation.events("round_started")]  # noqa: E731
        federation.wait("round 3 begins", lambda: 3 in started(), within_s=300)
        held = federation.pid(federation.node_home("lab-b"), "trainer")
        os.kill(held, signal.SIGSTOP)
        return federation, expected["weights_sha256"], held

    return begin


def check(federation, home: Path) -> int:
    """What `photon join --check` at lab-a ends with, from a home."""
    words = ("join", "--check", "--node", federation.folder / "lab-a.toml", "--home", home)
    return federation.network["lab-a"].run(*PHOTON, *words, check=False).returncode


def require_good(federation, expected: str) -> None:
    assert federation.await_end(within_s=400)["weights_sha256"] == expected
    rounds = federation.audit()
    assert [one["body"]["round"] for one in rounds] == [1, 2, 3, 4, 5]
    assert all(len(one["body"]["merged"]) == 2 for one in rounds)


def test_the_aggregators_disk_is_lost_and_a_backup_is_there(drill, tmp_path) -> None:
    federation, expected, held = drill()
    archive = tmp_path / "backup.tar"
    federation.aggregator.run(*PHOTON, "backup", federation.home, "--out", archive)
    federation.kill_aggregator()
    shutil.rmtree(federation.home)
    shutil.rmtree(federation.run)
    os.kill(held, signal.SIGCONT)
    where = ("--home", federation.home, "--run-dir", federation.run)
    federation.aggregator.run(*PHOTON, "restore", archive, *where)
    federation.serve()
    # Nobody does anything at the sites.
    require_good(federation, expected)


def test_the_authority_is_lost_and_there_is_no_backup(drill, pair) -> None:
    federation, expected, held = drill()
    before = (federation.home / "ca.crt").read_text()
    federation.kill_aggregator()
    shutil.rmtree(federation.home)
    os.kill(held, signal.SIGCONT)
    federation.serve()
    federation.await_door()
    assert (federation.home / "ca.crt").read_text() != before
    # A site believes no other authority until its own operator says so.
    assert check(federation, federation.node_home("lab-a")) == CertificateError.exit_code
    for silo in pair:
        federation.joined[silo].terminate()
        federation.joined[silo].wait(60)
        federation.join(silo, federation.invite(silo))
    require_good(federation, expected)


def test_a_sites_disk_is_lost_and_another_sites_key_is_stolen(drill) -> None:
    federation, expected, held = drill("reset")
    stolen, home = federation.folder / "stolen", federation.node_home("lab-a")
    stolen.mkdir()
    for name in ("node.key", "membership.json", "ca.crt"):
        shutil.copy2(home / name, stolen / name)
    # The disk of lab-b: its key, what it kept of the run, the task that it was at.
    federation.joined["lab-b"].kill()
    federation.joined["lab-b"].wait()
    federation.wait("its trainer is gone", lambda: not _runs(held), within_s=60)
    shutil.rmtree(federation.node_home("lab-b"))
    federation.join("lab-b", federation.invite("lab-b", rotate=True))
    # The key of lab-a: suspended at once, then another key, then reinstated.
    members, of_run = (*PHOTON, "members"), ("--run-file", federation.run_file)
    federation.aggregator.run(*members, "suspend", "lab-a", *of_run, "--yes")
    assert check(federation, stolen) == UnknownMemberError.exit_code
    invitation = federation.invite("lab-a", rotate=True)
    federation.joined["lab-a"].terminate()
    federation.joined["lab-a"].wait(60)
    federation.join("lab-a", invitation)
    old = (stolen / "node.key").read_bytes()
    federation.wait("another key", lambda: (home / "node.key").read_bytes() != old, within_s=60)
    federation.aggregator.run(*members, "reinstate", "lab-a", *of_run)
    assert check(federation, stolen) == UnknownMemberError.exit_code
    require_good(federation, expected)


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()
