"""Files of encoded tensors between processes of one machine."""

from pathlib import Path

import pytest
import torch

from photon.compression import build_codec
from photon.errors import DiskFullError
from photon.link import Entry, EntryFile

SPECS = ["fp32", "int8", "sign", "topk(density=0.02)+int8+zstd", "powersgd(rank=2)", "fp4"]


def entry(name, tensor, spec):
    return Entry(name, tensor.shape, spec, build_codec(spec).encode(tensor))


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_written_is_read(spec, tmp_path):
    generator = torch.Generator().manual_seed(7)
    # Sizes of which parts end anywhere, so that those after them would lie unaligned.
    tensors = {f"t{size}": torch.randn(size, 3, generator=generator) for size in (1, 7, 129)}
    sent = [entry(name, tensor, spec) for name, tensor in tensors.items()]
    file = EntryFile.write(tmp_path / "update", iter(sent))
    received = file.read()
    file.path.unlink()  # what was read stays
    assert [one.name for one in received] == list(tensors)
    for one, other in zip(sent, received, strict=True):
        assert torch.equal(one.decoded(), other.decoded())
        assert all(part.data_ptr() % part.element_size() == 0 for part in other.parts.values())


def test_a_tensor_may_be_changed_and_the_file_is_not(tmp_path):
    file = EntryFile.write(tmp_path / "update", [entry("a", torch.ones(5), "fp32")])
    file.read()[0].decoded().add_(1)
    assert torch.equal(file.read()[0].decoded(), torch.ones(5))


def test_no_entries_at_all(tmp_path):
    assert EntryFile.write(tmp_path / "update", []).read() == []


def test_a_full_disk_is_said():
    full = Path("/dev/full")  # a device that has no room
    with pytest.raises(DiskFullError, match="an update"):
        EntryFile.write(full, [entry("a", torch.ones(1 << 16), "fp32")])
