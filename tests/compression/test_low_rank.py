"""Factors: the product comes back, in as few as its energy needs."""

from __future__ import annotations

import pytest
import torch

from photon.compression.blockwise import Int8
from photon.compression.casts import Bf16
from photon.compression.codec import bytes_of
from photon.compression.low_rank import LowRank, PowerSGD
from photon.torch_threads import torch_threads


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank, m, n, seed=0):
    return drawn(m, rank, seed=seed) @ drawn(rank, n, seed=seed + 1)


def there_and_back(codec, tensor, memory=None):
    return codec.decode(codec.encode(tensor, memory), tensor.shape)


def lost(found, tensor):
    """Share of the squared norm."""
    return float((found - tensor).pow(2).sum() / tensor.pow(2).sum())


@pytest.mark.parametrize("shape", [(300, 80), (80, 300), (100, 100)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_a_matrix_of_rank_three_comes_back(shape, scale):
    tensor = of_rank(3, *shape) * scale
    codec = LowRank(energy=0.9999)
    parts = codec.encode(tensor)
    m, n = shape
    assert {name: part.nbytes for name, part in parts.items()} == {
        "rank": 4,
        "left.values": 4 * 3 * m,
        "right.values": 4 * 3 * n,
    }
    assert lost(codec.decode(parts, shape) / scale, tensor / scale) < 1e-4


@pytest.mark.parametrize("shape", [(200, 90), (90, 200)], ids=str)
@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
def test_the_energy_is_reached_and_by_no_rank_less(shape, energy):
    spectrum = 0.9 ** torch.arange(90.0)
    one, other = torch.linalg.qr(drawn(200, 90)).Q, torch.linalg.qr(drawn(90, 90, seed=1)).Q
    tensor = (one * spectrum) @ other.T
    tensor = tensor if shape == (200, 90) else tensor.T
    parts = LowRank(energy=energy).encode(tensor)
    rank = parts["left.values"].numel() // shape[0]
    share = spectrum.pow(2).cumsum(0) / spectrum.pow(2).sum()
    assert rank == int((share < energy).sum()) + 1
    found = LowRank().decode(parts, tensor.shape)
    assert lost(found, tensor) <= 1 - energy + 1e-5
    assert lost(found, tensor) == pytest.approx(1 - float(share[rank - 1]), abs=1e-4)


def test_dims_after_the_first_are_one():
    tensor = of_rank(2, 60, 7 * 5 * 3).view(60, 7, 5, 3)
    assert lost(there_and_back(LowRank(energy=0.999), tensor), tensor) < 1e-3
    assert bytes_of(LowRank(energy=0.999).encode(tensor)) == 4 + 4 * 2 * (60 + 105)


@pytest.mark.parametrize("codec", [LowRank(), LowRank(energy=1.0), PowerSGD(rank=50)])
def test_what_does_not_pay_is_sent_whole(codec):
    tensor = drawn(100, 90)
    parts = codec.encode(tensor)
    assert list(parts) == ["whole.values"]
    assert torch.equal(codec.decode(parts, tensor.shape), tensor)


@pytest.mark.parametrize("codec", [LowRank(Int8(), energy=0.5), PowerSGD(Int8(), rank=1)])
@pytest.mark.parametrize("shape", [(), (700,), (1, 700), (700, 1), (700, 1, 1), (0, 5)], ids=str)
def test_vectors_are_sent_whole(codec, shape):
    tensor = drawn(*shape)
    parts = codec.encode(tensor)
    whole = Int8().encode(tensor)
    assert sorted(parts) == sorted(f"whole.{name}" for name in whole)
    assert torch.equal(codec.decode(parts, shape), Int8().decode(whole, shape))


@pytest.mark.parametrize("codec", [LowRank(), PowerSGD()])
def test_zeros_stay_zeros(codec):
    memory = {}
    assert not there_and_back(codec, torch.zeros(50, 60), memory).any()
    assert not memory
    assert bytes_of(LowRank().encode(torch.zeros(50, 60))) == 4


@pytest.mark.parametrize("codec", [LowRank(Int8(), energy=0.99), PowerSGD(Int8(), rank=3)])
def test_factors_go_through_the_inner_codec(codec):
    tensor = of_rank(3, 256, 512)
    parts = codec.encode(tensor)
    assert sum(part.nbytes for name, part in parts.items() if name.endswith("codes")) <= 3 * 768
    assert lost(codec.decode(parts, tensor.shape), tensor) < 0.02


def test_directions_of_the_power_iteration_are_orthonormal():
    parts = PowerSGD(rank=5).encode(drawn(80, 70))
    left = parts["left.values"].view(5, 80)
    torch.testing.assert_close(left @ left.T, torch.eye(5), rtol=0, atol=1e-5)


def test_a_warm_basis_improves_over_rounds():
    spectrum = 0.8 ** torch.arange(60.0)
    one, other = torch.linalg.qr(drawn(100, 60)).Q, torch.linalg.qr(drawn(60, 60, seed=1)).Q
    tensor = (one * spectrum) @ other.T
    best = 1 - float(spectrum[:4].pow(2).sum() / spectrum.pow(2).sum())
    codec, memory = PowerSGD(rank=4), {}
    losses = [lost(there_and_back(codec, tensor, memory), tensor) for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.2 * best
    assert losses[-1] == pytest.approx(best, rel=0.01)
    assert memory["basis"].shape == (60, 4)
    cold = [lost(there_and_back(codec, tensor), tensor) for _ in range(2)]
    assert cold == [losses[0]] * 2


def test_a_silo_that_sent_nothing_keeps_its_basis():
    codec, memory = PowerSGD(rank=2), {}
    codec.encode(drawn(30, 40), memory)
    before = memory["basis"].clone()
    codec.encode(torch.zeros(30, 40), memory)
    assert torch.equal(memory["basis"], before)


def test_a_basis_of_another_shape_is_not_used():
    memory = {"basis": torch.full((40, 3), torch.nan)}
    one = PowerSGD(rank=2).encode(drawn(30, 40), memory)
    other = PowerSGD(rank=2).encode(drawn(30, 40))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert memory["basis"].shape == (40, 2)


def test_factors_must_not_be_averaged_but_products_may():
    tensors = [of_rank(1, 20, 30, seed=seed) for seed in (0, 5)]
    codec = PowerSGD(Bf16(), rank=1)
    products = [there_and_back(codec, tensor) for tensor in tensors]
    together = sum(products) / 2
    assert lost(together, sum(tensors) / 2) < 1e-3
    assert int(torch.linalg.matrix_rank(together, rtol=1e-3)) == 2


@pytest.mark.parametrize("rank", [4, 200, 2**32 - 1])
def test_a_rank_that_can_not_be_is_refused(rank):
    parts = LowRank(energy=0.99).encode(of_rank(3, 50, 60))
    wrong = torch.tensor([rank], dtype=torch.int64).view(torch.uint8)[:4]
    told = "left: part 'values' is 150 x" if rank == 4 else f"part 'rank' is {rank}, expected"
    with pytest.raises(ValueError, match=told):
        LowRank().decode(parts | {"rank": wrong}, (50, 60))
    with pytest.raises(ValueError, match="no part 'whole'"):
        LowRank().decode(parts, (3000,))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LowRank(energy=0), "energy = 0: a number above 0 to 1"),
        (lambda: LowRank(energy=1.5), "energy = 1.5: a number above 0 to 1"),
        (lambda: PowerSGD(rank=0), "rank = 0: a whole number from 1 to 1024"),
        (lambda: PowerSGD(rank=2000), "rank = 2000: a whole number from 1 to 1024"),
    ],
)
def test_parameters_have_bounds(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize("codec", [LowRank(energy=0.9), PowerSGD(rank=20)])
def test_what_is_decoded_does_not_depend_on_the_number_of_threads(codec):
    shape = (128, 200)
    parts = codec.encode(drawn(*shape))
    found = []
    for threads in (1, 5, 8):
        with torch_threads(threads):
            found.append(codec.decode(parts, shape))
    assert all(torch.equal(one, found[0]) for one in found)
