"""Zstandard around other codecs: small, and unmoved by what strangers send."""

from __future__ import annotations

import struct

import pytest
import torch
import zstandard

from photon.compression.blockwise import Int8
from photon.compression.casts import Bf16, Fp32
from photon.compression.codec import bytes_of
from photon.compression.low_rank import PowerSGD
from photon.compression.zstd import Zstd


def part(raw, stated=None, code=7, **options):
    """A part as Zstd writes them, of these raw bytes."""
    frame = zstandard.ZstdCompressor(**options).compress(raw)
    header = struct.pack("<BQ", code, len(raw) if stated is None else stated)
    return torch.frombuffer(bytearray(header + frame), dtype=torch.uint8)


def weights(count=50_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(3)) * 1e-3


def test_exponents_compress():
    tensor = weights()
    assert bytes_of(Zstd().encode(tensor)) < 0.88 * tensor.nbytes
    assert bytes_of(Zstd(Bf16()).encode(tensor)) < 0.75 * tensor.nbytes / 2
    assert bytes_of(Zstd().encode(torch.zeros(1_000_000))) < 500


def test_bytes_go_together_by_significance():
    tensor = torch.full((1000,), 1.5) + torch.arange(1000.0) * 2**-20
    parts = Zstd().encode(tensor)
    raw = zstandard.decompress(parts["values"][9:].numpy().tobytes())
    assert raw == b"".join(tensor.numpy().tobytes()[place::4] for place in range(4))
    assert parts["values"][:9].tolist() == [7, *struct.pack("<Q", 4000)]


def test_a_higher_level_is_smaller():
    tensor = torch.arange(100_000.0)
    assert bytes_of(Zstd(level=19).encode(tensor)) < bytes_of(Zstd(level=1).encode(tensor))


def test_large_parts_do_not_depend_on_threads():
    tensor = weights(9_000_000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(Zstd(level=1).encode(tensor)["values"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(Zstd().decode({"values": found[0]}, tensor.shape), tensor)


@pytest.mark.parametrize("levels", [0, 20])
def test_levels(levels):
    with pytest.raises(ValueError, match=f"level = {levels}: a whole number from 1 to 19"):
        Zstd(level=levels)


@pytest.mark.parametrize("code", range(9))
def test_a_bomb_is_refused_by_what_it_says(code, monkeypatch):
    bomb = part(bytes(10_000_000), code=code)
    assert bomb.numel() < 1000
    monkeypatch.setattr(zstandard, "ZstdDecompressor", None)  # it is not even tried
    with pytest.raises(ValueError, match="more bytes than a tensor of 100 values"):
        Zstd().decode({"values": bomb}, (100,))


def test_many_small_bombs_are_one():
    bombs = {f"part-{number}": part(bytes(2000)) for number in range(3)}
    with pytest.raises(ValueError, match="part-2"):
        Zstd().decode(bombs, (100,))


def test_a_bomb_that_lies_is_refused():
    for stated in (400, 0, 2**63):
        with pytest.raises(ValueError, match="unpacks to 10000000 bytes, expected"):
            Zstd().decode({"values": part(bytes(10_000_000), stated)}, (100,))
    with pytest.raises(ValueError, match="expected 400"):
        Zstd().decode({"values": part(bytes(400), 400, write_content_size=False)}, (100,))
    lying = part(bytes(10_000_000), 400)
    # The frame's own size too: descriptor, window, then 4 bytes of size.
    at = lying.numpy().tobytes().index(struct.pack("<I", 10_000_000))
    lying[at : at + 4] = torch.frombuffer(bytearray(struct.pack("<I", 400)), dtype=torch.uint8)
    with pytest.raises(ValueError, match="broken zstd frame"):
        Zstd().decode({"values": lying}, (100,))


def test_garbage_is_refused():
    good = Zstd().encode(weights(100))["values"]
    garbage = torch.arange(200, dtype=torch.uint8)
    garbage[:9] = good[:9]
    with pytest.raises(ValueError, match="is no zstd frame"):
        Zstd().decode({"values": garbage}, (100,))
    for at in (0, 1, 9):
        broken = good.clone()
        broken[at] = 77
        with pytest.raises(ValueError, match="part 'values'"):
            Zstd().decode({"values": broken}, (100,))
    # A bit anywhere is either found or changes a value: there is no checksum, the link has hashes.
    for at in range(9, good.numel(), 7):
        broken = good.clone()
        broken[at] ^= 0x10
        try:
            assert Zstd().decode({"values": broken}, (100,)).shape == (100,)
        except ValueError:
            continue


@pytest.mark.parametrize("kept", [0, 1, 9, 10, 20, -1])
def test_truncated_parts_are_refused(kept):
    good = Zstd().encode(weights(100))["values"]
    with pytest.raises(ValueError, match="values"):
        Zstd().decode({"values": good[:kept]}, (100,))


def test_what_follows_a_frame_is_refused():
    good = Zstd().encode(weights(100))["values"]
    with pytest.raises(ValueError, match="broken zstd frame"):
        Zstd().decode({"values": torch.cat([good, good])}, (100,))


def test_bytes_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="no zstd header: dtype 7, 401 bytes"):
        Zstd().decode({"values": part(bytes(401))}, (100,))


def test_the_dtype_is_the_inner_codecs_to_check():
    with pytest.raises(ValueError, match=r"'values' is 200 x torch.bfloat16, expected 100 x"):
        Zstd(Fp32()).decode({"values": part(bytes(400), code=6)}, (100,))


def test_parts_at_odd_places_of_a_buffer():
    tensor = weights(1000)
    parts = Zstd(Int8()).encode(tensor)
    moved = {name: torch.cat([found[:3], found])[3:] for name, found in parts.items()}
    assert torch.equal(
        Zstd(Int8()).decode(moved, tensor.shape), Zstd(Int8()).decode(parts, tensor.shape)
    )


class Strange(Fp32):
    def __init__(self, dtype):
        self.dtype = dtype

    def encode(self, tensor, memory=None):
        return {"values": tensor.to(self.dtype)}

    def decode(self, parts, shape, empty=torch.empty):
        assert parts["values"].dtype == self.dtype
        return parts["values"].float().view(shape)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.float64], ids=str
)
def test_parts_of_any_number_type(dtype):
    codec, tensor = Zstd(Strange(dtype)), torch.arange(-60.0, 60.0)
    assert torch.equal(codec.decode(codec.encode(tensor), (120,)), tensor)


def test_parts_of_no_number_type():
    with pytest.raises(TypeError, match=r"parts of torch\.complex64, unknown to zstd"):
        Zstd(Strange(torch.complex64)).encode(torch.zeros(3))


def test_memory_reaches_the_inner_codec():
    memory = {}
    Zstd(PowerSGD(rank=2)).encode(weights().view(200, 250), memory)
    assert memory["basis"].shape == (250, 2)
