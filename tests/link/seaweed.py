"""A real object store for tests: SeaweedFS on free loopback ports, in a folder, killed at will."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import S3Store

from photon.link import ObjectStore, S3Presigner

#: A start takes about 3 s; on a machine with other work many times that.
_READY_S = 60.0

_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
)


class Seaweed:
    """A SeaweedFS of our own with one bucket; `start` and `kill` as often as a test likes.

    Args:
        folder: data, configuration and log; short, as unix sockets lie in it.
    """

    bucket = "photon-test"
    region = "us-east-1"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.port = self._ports["s3.port"]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.access_key_id = secrets.token_hex(10)
        self.secret = secrets.token_hex(20)
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "aggregator",
            "credentials": [{"accessKey": self.access_key_id, "secretKey": self.secret}],
            "actions": ["Admin"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")

    def start(self) -> None:
        """Start it and wait until it takes objects."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start it, from the main thread; it takes objects some seconds later."""
        folder = self._folder
        command = [
            *(str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder / 'data'}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{name}={port}" for name, port in self._ports.items()),
            *("-master.telemetry=false", "-master.electionTimeout=1s"),
            *("-master.volumeSizeLimitMB=64", "-volume.max=0", "-volume.preStopSeconds=1"),
            *("-filer.disableHttp", f"-filer.localSocket={folder / 'filer.sock'}"),
            *("-s3", f"-s3.config={folder / 's3.json'}", f"-s3.localSocket={folder / 's3.sock'}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
            # No -s3.externalUrl: signatures are checked against the host that a request names,
            # so a test may put something between.
            "-s3.autoCreateBucket=false",
        ]
        with (folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, "GOMEMLIMIT": "512MiB"},
                preexec_fn=_die_with_parent,
            )

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None

    def store(self, prefix: str = "", *, endpoint: str | None = None) -> ObjectStore:
        """With credentials, as the aggregator has it."""
        return ObjectStore(self._s3(prefix, endpoint or self.endpoint))

    def presigner(self, prefix: str = "", *, endpoint: str | None = None) -> S3Presigner:
        """Signs for `endpoint`, where a test has put something between."""
        return S3Presigner(
            endpoint or self.endpoint,
            self.bucket,
            region=self.region,
            access_key_id=self.access_key_id,
            secret=self.secret,
            prefix=prefix,
        )

    def _s3(self, prefix: str, endpoint: str) -> S3Store:
        return S3Store(
            self.bucket,
            prefix=prefix or None,
            endpoint=endpoint,
            region=self.region,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    def wait_until_ready(self) -> None:
        """Wait until it takes objects, with a deadline."""
        store = self._s3("", self.endpoint)
        deadline = time.monotonic() + _READY_S
        last = "nothing yet"
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"SeaweedFS ended: {self._log_end()}")
            try:
                self._make_bucket()
                store.put("ready", b"ready")
                assert bytes(store.get("ready").bytes()) == b"ready"
                store.delete(["ready"])
            except (BaseError, OSError) as error:
                last = str(error).splitlines()[0]
                time.sleep(0.1)
            else:
                return
        raise AssertionError(
            f"waited {_READY_S:.0f} s for SeaweedFS to take an object: {last}\n{self._log_end()}"
        )

    def _make_bucket(self) -> None:
        """A bucket is a folder of S3's: PUT on its name, which no obstore call sends."""
        import httpx2

        signed = S3Presigner(
            self.endpoint,
            self.bucket,
            region=self.region,
            access_key_id=self.access_key_id,
            secret=self.secret,
        ).bucket_request("PUT", 60)
        try:
            answer = httpx2.request("PUT", signed.url, timeout=10, trust_env=False)
        except httpx2.HTTPError as error:
            raise OSError(str(error)) from error
        if answer.status_code not in (200, 409):
            raise OSError(f"creating the bucket: {answer.status_code} {answer.text[:300]}")

    def _log_end(self) -> str:
        log = (self._folder / "weed.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(log.splitlines()[-15:])


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _die_with_parent() -> None:
    # Linux: whatever ends the test process, kill -9 included, ends this too. (It is the end of the
    # thread that started it which counts: hence only the main thread may.)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
