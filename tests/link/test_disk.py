"""Small files are whole or not there: permissions, a full disk, kill -9, many writers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from photon.errors import DiskFullError, RunNotFoundError
from photon.store import disk
from photon.store.disk import write_json, write_whole
from photon.store.served import SERVE_FILE, Serving

#: Bytes of a file that the limit below does not let anybody finish.
LARGE = b"x" * 300_000


@contextlib.contextmanager
def full_disk(after_bytes: int = 100_000) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: the kernel says EFBIG to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_bytes_and_records(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    write_whole(path, "grüße\n", "a test")
    assert path.read_bytes() == "grüße\n".encode()
    write_whole(path, b"\x00\xff", "a test")
    assert path.read_bytes() == b"\x00\xff"
    write_json(path, {"b": 1, "a": [1.5, None]})
    assert path.read_text() == json.dumps({"b": 1, "a": [1.5, None]}, indent=1) + "\n"
    assert names(path.parent) == ["a.json"]


def test_a_number_without_a_word_in_json_changes_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


def test_permissions_are_there_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "secret"
    path.write_text("readable by all")
    path.chmod(0o644)
    seen = []
    fdopen = os.fdopen

    def look(descriptor: int, *how):
        seen.append((stat.S_IMODE(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size))
        return fdopen(descriptor, *how)

    monkeypatch.setattr(disk.os, "fdopen", look)
    write_whole(path, "secret", "a test", mode=0o600)
    assert seen == [(0o600, 0)]
    assert mode_of(path) == 0o600, "also where an older file had others"
    umask = os.umask(0o027)
    try:
        write_whole(tmp_path / "shared", "", "a test")
    finally:
        os.umask(umask)
    assert mode_of(tmp_path / "shared") == 0o640


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_whole(path, b"before", "a test")
    with (
        full_disk(),
        pytest.raises(DiskFullError, match=rf"no room to write a test to {path}") as e,
    ):
        write_whole(path, LARGE, "a test")
    assert isinstance(e.value.__cause__, OSError)
    assert e.value.__cause__.errno == errno.EFBIG, "the fault fired"
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["a.bin"]
    write_whole(path, LARGE, "a test")
    assert path.read_bytes() == LARGE


def test_other_trouble_leaves_nothing_beside(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", b"", "a test")
    assert names(tmp_path) == ["folder"]

    def no(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk.os, "fsync", no)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", b"", "a test")
    assert names(tmp_path) == ["folder"]


def test_the_file_and_its_name_are_on_disk_when_it_returns(tmp_path: Path, monkeypatch) -> None:
    """In this order: the bytes, the name, the folder's entry."""
    said = []
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        said.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))
        fsync(descriptor)

    def rename(self: Path, target):
        said.append(("name", None))
        return replace(self, target)

    monkeypatch.setattr(disk.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    write_whole(tmp_path / "a", b"12345", "a test")
    assert said == [("file", 5), ("name", None), ("folder", None)]


WRITER = """
import sys
from pathlib import Path
from photon.store.disk import write_json
print("ready", flush=True)
n = 0
while True:
    n += 1
    write_json(Path(sys.argv[1]), {"n": n, "pad": "x" * 200_000, "again": n})
"""


def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    last, cut_short = 0, 0
    for attempt in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            end = time.monotonic() + 60
            while not attempt and not path.exists():
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(0.05 + 0.013 * attempt)
            writer.kill()
        cut_short += len(list(tmp_path.glob(".a.json.*.partial")))
        if path.exists():
            found = json.loads(path.read_text())
            assert found["n"] == found["again"]
            last = max(last, found["n"])
    assert last > 0, "it was written"
    assert cut_short > 0, "it was killed while it wrote"


def test_what_the_killed_left_goes_in_time(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".a.json.00000000.partial", tmp_path / ".a.json.11111111.partial"
    other = tmp_path / ".b.json.00000000.partial"
    for path in (old, fresh, other):
        path.write_text("{")
    before = time.time() - 2 * 3600
    for path in (old, other):
        os.utime(path, (before, before))
    write_json(tmp_path / "a.json", {})
    assert names(tmp_path) == sorted([fresh.name, other.name, "a.json"])


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    path, wrong = tmp_path / "a.json", []
    write_json(path, {"n": 0, "again": 0})

    def write(number: int) -> None:
        for n in range(20):
            write_json(path, {"n": (number, n), "pad": "x" * 5000 * number, "again": (number, n)})
            found = json.loads(path.read_text())
            if found["n"] != found["again"]:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert names(tmp_path) == ["a.json"]


def test_serve_json_has_one_home(tmp_path: Path) -> None:
    one = Serving("0" * 32, "/srv", "s3://bucket", {"region": "here"}, "/srv/secrets")
    one.write(tmp_path)
    assert Serving.read(tmp_path) == one
    assert names(tmp_path) == [SERVE_FILE]
    (tmp_path / SERVE_FILE).write_text('{"run_id": "1"}')
    with pytest.raises(RunNotFoundError, match="no served run in"):
        Serving.read(tmp_path)
