"""Command lines and environments of Flower's services, for a supervisor. No flwr is imported.

Every service runs as a module of this folder under this Python: nothing is looked up on PATH, and
nothing leaves the machine but what a supernode sends to its aggregator.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from photon.engines.flower import pace

#: The run folder that a ServerApp continues.
RUN_FOLDER_VARIABLE = "PHOTON_SERVE_FOLDER"

_LOOPBACK = "127.0.0.1"

#: What a service gets of this process's environment: how to run Python, and what network there is.
#: No credentials: those are for the loop alone.
_PASSED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|TMPDIR|XDG_\w+|VIRTUAL_ENV|PYTHON\w*|"
    r"LD_LIBRARY_PATH|OMP_NUM_THREADS|SSL_CERT_\w+|(?:HTTPS?|ALL|NO)_PROXY|(?:https?|all|no)_proxy"
)


@dataclass(frozen=True)
class Command:
    """How to start a service.

    Attributes:
        argv: program and arguments.
        env: the whole environment.
    """

    argv: tuple[str, ...]
    env: dict[str, str]


def superlink(
    *, home: Path, port: int, certificate: Path, key: Path, ca: Path, secret: Path
) -> Command:
    """The superlink: TLS on loopback, registered node keys only, everything in a database.

    It is up when `control.Control.healthy` says so.

    Args:
        home: keeps superlink/state.db and flwr/.
        port: on 127.0.0.1. Nothing but the door may be let through to it, and only /v1/fleet/.
        certificate, key, ca: PEM files; the certificate must name 127.0.0.1 and localhost.
        secret: file of `write_secret`, shared with the superexec.
    """
    database = home.absolute() / "superlink" / "state.db"
    database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Command(
        _module(
            "superlink",
            *("--host", _LOOPBACK, "--port", str(port)),
            *("--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--isolation", "process", "--database", database),
            *("--superexec-auth-secret-file", secret),
        ),
        # One line of log per request, several a second, says nothing.
        environment(home) | {"FLWR_LOG_LEVEL": "WARNING"},
    )


def superexec(
    *, home: Path, superlink_port: int, ca: Path, secret: Path, bundle: str, run_folder: Path
) -> Command:
    """Starts the ServerApp of a submitted run, and reports it at once if it dies.

    Args:
        bundle: sha256 of the one bundle that may run here (`bundle.digest`).
        run_folder: what the ServerApp continues.
    """
    return Command(
        _module(
            "superexec",
            *("--runtime-api-address", f"{_LOOPBACK}:{superlink_port}"),
            *("--root-certificates", ca, "--superexec-auth-secret-file", secret),
            *("--bundle", bundle),
        ),
        environment(home, credentials=True)  # of the store: the loop opens it
        | {
            RUN_FOLDER_VARIABLE: str(run_folder.absolute()),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(pace.SUPEREXEC_POLL_S),
        },
    )


def supernode(
    *, home: Path, superlink: str, ca: Path, key: Path, runtime_port: int, secret: Path
) -> Command:
    """A silo's connection to the aggregator. It connects outward only; its own API is on loopback.

    Args:
        home: of the node; keeps flwr/ and, written once it is connected, supernode.json (which
            node this is, and its process).
        superlink: "host:port" of the aggregator's door.
        ca: PEM file of the only authority that is believed.
        key: the node's private key, OpenSSH format.
        runtime_port: on 127.0.0.1, for the shim.
        secret: file of `write_secret`, shared with the shim.
    """
    return Command(
        _module(
            "supernode",
            *("--superlink", superlink, "--root-certificates", ca),
            *("--auth-supernode-private-key", key, "--isolation", "process"),
            *("--host", _LOOPBACK, "--port", str(runtime_port)),
            *("--superexec-auth-secret-file", secret),
            *("--state", home.absolute() / "supernode.json"),
        ),
        environment(home),
    )


def shim(*, home: Path, runtime_port: int, secret: Path, trainer: Path) -> Command:
    """Hands tasks from the supernode to the trainer, and its answers back.

    Args:
        trainer: the trainer's unix socket.
    """
    return Command(
        _module(
            "shim",
            *("--runtime-api", f"{_LOOPBACK}:{runtime_port}"),
            *("--secret", secret, "--socket", trainer.absolute()),
        ),
        environment(home),
    )


def environment(home: Path, *, credentials: bool = False) -> dict[str, str]:
    """What Flower needs of this process's environment, made private and quiet.

    Flower keeps its files in `home`/flwr, reports nothing, looks for no updates, installs nothing,
    and what it says to this machine goes through no proxy.

    Args:
        credentials: all of this process's, but what is Flower's.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if (credentials and not name.startswith("FLWR_")) or _PASSED.fullmatch(name)
    }
    flower_home = home.absolute() / "flwr"
    flower_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    env |= {
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }
    from photon.store.dialling import keep_to_this_machine  # not for who only wants the words

    keep_to_this_machine(env)
    return env


def write_secret(path: Path) -> Path:
    """A fresh secret that two services of one machine share, mode 0600; one that exists is kept."""
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    return path


def _module(name: str, *arguments: str | Path) -> tuple[str, ...]:
    module = f"photon.engines.flower.{name}"
    return (sys.executable, "-m", module, *(str(argument) for argument in arguments))
