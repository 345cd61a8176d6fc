"""systemd units, compose file and Dockerfile: as right as can be seen without running them."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from photon.errors import all_errors

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"
IMAGE_LOCK = ROOT / "deploy" / "requirements.lock"
DOCKERFILE = ROOT / "deploy" / "compose" / "Dockerfile"
COMMAND = re.compile(r"photon (serve|join)((?: +[^;'\]]+)?)")


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(path)
    return parser


def require_options(words: list[str]) -> None:
    """Every option of a `photon` command line is one that the command has."""
    from photon.cli.main import app

    said = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert said.exit_code == 0, said.output
    for option in (word for word in words if word.startswith("--")):
        assert option in said.output, f"photon {words[0]} has no {option}"


def test_there_is_a_unit_for_each_side() -> None:
    assert [path.name for path in UNITS] == ["photon-join.service", "photon-serve.service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_is_there_and_stops_it_gently(path) -> None:
    service = unit(path)["Service"]
    started = COMMAND.findall(service["ExecStart"])
    assert started
    for name, rest in started:
        require_options([name, *shlex.split(rest)])
    # The supervisor is asked alone; `control-group` would ask its services behind its back.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"].removesuffix("s")) > 60
    assert service["UMask"] == "0077"
    assert service["NoNewPrivileges"] == "yes"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_exit_codes_that_are_not_retried_are_ours_and_none_that_time_mends(path) -> None:
    known = {kind.exit_code: kind.__name__ for kind in all_errors()}
    given = [int(code) for code in unit(path)["Service"]["RestartPreventExitStatus"].split()]
    assert set(given) <= set(known)
    mended = {"ServiceLostError", "UnreachableError", "StoreUnavailableError", "DiskFullError"}
    assert not mended & {known[code] for code in given}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_to_say(path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert said == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_can_do_little_else_than_its_work(path) -> None:
    """What is left open is named in docs/deploy.md; 10 is a service without any of these lines."""
    asked = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", path]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-400:]


def test_a_node_sees_data_in_home_and_gpus() -> None:
    service = unit(UNITS[0])["Service"]
    assert service["ProtectHome"] == "read-only"
    closing = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute"}
    assert not closing & set(service)
    assert "PrivateUsers" not in service, "data of a group is read by its members"
    assert service["SystemCallFilter"].startswith("~")


def test_the_compose_file_is_whole() -> None:
    found = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    assert set(found["services"]) == {"serve", "join"}
    for name, service in found["services"].items():
        assert service["init"] is True, "Photon reaps no strangers"
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        context = (COMPOSE.parent / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).resolve() == DOCKERFILE
        named = {volume.partition(":")[0] for volume in service["volumes"]}
        assert named & set(found["volumes"]), f"{name} keeps nothing"
    # One port in, and none for a node.
    assert found["services"]["serve"]["ports"] == ["${PHOTON_PORT:-8443}:8443"]
    assert "ports" not in found["services"]["join"]
    for command in COMMAND.findall(" ".join(found["services"]["serve"]["command"])):
        require_options([command[0], *shlex.split(command[1])])
    require_options(found["services"]["join"]["command"])


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="no docker compose here",
)
def test_compose_reads_it() -> None:
    command = ["docker", "compose", "-f", str(COMPOSE), "--profile", "node", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_image_is_made_from_files_that_are_there() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert names == ["dist/requirements.lock", "dist/photon_federated-*.whl"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "cp deploy/requirements.lock dist/" in makefile
    torch = re.search(r"^TORCH \?= (\S+)$", makefile, re.MULTILINE)
    assert torch is not None
    assert f'ARG TORCH="{torch[1]}"' in text
    assert torch[1] in COMPOSE.read_text(encoding="utf-8")
    # Not as root, and with a way in for `docker run photon serve ...`.
    assert text.index("USER photon") < text.index("ENTRYPOINT")


def test_the_image_holds_the_versions_that_are_tested_and_no_tools_of_developers() -> None:
    def pinned(path: Path) -> dict[str, str]:
        found = re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        return dict(found)

    everything, image = pinned(ROOT / "requirements.lock"), pinned(IMAGE_LOCK)
    assert image.items() <= everything.items(), "make lock"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^a-z0-9-]", name)[0] for name in requirements}

    extras = project["optional-dependencies"]
    needed = names(project["dependencies"]) | names(extras["serve"])
    assert needed - set(image) == {"torch"}, "torch's wheel depends on the accelerator"
    assert names(extras["s3"]) < names(extras["serve"]) <= set(everything)
    assert not names(extras["dev"]) & set(image)
