"""What four ranks keep, two or one take up: weights, optimizer state, cursor, residual."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from photon.training import Ranks, read_snapshot, write_snapshot


def plainly(_, shape, dtype):
    return torch.empty(shape, dtype=dtype)


def keep(folder: Path, tensors):
    write_snapshot(folder, tensors, Ranks.alone()).finish()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_snapshot_of_four_ranks_resumes_on_two_and_on_one(run_ranks, tmp_path, optimizer):
    options = {"optimizer": optimizer, "folder": str(tmp_path / "kept")}
    whole = {**options, "strategy": "fsdp", "from": 0, "to": 8, "keep_after": 4}
    straight = run_ranks("resharding", 4, whole)[0]
    assert len(straight["losses"]) == 8
    rest = {**options, "from": 4, "to": 8}
    for strategy, world in [("fsdp", 2), ("ddp", 2), ("single", 1)]:
        for answer in run_ranks("resharding", world, {**rest, "strategy": strategy}):
            assert answer["losses"] == pytest.approx(straight["losses"][4:], rel=1e-5)
            assert answer["cursor"] == straight["cursor"]


def test_what_is_read_is_what_was_kept_bit_for_bit(tmp_path):
    tensors = {
        "a.exp_avg": torch.randn(5, 3),
        "a.step": torch.tensor(3.0),
        "b": torch.arange(4).to(torch.bfloat16),
        "empty": torch.zeros(0, 2),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    pending = write_snapshot(tmp_path / "kept", tensors, Ranks.alone())
    for tensor in tensors.values():
        tensor.zero_()  # training goes on meanwhile
    pending.finish()
    read = read_snapshot(tmp_path / "kept", plainly, Ranks.alone())
    assert read.keys() == before.keys()
    assert all(torch.equal(read[name], before[name]) for name in before)


def test_no_tensors_are_a_snapshot_too(tmp_path):
    keep(tmp_path / "kept", {})
    assert read_snapshot(tmp_path / "kept", plainly, Ranks.alone()) == {}


def test_it_is_there_whole_or_not_at_all(tmp_path):
    pending = write_snapshot(tmp_path / "kept", {"a": torch.ones(3)}, Ranks.alone())
    assert not (tmp_path / "kept").exists()
    pending.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    keep(tmp_path / "kept", {"a": torch.zeros(3)})  # a task run again
    assert float(read_snapshot(tmp_path / "kept", plainly, Ranks.alone())["a"].sum()) == 0


def cut(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])


def lose_a_part(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def lose_the_list(folder: Path) -> None:
    (folder / ".metadata").unlink()


def forge_numbers(folder: Path) -> None:
    (folder / "numbers.json").write_text(json.dumps({"tensors": 7}))


@pytest.mark.parametrize("damage", [cut, lose_a_part, lose_the_list, forge_numbers])
def test_a_damaged_snapshot_is_an_error_not_a_guess(tmp_path, damage):
    keep(tmp_path / "kept", {"a": torch.randn(400)})
    damage(tmp_path / "kept")
    with pytest.raises((OSError, ValueError)):
        read_snapshot(tmp_path / "kept", plainly, Ranks.alone())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from photon.training import Ranks, write_snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path(sys.argv[1])
try:
    write_snapshot(folder / "kept", {"a": torch.randn(1_000_000)}, Ranks.alone()).finish()
except OSError as error:
    print(error.errno, sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """The kernel refuses to write beyond a size, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == [str(errno.EFBIG), "[]"]


@pytest.mark.parametrize("when", ["write", "read"])
def test_ctrl_c_is_not_taken_for_damage(tmp_path, monkeypatch, when):
    """torch gathers a KeyboardInterrupt among the ranks' failures, as if the disk had failed."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    tensors = {"moment": torch.ones(3)}
    if when == "write":
        monkeypatch.setattr(FileSystemWriter, "write_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keep(tmp_path / "kept", tensors)
        assert not list(tmp_path.glob("kept"))
    else:
        keep(tmp_path / "kept", tensors)
        monkeypatch.setattr(FileSystemReader, "read_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_snapshot(tmp_path / "kept", plainly, Ranks.alone())
