"""The 8-bit code (arXiv 2110.02861) and AdamW on top of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from photon.training import eight_bit
from photon.training.eight_bit import BLOCK, BlockCodes, EightBitAdamW, _Code

SHAPES = st.tuples(st.integers(0, 5), st.sampled_from([1, 3, 64, 255, 256, 257, 600]))


@given(shape=SHAPES, exponent=st.integers(-44, 34), spread=st.integers(0, 6), signed=st.booleans())
def test_decoded_values_have_the_same_codes(shape, exponent, spread, signed):
    """Over all scales of fp32, subnormal ones too; a saved run must go on bit for bit."""
    torch.manual_seed(exponent)
    values = torch.randn(shape).mul(10.0**exponent).mul(10.0 ** (-spread * torch.rand(shape)))
    codes = BlockCodes.encode(values if signed else values.abs(), signed=signed)
    again = BlockCodes.encode(codes.decode(), signed=signed)
    assert torch.equal(codes.codes, again.codes)
    assert torch.equal(codes.scales, again.scales)


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_is_taken(signed):
    code = _Code.of(signed, torch.device("cpu"))
    torch.manual_seed(0)
    values = torch.rand(20_000) * 10.0 ** (-9 * torch.rand(20_000))
    edges = [code.values, code.boundaries[:-1], torch.tensor([0.0, -0.0, 1e-38, 1e-44, 1.0])]
    values = torch.cat([values, *edges])
    values = torch.cat([values, -values]) if signed else values.abs()
    chosen = code.nearest(values)
    assert torch.equal(chosen.long(), torch.bucketize(values, code.boundaries[:-1]))
    gaps = (values[:, None].double() - code.values.double()).abs()
    mine = gaps.gather(1, chosen.long()[:, None]).squeeze(1)
    spared = torch.zeros_like(values, dtype=torch.bool) if signed else (values < 1e-7)
    # But for rounding where two codes are equally near.
    torch.testing.assert_close(mine[~spared], gaps.amin(1)[~spared], rtol=1e-4, atol=1e-9)


def test_the_code_is_sorted_reaches_both_ends_and_fits_eight_bits():
    for signed, least in ((True, -1.0), (False, 0.0)):
        values = _Code.of(signed, torch.device("cpu")).values
        assert len(values) <= 256
        assert bool((values.diff() > 0).all())
        assert (float(values[0]), float(values[-1])) == (least, 1.0)
        assert 0.0 in values


def test_a_positive_second_moment_never_becomes_zero():
    values = torch.full((1, BLOCK), 1e-14)
    values[0, 0] = 1.0
    assert bool((BlockCodes.encode(values, signed=False).decode() > 0).all())


def test_rows_have_scales_of_their_own():
    """So it does not matter how rows are cut among ranks, nor how loud a neighbour is."""
    values = torch.randn(6, 300) * 10.0 ** torch.arange(6)[:, None]
    whole = BlockCodes.encode(values, signed=True)
    assert whole.codes.shape == (6, 300)
    assert whole.scales.shape == (6, 2)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = BlockCodes.encode(values[rows], signed=True)
        assert torch.equal(part.codes, whole.codes[rows])
    error = (whole.decode() - values).abs().mean(1) / values.abs().mean(1)
    assert float(error.max()) < 0.02


def test_moments_of_matrices_take_a_quarter_of_the_bytes():
    parameter = nn.Parameter(torch.randn(8, 512))
    parameter.grad = torch.randn(8, 512)
    optimizer = EightBitAdamW([parameter], lr=1e-3)
    optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        stored = optimizer.state[parameter][key]
        assert isinstance(stored, BlockCodes)
        assert stored.codes.dtype == torch.uint8
        assert stored.codes.nbytes + stored.scales.nbytes == 8 * 512 + 8 * 2 * 4


def test_vectors_step_as_torchs_adamw_and_matrices_nearly():
    torch.manual_seed(0)
    shapes = [(40, 300), (30,)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    eight = EightBitAdamW(ours, **options)
    exact = torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) + 0.5
            other.grad = mine.grad.clone()
        eight.step()
        exact.step()
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-7)
        if step == 0:  # nothing has been stored yet
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    gap = (ours[0] - theirs[0]).detach().abs()
    assert 0 < float(gap.mean()) < 0.02 * 10 * 1e-2
    assert float(gap.max()) < 0.5 * 10 * 1e-2


def test_rare_rows_do_not_explode():
    """A gradient small beside its neighbour's, then none: m outlives v in a naive 8-bit code."""
    parameter = nn.Parameter(torch.zeros(1, BLOCK))
    optimizer = EightBitAdamW([parameter], lr=1.0)
    gradient = torch.full((1, BLOCK), 1e-6)
    gradient[0, 0] = 1e-1
    for step in range(5):
        parameter.grad = gradient if step == 0 else torch.zeros_like(gradient)
        optimizer.step()
    assert float(parameter.detach().abs().max()) < 5


def test_parts_bound_memory_and_change_nothing(monkeypatch):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(23, 300)) for _ in range(2)]
    ours[1].data.copy_(ours[0].data)
    for parameter, elements in zip(ours, (2**24, 1000), strict=True):
        monkeypatch.setattr(eight_bit, "_PART_ELEMENTS", elements)
        torch.manual_seed(1)
        optimizer = EightBitAdamW([parameter], lr=1e-2)
        for _ in range(3):
            parameter.grad = torch.randn(23, 300)
            optimizer.step()
    assert torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_are_the_codes_of_zeros(signed):
    for shape in [(3, 5), (0, 7), (2, 600), (2, 3, 256)]:
        zeros = BlockCodes.zeros(torch.Size(shape), torch.device("cpu"), signed=signed)
        codes = BlockCodes.encode(torch.zeros(shape), signed=signed)
        assert torch.equal(zeros.codes, codes.codes)
        assert torch.equal(zeros.scales, codes.scales)
