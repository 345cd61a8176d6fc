"""Ways from a site to the aggregator: an HTTP proxy and nothing else, IPv6 and nothing else."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from site_runs import run_file, simulated

pytestmark = [pytest.mark.sites, pytest.mark.timeout(900)]

SQUID = """
http_port 3128
acl doors port 8443
http_access allow CONNECT doors
http_access deny all
cache deny all
access_log stdio:{folder}/access.log
cache_log {folder}/cache.log
pid_filename {folder}/squid.pid
coredump_dir {folder}
shutdown_lifetime 1 seconds
"""


@pytest.fixture
def squid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Squid, which gives up root for a user of its own, may write."""
    if shutil.which("squid") is None:
        pytest.skip("there is no squid (Debian's package squid)")
    folder = tmp_path_factory.mktemp("squid")
    for each in (folder, *list(folder.parents)[:2]):
        each.chmod(0o755)
    folder.chmod(0o777)
    (folder / "squid.conf").write_text(SQUID.format(folder=folder))
    return folder


def test_a_site_whose_only_way_out_is_a_proxy(
    make_federation, pair, pair_data, tmp_path, squid_folder
) -> None:
    text = run_file(pair_data, rounds=3, steps=6, codec="int8")
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, pair_data, only=pair, extra_hosts=["proxy"])
    network = federation.network
    at = network.cut_off("lab-a", but="proxy")
    network["proxy"].start(
        *("squid", "-N", "-f", squid_folder / "squid.conf"), log=tmp_path / "squid.log"
    )
    federation.serve()
    federation.await_door()
    door = federation.aggregator.address
    # No way but through it, and it is a proxy for doors alone.
    assert not network["lab-a"].reaches(door, 8443)
    assert network["lab-b"].reaches(door, 8443)
    environment = {"HTTPS_PROXY": f"http://{at}:3128"}
    federation.join("lab-b", federation.invite("lab-b"))
    federation.join("lab-a", federation.invite("lab-a"), env=environment)
    summary = federation.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["bytes_up"] == expected["bytes_up"]
    carried = _tunnels(squid_folder / "access.log")
    assert set(carried) == {f"{door}:8443"}
    # The states came down through it: in fp32, so more than the updates that went up in int8.
    assert sum(carried.values()) > summary["bytes_up"] / len(pair)


def _tunnels(log: Path) -> dict[str, int]:
    """Bytes of a proxy's tunnels by where they led, once their ends are in its log."""
    until, found = time.monotonic() + 30, {}
    while not found and time.monotonic() < until:
        for line in log.read_text().splitlines():
            _, _, _, result, size, verb, target, *_ = line.split()
            assert (verb, result) == ("CONNECT", "TCP_TUNNEL/200"), line
            found[target] = found.get(target, 0) + int(size)
        time.sleep(0.2)
    return found


def test_hosts_with_ipv6_addresses_only(make_federation, pair, pair_data, tmp_path) -> None:
    text = run_file(pair_data, rounds=2, steps=6)
    expected = simulated(text, tmp_path / "alone")
    federation = make_federation(text, pair_data, only=pair, family=6)
    door = federation.aggregator.address
    assert door == "fd77::1"
    federation.begin()
    summary = federation.await_end(within_s=400)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    membership = json.loads((federation.node_home("lab-a") / "membership.json").read_text())
    assert membership["address"] == f"[{door}]:8443"
