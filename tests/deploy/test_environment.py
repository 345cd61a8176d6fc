"""Programs that Photon starts see what they need of its environment, and no secret beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from service_programs import python, said, until

from photon.config import parse_run_config
from photon.deploy import serve, tether
from photon.deploy.front_door import front_door
from photon.deploy.join import Node
from photon.deploy.service import Service
from photon.environment import PASS, given
from photon.membership.keys import NodeKey
from photon.silo import ranks
from photon.training import Seat

SECRETS = ("AWS_SECRET_ACCESS_KEY", "GOOGLE_SERVICE_ACCOUNT", "HF_TOKEN", "DATABASE_PASSWORD")
NEEDED = ("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "HTTPS_PROXY", "OMP_NUM_THREADS", "RANK")
PRINTS = "import json, os; print(json.dumps(dict(os.environ)), flush=True)"
#: Only that: a line of a service's is cut where it is long.
PRINTS_NAMES = PRINTS.replace("dict(os.environ)", "[*os.environ]")


@pytest.fixture(autouse=True)
def _shell(monkeypatch) -> None:
    """An operator's, with more in it than a program needs."""
    for name in (*SECRETS, *NEEDED):
        monkeypatch.setenv(name, "127.0.0.1:9" if "PROXY" in name else "7")
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.delenv(PASS, raising=False)


def seen_by(service: Service) -> set[str]:
    """The names that a real child sees that is given a service's environment."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], env=service.environment, capture_output=True, check=True
    )
    return set(json.loads(done.stdout))


def test_a_service_sees_what_it_needs_and_no_secret(watched) -> None:
    program = f"{PRINTS_NAMES}; import time; time.sleep(600)"
    watched.supervisor.start(python("one", program))
    names = r'(\["[A-Z].*"\])'
    until(lambda: said(watched, names), "its environment")
    found = said(watched, names)
    assert found is not None
    seen = set(json.loads(found[1]))
    assert {*NEEDED, "PATH", "HOME", "LANG", tether.MARK} <= seen
    assert not seen & set(SECRETS)
    guard = watched.supervisor._guard
    assert b"SECRET" not in Path(f"/proc/{guard.pid}/environ").read_bytes()


class Recorder:
    """Takes services instead of starting them."""

    def __init__(self) -> None:
        self.services: list[Service] = []

    def start(self, service: Service) -> None:
        self.services.append(service)


@pytest.mark.parametrize("own", [True, False])
def test_only_the_loop_has_a_stores_credentials_and_only_of_a_store_of_ones_own(
    own, home, running_door, running_store, tmp_path
) -> None:
    store = {"store": "s3://bucket/runs"} if own else {}
    config = parse_run_config(
        {"model": {"preset": "tiny"}, "data": {"path": "x"}, "serve": {"home": str(home), **store}}
    )
    aggregator = serve.Aggregator(config, tmp_path / "run", log=lambda _: None)
    recorder = Recorder()
    aggregator._begin(recorder)  # type: ignore[arg-type]
    aggregator._roster.close()
    (loop,) = recorder.services
    seen = seen_by(loop)
    assert set(NEEDED) <= seen
    credentials = {"AWS_SECRET_ACCESS_KEY", "GOOGLE_SERVICE_ACCOUNT"}
    assert seen & set(SECRETS) == (credentials if own else set())
    for other in (front_door(running_door.settings, tmp_path), running_store.store.service()):
        assert not seen_by(other) & {*SECRETS, *NEEDED}


def test_a_trainer_and_its_ranks_have_devices_and_proxies_but_no_secret(
    home, tmp_path, monkeypatch, capfd
) -> None:
    (tmp_path / "node.toml").write_text('[data]\npath = "x"\n')
    pem = NodeKey.create(home / "node.key").public_pem
    record = {"name": "lab", "address": "a:1", "ca_fingerprint": "x", "aggregator_key": pem}
    (home / "membership.json").write_text(json.dumps(record))
    node = Node(home, tmp_path / "node.toml", log=lambda _: None)
    seen = seen_by(node._trainer())
    assert {*NEEDED, "PHOTON_BOOT"} <= seen
    assert not seen & set(SECRETS)

    ended = threading.Event()
    monkeypatch.setenv("MASTER_PORT", "1")
    ranks._start(Seat(1, 1, 2, 2), [sys.executable, "-c", PRINTS], lambda *_: ended.set())
    assert ended.wait(60)
    told = json.loads(capfd.readouterr().out)
    assert told["RANK"] == "1"
    assert told["CUDA_VISIBLE_DEVICES"] == "7"
    assert not set(told) & set(SECRETS)


def test_more_is_passed_on_by_name_to_programs_that_compute(monkeypatch) -> None:
    assert "HF_TOKEN" not in given(store=True)
    monkeypatch.setenv(PASS, "HF_TOKEN, NOT_THERE")
    assert given()["HF_TOKEN"] == "7"
    assert "HF_TOKEN" not in given(computes=False)
    assert given().items() <= os.environ.items()
