"""The spool: pieces, a full disk, nothing left behind, memory flat in K."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from photon.aggregation import Median
from photon.aggregation import spool as spool_module
from photon.aggregation.spool import Spool
from photon.errors import DiskFullError, RunError


def rows_of(spool: Spool) -> torch.Tensor:
    """All that was added, (K, parameters), and the spool empty again."""
    seen: list[torch.Tensor] = []

    def across(_: str, rows: list[torch.Tensor]) -> torch.Tensor:
        seen.append(torch.stack(rows))
        return rows[0]

    spool.reduce(across)
    return torch.cat(seen, dim=1)


@pytest.mark.parametrize(("block", "piece"), [(1, 1), (7, 3), (20, 5), (1 << 22, 1 << 18)])
def test_pieces_of_any_size_give_back_what_was_added(
    block: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_BLOCK", block)
    monkeypatch.setattr(spool_module, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    updates = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for shapes in [{"a": (3, 4), "none": (0,), "b": (), "c": (11,)}] * 4
    ]
    spool = Spool()
    for k, update in enumerate(updates):
        spool.add(list(update.items())[:: -1 if k == 2 else 1])
    expected = torch.stack([torch.cat([t.flatten() for t in u.values()]) for u in updates])
    assert rows_of(spool).equal(expected)


def test_short_reads_and_writes_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:5], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read(fd, [into[0][:3]], at))
    spool = Spool()
    spool.add([("w", torch.arange(9.0))])
    assert rows_of(spool).tolist() == [list(range(9))]


def test_the_file_has_no_name_and_its_room_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool()
    for end in (spool.discard, lambda: rows_of(spool)):
        spool.add([("w", torch.ones(1000))])
        descriptor = spool._file.fileno()  # type: ignore[union-attr]
        assert os.fstat(descriptor).st_size == 4000
        assert not list(tmp_path.iterdir())
        end()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_which_folder_and_what_to_do(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Median(tmp_path)
    rule.add([("w", torch.ones(3))], 1.0, 1.0)
    fired = []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        fired.append(offset)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match=r"update number 2.*\n.*Free space") as caught:
            rule.add([("w", torch.ones(3))], 1.0, 1.0)
    assert fired == [12]
    assert str(tmp_path) in caught.value.message
    with pytest.raises(RunError, match="broke off"):
        rule.result()
    rule.discard()
    rule.add([("w", torch.ones(3))], 1.0, 1.0)
    assert rule.result()["w"].equal(torch.ones(3))


def test_other_errors_of_the_disk_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "I/O error")

    spool = Spool()
    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="I/O error"):
        spool.add([("w", torch.ones(3))])
    spool.discard()


def test_a_file_that_lost_its_end_is_not_read_as_zeros() -> None:
    spool = Spool()
    spool.add([("w", torch.ones(10))])
    os.ftruncate(spool._file.fileno(), 20)  # type: ignore[union-attr]
    with pytest.raises(RunError, match="lost its end"):
        rows_of(spool)
    spool.discard()


_MEASURE = """
import sys, torch
from photon.aggregation import Median
torch.set_num_threads(1)
tensors, size = 10, 1 << 20   # 10 x 4 MiB = 40 MiB a model

def peak():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0])

def update(k):
    for i in range(tensors):
        yield f"t{i}", torch.full((size,), float(k + i))

print(peak())
for participants in (4, 24):
    rule = Median()
    for k in range(participants):
        rule.add(update(k), 1.0, 1.0)
    middle = rule.result()
    assert float(middle["t3"][5]) == (participants - 1) / 2 + 3
    del middle
    print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.slow
def test_peak_memory_is_flat_in_the_number_of_participants() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        capture_output=True,
        text=True,
        check=True,
        # Each tensor in pages of its own: what glibc keeps of freed ones is not ours to count.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    before, few, many = map(int, done.stdout.split())
    assert many == pytest.approx(few, rel=0.1)
    # Of the rule alone: a model of 40 MiB, and pieces.
    assert many - before < 90 * 1024
