import resource
import subprocess
import sys

import pytest
import torch

from photon.errors import CheckpointCorruptError, DiskFullError
from photon.link import TensorFile, tensors_sha256, write_tensors
from photon.store.disk import require_disk

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "turned": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def test_round_trip(tmp_path):
    path = tmp_path / "state.safetensors"
    written = write_tensors(path, TENSORS)
    assert written == sum(tensor.nbytes for tensor in TENSORS.values())
    with TensorFile(path) as file:
        assert sorted(file.names()) == sorted(TENSORS)
        back = file.read()
    path.unlink()
    for name, tensor in TENSORS.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert tensors_sha256(back) == tensors_sha256(TENSORS)


def test_nothing_round_trips_too(tmp_path):
    write_tensors(tmp_path / "empty.safetensors", {})
    with TensorFile(tmp_path / "empty.safetensors") as file:
        assert file.read() == {}


def test_hash_sees_names_shapes_dtypes_and_values():
    base = {"a": torch.zeros(4)}
    others = [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
    ]
    assert len({tensors_sha256(tensors) for tensors in [base, *others]}) == 5
    two = {"x": torch.ones(1), "a": torch.zeros(1)}
    assert tensors_sha256(two) == tensors_sha256(dict(reversed(two.items())))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    write_tensors(path, TENSORS)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 64)
    else:
        path.unlink()
    with pytest.raises(CheckpointCorruptError, match=r"state\.safetensors"):
        TensorFile(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """A file-size limit makes the kernel refuse the write for real, in a process of its own."""
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.zeros(4)})
    before = path.read_bytes()
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
from photon.errors import DiskFullError
from photon.link import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_tensors(Path({str(path)!r}), {{"a": torch.zeros(100_000)}})
except DiskFullError as error:
    assert "state.safetensors" in str(error), error
    sys.exit(51)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 51
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_room_is_asked_for_before_work_starts(tmp_path):
    require_disk(tmp_path / "not" / "there", 1, "a test")
    with pytest.raises(DiskFullError, match=r"a test needs 1000000000\.00 GB"):
        require_disk(tmp_path, 10**18, "a test")
