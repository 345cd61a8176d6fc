"""One contract suite, every codec (invariant 5)."""

from __future__ import annotations

import pytest
import torch

from photon.compression import CODECS, bytes_of
from photon.errors import NonFiniteError

#: Largest error of a value, as a share of its block's largest.
ERROR = {
    "fp32": 0.0,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "int8": 0.006,
    "int4": 0.075,
    "fp4": 1 / 3,
}
#: Bytes for each value, in a tensor of whole blocks.
COST = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "int8": 1 + 2 / 128,
    "int4": 0.5 + 2 / 128,
    "fp4": 0.5 + 2 / 128,
    "sign": 1 / 8 + 2 / 128,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=sorted(CODECS))
def codec(request):
    return CODECS[request.param]()


def values(*shape, scale=1.0, dtype=torch.float32):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape, 7)))
    return (drawn * scale).to(dtype)


def there_and_back(codec, tensor):
    return codec.decode(codec.encode(tensor), tensor.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (3, 5, 41), (1000, 700)], ids=str)
def test_what_comes_back_is_near(codec, shape, dtype):
    tensor = values(*shape, scale=0.01, dtype=dtype)
    found = there_and_back(codec, tensor)
    assert found.dtype == torch.float32
    error = (found - tensor.float()).abs()
    if codec.name == "sign":
        assert bool((torch.sign(found) == torch.sign(tensor))[tensor != 0].all())
        assert error.norm() < tensor.float().norm()
    else:
        # 1e-7: below fp16's smallest normal number.
        assert float(error.max()) <= ERROR[codec.name] * float(tensor.abs().max()) + 1e-7


def test_an_empty_tensor(codec):
    parts = codec.encode(torch.empty(0, 5))
    assert bytes_of(parts) == 0
    assert codec.decode(parts, (0, 5)).shape == (0, 5)


def test_layout_does_not_matter(codec):
    tensor = values(64, 48)
    turned = tensor.T.contiguous().T
    assert not turned.is_contiguous()
    one, other = codec.encode(tensor), codec.encode(turned)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_cost_is_as_stated(codec):
    parts = codec.encode(values(64, 1024))
    assert bytes_of(parts) == COST[codec.name] * 64 * 1024
    for part in parts.values():
        assert part.is_contiguous()


def test_the_tensor_is_left_alone_and_parts_are_its_own(codec):
    tensor = values(300)
    before = tensor.clone()
    parts = codec.encode(tensor)
    decoded = codec.decode(parts, (300,))
    assert torch.equal(tensor, before)
    tensor.zero_()  # a trainer goes on while an update is on its way
    assert torch.equal(codec.decode(parts, (300,)), decoded)


def test_the_same_tensor_gives_the_same_parts(codec):
    one, other = codec.encode(values(5000)), codec.encode(values(5000))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 4999])
def test_what_is_not_finite_is_refused(codec, bad, at):
    tensor = values(5000)
    tensor[at] = bad
    with pytest.raises(NonFiniteError, match=codec.name):
        codec.encode(tensor)


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 0.0, 1e30])
def test_no_scale_makes_nan(codec, scale):
    if codec.name == "fp16" and scale > 1:
        with pytest.raises(NonFiniteError):
            codec.encode(values(500, scale=scale))
        return
    found = there_and_back(codec, values(500, scale=scale))
    assert bool(torch.isfinite(found).all())
    if scale == 0.0:
        assert not found.any()


def test_parts_that_do_not_belong_are_refused(codec):
    parts = codec.encode(values(1000))
    with pytest.raises(ValueError, match=r"expected \d+ x"):
        codec.decode(parts, (2000,))
    for name in parts:
        with pytest.raises(ValueError, match=f"no part '{name}'"):
            codec.decode({other: part for other, part in parts.items() if other != name}, (1000,))
        with pytest.raises(ValueError, match=name):
            codec.decode(parts | {name: parts[name].to(torch.int64)}, (1000,))
