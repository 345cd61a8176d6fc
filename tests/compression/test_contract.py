"""One contract suite, every codec and what they are joined to (invariant 5)."""

from __future__ import annotations

import pytest
import torch

from photon.compression import build_codec
from photon.compression.build import CODECS
from photon.compression.codec import bytes_of
from photon.config.codecs import parse_codec
from photon.errors import NonFiniteError

JOINED = (
    "zstd(level=1)",
    "bf16+zstd",
    "fp16+zstd(level=1)",
    "int8+zstd",
    "sign(block=64)+zstd",
    "sparseloco+zstd",
    "sparseloco(k=256)",
    "topk(density=0.02)+int8+zstd",
    "topk(density=0.25)+int4",
    "topk(density=1)+bf16",
    "lowrank(energy=0.5)+int8",
    "lowrank(energy=0.9)+bf16+zstd",
    "powersgd(rank=2)+int8+zstd",
)
#: Largest error of a value, as a share of its block's largest.
ERROR = {
    "fp32": 0.0,
    "bf16": 2**-8,
    "fp16": 2**-11,
    "int8": 0.006,
    "int4": 0.075,
    "fp4": 1 / 3,
}
#: Largest squared error, as a share of the tensor's squared norm, for any tensor.
ENERGY = {
    "sign": 1.0,
    "sign(block=64)": 1.0,
    "topk": 0.99,
    "topk(density=0.02)": 0.98 + 1e-4,  # and what int8 adds, here and below
    "topk(density=0.25)": 0.75 + 1e-2,
    "topk(density=1)": 2**-16,
    "sparseloco": 1.0,
    "sparseloco(k=256)": 1.0,
    "lowrank": 0.05 + 1e-6,
    "lowrank(energy=0.5)": 0.5 + 1e-4,
    "lowrank(energy=0.9)": 0.1 + 1e-4,
    "powersgd": 1.0 + 1e-6,
    "powersgd(rank=2)": 1.0 + 1e-4,
}
#: Bytes for each value of a matrix [64, 1024].
COST = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "int8": 1 + 2 / 128,
    "int4": 0.5 + 2 / 128,
    "fp4": 0.5 + 2 / 128,
    "sign": 1 / 8 + 2 / 128,
    "sparseloco": 116 / 4096,
    "sparseloco(k=256)": (256 * 14 / 8 + 4) / 4096,
    "topk": (655 * (4 + 2) + 4) / 65536,  # a place is two bytes, a count of a block four
    "topk(density=1)+bf16": 1 / 8 + 2,
    "powersgd": 4 * (64 + 1024) * 4 / 65536,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


#: Ring takes whole numbers only: tests/secure.
@pytest.fixture(params=(*sorted(CODECS.keys() - {"ring"}), *JOINED))
def spec(request):
    return request.param


@pytest.fixture
def codec(spec):
    return build_codec(spec)


def stages(spec):
    return [stage.name for stage in parse_codec(spec)]


def values(*shape, scale=1.0, dtype=torch.float32):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape, 7)))
    return (drawn * scale).to(dtype)


def there_and_back(codec, tensor):
    return codec.decode(codec.encode(tensor), tensor.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (3, 5, 41), (1000, 700)], ids=str)
def test_what_comes_back_is_near(spec, codec, shape, dtype):
    tensor = values(*shape, scale=0.01, dtype=dtype)
    found = there_and_back(codec, tensor)
    assert found.dtype == torch.float32
    error = (found - tensor.float()).abs()
    first = spec.split("+")[0]
    if first in ENERGY:
        assert error.norm() <= ENERGY[first] ** 0.5 * tensor.float().norm() + 1e-9
    else:
        # 1e-7: below fp16's smallest normal number.
        worst = max(ERROR.get(name, 0.0) for name in stages(spec))
        assert float(error.max()) <= worst * float(tensor.abs().max()) + 1e-7
    if "sign" in stages(spec):
        assert bool((torch.sign(found) == torch.sign(tensor))[tensor != 0].all())


@pytest.mark.parametrize("shape", [(), (700,), (130, 150)], ids=str)
def test_what_loses_nothing_says_so(spec, codec, shape):
    tensor = values(*shape)
    assert codec.lossless == (set(stages(spec)) <= {"fp32", "zstd"})
    if codec.lossless:
        assert torch.equal(there_and_back(codec, tensor), tensor)


def test_decoders_need_not_know_the_update(codec):
    tensors = {"a": values(200, 100), "b": values(300, scale=0.1)}
    fitted = codec.fitted(lambda: tensors.items())
    assert type(fitted) is type(codec)
    for tensor in tensors.values():
        parts = fitted.encode(tensor)
        found = fitted.decode(parts, tensor.shape)
        assert torch.equal(codec.decode(parts, tensor.shape), found)


def test_an_empty_tensor(codec):
    parts = codec.encode(torch.empty(0, 5))
    assert bytes_of(parts) == 0
    assert codec.decode(parts, (0, 5)).shape == (0, 5)


@pytest.mark.parametrize("shape", [(700,), (130, 150)], ids=str)
def test_the_result_lies_in_the_memory_that_was_given(spec, codec, shape):
    tensor, given = values(*shape), []

    def empty(count):
        given.append(torch.full((count,), torch.nan))
        return given[-1]

    parts = codec.encode(tensor)
    found = codec.decode(parts, shape, empty)
    assert torch.equal(found, codec.decode(parts, shape))
    lies_in = {one.untyped_storage().data_ptr() for one in (*given, *parts.values())}
    if "zstd" not in stages(spec) or given:  # zstd's parts have memory of their own
        assert found.untyped_storage().data_ptr() in lies_in


def test_layout_does_not_matter(codec):
    tensor = values(64, 48)
    turned = tensor.T.contiguous().T
    assert not turned.is_contiguous()
    one, other = codec.encode(tensor), codec.encode(turned)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_cost_is_as_stated(spec, codec):
    parts = codec.encode(values(64, 1024))
    if spec in COST:
        assert bytes_of(parts) == COST[spec] * 64 * 1024
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
@pytest.mark.parametrize("shape", [(5000,), (50, 100)], ids=str)
def test_what_is_not_finite_is_refused(spec, codec, shape, bad, at):
    tensor = values(5000)
    tensor[at] = bad
    with pytest.raises(NonFiniteError, match="|".join(stages(spec))):
        codec.encode(tensor.view(shape))


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 0.0, 1e30])
@pytest.mark.parametrize("shape", [(500,), (80, 90)], ids=str)
def test_no_scale_makes_nan(spec, codec, shape, scale):
    if "fp16" in stages(spec) and scale > 1:
        with pytest.raises(NonFiniteError):
            codec.encode(values(*shape, scale=scale))
        return
    found = there_and_back(codec, values(*shape, scale=scale))
    assert bool(torch.isfinite(found).all())
    if scale == 0.0:
        assert not found.any()


@pytest.mark.parametrize("shape", [(1000,), (100, 80)], ids=str)
def test_parts_that_do_not_belong_are_refused(codec, shape):
    parts = codec.encode(values(*shape))
    with pytest.raises(ValueError, match=r"expected \d+ x|no part 'whole'"):
        codec.decode(parts, (200_000,))
    for name in parts:
        # A part of an inner codec is called by that codec's name for it.
        own = name.split(".")[-1]
        with pytest.raises(ValueError, match=f"no part .*'({own}|whole|rank)'"):
            codec.decode({other: part for other, part in parts.items() if other != name}, shape)
        with pytest.raises(ValueError, match=own):
            codec.decode(parts | {name: parts[name].to(torch.int64)}, shape)
