"""SparseLoCo against a plain loop over chunks."""

from __future__ import annotations

import pytest
import torch

from photon.compression.codec import bytes_of
from photon.compression.sparseloco import SparseLoco
from photon.errors import NonFiniteError


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(codec, tensor):
    return codec.decode(codec.encode(tensor), tensor.shape)


def chunks_of(tensor):
    """Views of the chunks of a contiguous tensor, by the paper's rule."""
    wide = tensor.dim() >= 2 and tensor.shape[0] >= 64 and tensor[0].numel() >= 64
    if not wide:
        yield from tensor.view(-1).split(4096)
        return
    matrix = tensor.view(len(tensor), -1)
    for top in range(0, matrix.shape[0], 64):
        for left in range(0, matrix.shape[1], 64):
            yield matrix[top : top + 64, left : left + 64]


def plain(tensor, k):
    """Top-k of each chunk, each kept value by the mean of its half; the split as Lloyd finds it."""
    result = torch.zeros_like(tensor)
    for source, target in zip(chunks_of(tensor), chunks_of(result), strict=True):
        values = source.flatten()
        places = values.abs().topk(min(k, len(values))).indices
        magnitude = torch.zeros(k)
        magnitude[: len(places)] = values[places].abs()
        middle = magnitude.mean()
        for _ in range(6):
            low, high = (magnitude[mask].mean() for mask in _halves(magnitude, middle))
            middle = (low + high) / 2
        levels = torch.stack([low, high]).bfloat16().float()
        middle = levels.mean()
        kept = torch.zeros_like(values)
        kept[places] = values[places].sign() * torch.where(
            values[places].abs() > middle, levels[1], levels[0]
        )
        target.copy_(kept.view(source.shape))
    return result


def _halves(magnitude, middle):
    upper = magnitude > middle
    return ~upper, upper


@pytest.mark.parametrize(
    "shape",
    [
        (4096,),
        (512,),
        (10_000,),
        (140_001,),
        (64, 64),
        (63, 5000),
        (5000, 63),
        (65, 130),
        (128, 2, 5, 7),
        (700, 300),
        (70, 5000),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [64, 128])
def test_each_chunk_is_as_a_plain_loop_has_it(shape, k):
    tensor = drawn(*shape)
    found, expected = there_and_back(SparseLoco(k=k), tensor), plain(tensor, k)
    # Two magnitudes whose first 12 bits agree may be taken in another order.
    differing = (found != 0) != (expected != 0)
    assert int(differing.sum()) <= 2 + 2e-2 * int((expected != 0).sum())
    torch.testing.assert_close(found[~differing], expected[~differing], rtol=2**-7, atol=0)


def test_ties_are_taken_in_order():
    tensor = torch.ones(8192)
    tensor[4096:] *= -1
    found = there_and_back(SparseLoco(), tensor)
    assert found.nonzero().flatten().tolist() == [*range(64), *range(4096, 4096 + 64)]
    assert found.unique().tolist() == [-1.0, 0.0, 1.0]


def test_places_are_twelve_bits():
    tensor = torch.zeros(4096)
    places = torch.tensor([0, 1, 255, 256, 4095, 2048, 15, 16])
    tensor[places] = torch.tensor([2.0, -2.0, 4.0, -4.0, 2.0, -2.0, 4.0, -4.0])
    parts = SparseLoco(k=8).encode(tensor)
    assert {name: part.nbytes for name, part in parts.items()} == {
        "index": 12,
        "codes": 2,
        "levels": 4,
    }
    assert parts["levels"].tolist() == [2.0, 4.0]
    low, mixed, high = parts["index"].view(3, 4).int()
    first, second = low | (mixed & 15) << 8, mixed >> 4 | high << 4
    assert [*first.tolist(), *second.tolist()] == sorted(places.tolist())
    assert torch.equal(SparseLoco(k=8).decode(parts, (4096,)), tensor)


def test_the_two_levels_are_no_worse_than_means_on_both_sides_of_the_mean():
    tensor = drawn(100, 4096).pow(3).flatten()  # a heavy tail
    found = there_and_back(SparseLoco(), tensor).view(100, -1)
    rows = tensor.view(100, -1)
    magnitude = rows.abs().topk(64, dim=1).values
    upper = magnitude > magnitude.mean(dim=1, keepdim=True)
    means = torch.stack(
        [(magnitude * side).sum(1) / side.sum(1) for side in (~upper, upper)], dim=1
    )
    coarse = (magnitude - means.gather(1, upper.long())).pow(2).sum(1)
    fine = ((rows - found) * (found != 0)).pow(2).sum(1)
    assert bool((fine <= coarse * 1.001 + 1e-3).all())
    assert fine.sum() < 0.9 * coarse.sum()


def test_a_matrix_is_a_hundred_times_smaller():
    tensor = drawn(768, 3072)
    assert tensor.nbytes / bytes_of(SparseLoco().encode(tensor)) > 141
    assert tensor.nbytes / bytes_of(SparseLoco().encode(drawn(769, 3071))) > 100


def test_small_tensors_are_sent_whole():
    tensor = drawn(511)
    parts = SparseLoco().encode(tensor)
    assert torch.equal(parts["values"], tensor.bfloat16())
    assert list(SparseLoco().encode(drawn(512))) == ["index", "codes", "levels"]


def test_tiles_are_of_a_matrix_runs_of_anything_else():
    tensor = torch.zeros(128, 128)
    tensor[:64, :64] = 1 + drawn(64, 64).abs()
    found = there_and_back(SparseLoco(), tensor)
    assert int((found != 0).sum()) == 64
    assert int((there_and_back(SparseLoco(), tensor.flatten()) != 0).sum()) == 2 * 64


def test_nothing_moves_where_nothing_moved():
    tensor = torch.zeros(256, 128)
    tensor[:64] = drawn(64, 128)
    assert not there_and_back(SparseLoco(), tensor)[64:].any()


def test_error_feedback_sends_everything_in_the_end():
    target, sent = drawn(64, 64), torch.zeros(64, 64)
    left = target.clone()
    for _ in range(150):
        step = there_and_back(SparseLoco(), left)
        sent += step
        left -= step
    assert left.norm() < 0.05 * target.norm()
    torch.testing.assert_close(sent + left, target, rtol=0, atol=1e-4)


def test_the_largest_numbers():
    tensor = torch.full((4096,), 3.38e38)
    torch.testing.assert_close(
        there_and_back(SparseLoco(), tensor)[:64], tensor[:64], rtol=0.01, atol=0
    )
    with pytest.raises(NonFiniteError, match="sparseloco"):
        SparseLoco().encode(torch.full((4096,), 3.4028e38))  # infinite in bf16


def test_places_out_of_order_are_refused():
    parts = SparseLoco().encode(drawn(4096))
    wrong = parts["index"].clone()
    wrong[:] = 7
    with pytest.raises(ValueError, match="'index' is not ascending"):
        SparseLoco().decode(parts | {"index": wrong}, (4096,))


@pytest.mark.parametrize("k", [0, 2, 6, 1028])
def test_odd_counts_are_refused(k):
    with pytest.raises(ValueError, match=f"k = {k}: a multiple of 4"):
        SparseLoco(k=k)
