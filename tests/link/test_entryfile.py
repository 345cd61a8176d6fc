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


def test_a_file_is_written_over_whatever_was_in_it(tmp_path):
    """It keeps its pages, which is what makes it fast; also those that are not needed."""
    path = tmp_path / "update"
    for size in (9, 3, 20):
        before = path.stat().st_ino if size != 9 else None
        file = EntryFile.of_plain(path, [("a", torch.full((size, 2), size)), ("b", torch.ones(1))])
        assert before in (None, path.stat().st_ino)
        first, second = file.read()
        assert torch.equal(first.decoded(), torch.full((size, 2), float(size)))
        assert torch.equal(second.decoded(), torch.ones(1))


def test_values_that_no_codec_takes_travel_as_they_are(tmp_path):
    """It is the aggregator who refuses them, by their silo's name."""
    bad = torch.tensor([float("nan"), float("inf")])
    (entry,) = EntryFile.of_plain(tmp_path / "update", [("a", bad)]).read()
    assert torch.allclose(entry.decoded(), bad, equal_nan=True)


def test_no_entries_at_all(tmp_path):
    assert EntryFile.write(tmp_path / "update", []).read() == []


def test_a_full_disk_is_said():
    full = Path("/dev/full")  # a device that has no room
    with pytest.raises(DiskFullError, match="an update"):
        EntryFile.write(full, [entry("a", torch.ones(1 << 16), "fp32")])
