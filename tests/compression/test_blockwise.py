"""What sets the block-wise codecs apart."""

from __future__ import annotations

import pytest
import torch

from photon.compression.blockwise import Fp4, Int4, Int8, Sign


def test_a_large_value_costs_only_its_block():
    tensor = torch.full((256,), 0.01)
    tensor[3] = 1000.0
    found = Int8().decode(Int8().encode(tensor), tensor.shape)
    assert not found[4:128].any()  # beside it, nothing is left
    torch.testing.assert_close(found[128:], tensor[128:], rtol=0.01, atol=0)


def test_integers_are_the_nearest_ones():
    steps = torch.arange(-7.0, 8.0)
    tensor = torch.cat([steps, steps + 0.4 * (steps < 6), torch.tensor([7.0, -7.0])])
    found = Int4(block=32).decode(Int4(block=32).encode(tensor), tensor.shape)
    torch.testing.assert_close(found, tensor.round())


def test_fp4_takes_the_nearest_of_its_fifteen_values():
    levels = torch.tensor([0.0, *(2.0**power for power in range(-6, 1))])
    levels = torch.cat([-levels.flip(0), levels])
    tensor = torch.linspace(-1, 1, 4096)
    found = Fp4(block=4096).decode(Fp4(block=4096).encode(tensor), tensor.shape)
    nearest = (tensor[:, None] - levels).abs().min(dim=1).values
    torch.testing.assert_close((tensor - found).abs(), nearest, rtol=0, atol=1e-7)


def test_small_values_survive_in_fp4_where_int4_has_none():
    tensor = torch.full((128,), 0.02)
    tensor[0] = 1.0
    assert not Int4().decode(Int4().encode(tensor), tensor.shape)[1:].any()
    torch.testing.assert_close(
        Fp4().decode(Fp4().encode(tensor), tensor.shape)[1:], tensor[1:], rtol=0.34, atol=0
    )


def test_a_short_last_block_has_the_mean_of_its_own_values():
    tensor = torch.tensor([1.0, -1.0] * 64 + [4.0, -2.0, 3.0])
    found = Sign().decode(Sign().encode(tensor), tensor.shape)
    assert found[:128].abs().unique().tolist() == [1.0]
    assert found[128:].tolist() == [3.0, -3.0, 3.0]


@pytest.mark.parametrize("block", [0, 8, 100, 8192])
def test_odd_blocks_are_refused(block):
    with pytest.raises(ValueError, match=f"block = {block}: a power of two from 16 to 4096"):
        Int8(block=block)


@pytest.mark.parametrize("codec", [Int8, Int4, Fp4, Sign])
@pytest.mark.parametrize("block", [16, 4096])
def test_any_block_gives_back_what_it_can(codec, block):
    tensor = torch.randn(3 * 2**17 + 5, generator=torch.Generator().manual_seed(1))
    found = codec(block=block).decode(codec(block=block).encode(tensor), tensor.shape)
    angle = torch.nn.functional.cosine_similarity(found, tensor, dim=0)
    assert angle > {"int8": 0.999, "int4": 0.97, "fp4": 0.97, "sign": 0.79}[codec.name]
