"""A real object store for tests: SeaweedFS on free loopback ports, in a folder, killed at will.

Tests of a folder share one: its conftest imports `seaweed`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from photon.deploy.embedded_store import BUCKET, REGION, EmbeddedStore
from photon.errors import DeployError
from photon.store.object_store import ObjectStore
from photon.store.presign import S3Presigner

#: A start takes about 3 s; on a machine with other work many times that.
_READY_S = 60.0


class Seaweed:
    """A SeaweedFS of our own with one bucket; `start` and `kill` as often as a test likes.

    Args:
        folder: data, configuration and log; short, as unix sockets lie in it.
    """

    bucket = BUCKET
    region = REGION

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._embedded = EmbeddedStore(folder, min_free_gib=0.1, volume_mib=64)
        self.port = self._embedded.port
        self.endpoint = self._embedded.endpoint
        self.access_key_id = self._embedded.access_key_id
        self.secret = self._embedded.secret

    def start(self) -> None:
        """Start it and wait until it takes objects."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start it, from the main thread; it takes objects some seconds later."""
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._embedded.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
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
                self._embedded.make_bucket()
                store.put("ready", b"ready")
                assert bytes(store.get("ready").bytes()) == b"ready"
                store.delete(["ready"])
            except (BaseError, DeployError, OSError) as error:
                last = str(error).splitlines()[0]
                time.sleep(0.1)
            else:
                return
        raise AssertionError(
            f"waited {_READY_S:.0f} s for SeaweedFS to take an object: {last}\n{self._log_end()}"
        )

    def _log_end(self) -> str:
        log = (self._folder / "weed.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(log.splitlines()[-15:])


def _die_with_parent() -> None:
    # Linux: whatever ends the test process, kill -9 included, ends this too. (It is the end of the
    # thread that started it which counts: hence only the main thread may.)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    """A running SeaweedFS with a bucket. Tests use a prefix each."""
    # Not pytest's folder: paths of unix sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="photon-seaweed-"))
    weed = Seaweed(folder)
    try:
        weed.start()
        yield weed
    finally:
        weed.kill()
        shutil.rmtree(folder, ignore_errors=True)
