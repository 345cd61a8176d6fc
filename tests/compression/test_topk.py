"""Top-k: one exact threshold over an update, and places that cost what they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.compression.blockwise import Int8
from photon.compression.codec import bytes_of
from photon.compression.topk import TopK
from photon.errors import NonFiniteError


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def there_and_back(codec, tensor):
    return codec.decode(codec.encode(tensor), tensor.shape)


def test_one_threshold_for_all_tensors_of_an_update():
    update = {
        "large": drawn(300, 700, seed=1),
        "small": drawn(500, 400, seed=2, scale=0.3),
        "none": torch.zeros(1000),
        "norm": drawn(777, seed=3, scale=2.0),
    }
    codec = TopK(density=0.03).fitted(update.items)
    found = torch.cat([there_and_back(codec, tensor).flatten() for tensor in update.values()])
    together = torch.cat([tensor.flatten() for tensor in update.values()])
    due = round(0.03 * together.numel())
    expected = torch.zeros_like(together)
    where = together.abs().topk(due).indices
    expected[where] = together[where]
    assert torch.equal(found, expected)
    shares = [len(codec.encode(tensor)["values.values"]) for tensor in update.values()]
    assert shares[0] / 210_000 > 20 * shares[1] / 200_000
    assert shares[2] == 0


def test_a_tensor_alone_sends_its_own_share():
    tensor = drawn(200, 1000)
    found = there_and_back(TopK(density=0.05), tensor)
    assert int((found != 0).sum()) == 10_000
    assert found[found != 0].abs().min() >= tensor[found == 0].abs().max()


@given(
    numbers=st.lists(st.integers(-40, 40), min_size=1, max_size=300),
    density=st.floats(0.001, 1),
    fine=st.booleans(),
)
def test_ties_are_sent_and_zeros_are_not(numbers, density, fine):
    # Values that differ in the low half of their bits only, or in the high half.
    tensor = torch.tensor(numbers, dtype=torch.float32)
    tensor = torch.sign(tensor) * (1 + tensor.abs() * 2**-20) if fine else tensor
    found = there_and_back(TopK(density=density), tensor)
    due = max(1, round(density * len(numbers)))
    last = tensor.abs().sort(descending=True).values[due - 1]
    assert torch.equal(found, torch.where(tensor.abs() >= last, tensor, 0.0))


def test_what_ties_with_the_last_is_all_sent_in_few_bytes():
    tensor = torch.where(drawn(100_000) > 0, 0.5, -0.5)
    parts = TopK(Int8(), density=0.01).encode(tensor)
    assert "bitmap" in parts
    assert torch.allclose(TopK(Int8(), density=0.01).decode(parts, tensor.shape), tensor, rtol=1e-2)


def test_places_take_two_bytes_or_one_bit_each():
    tensor = drawn(4 * 65_536)
    sparse = TopK(density=0.05).encode(tensor)
    kept = round(0.05 * tensor.numel())
    assert sorted(sparse) == ["counts", "index", "values.values"]
    assert sparse["index"].nbytes == 2 * kept
    assert sparse["counts"].nbytes == 4 * 4
    dense = TopK(density=0.07).encode(tensor)
    assert sorted(dense) == ["bitmap", "values.values"]
    assert dense["bitmap"].nbytes == tensor.numel() / 8
    assert bytes_of(dense) - dense["values.values"].nbytes < 2 * 0.07 * tensor.numel()


@pytest.mark.parametrize("count", [1, 7, 9, 65_535, 65_536, 65_537, 65_536 + 13, 200_003])
@pytest.mark.parametrize("density", [0.002, 0.3, 1.0])
def test_any_number_of_values(count, density):
    tensor = drawn(count, seed=count)
    found = there_and_back(TopK(density=density), tensor)
    assert int((found != 0).sum()) == max(1, round(density * count))
    assert torch.equal(found[found != 0], tensor[found != 0])


def test_kept_values_keep_their_order_for_the_inner_codec():
    tensor = torch.zeros(1000)
    tensor[::100] = torch.arange(1.0, 11.0)
    parts = TopK(density=0.01).encode(tensor)
    assert parts["values.values"].tolist() == list(range(1, 11))
    assert parts["index"].view(torch.int16).tolist() == list(range(0, 1000, 100))


def test_places_beyond_32767():
    tensor = torch.zeros(65_536 + 70)
    for place in (0, 32_767, 32_768, 65_535, 65_536, 65_605):
        tensor[place] = place + 1
    assert torch.equal(there_and_back(TopK(density=6 / 65_606), tensor), tensor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_not_fitted(bad):
    update = {"a": drawn(100), "b": drawn(100)}
    update["b"][99] = bad
    with pytest.raises(NonFiniteError, match="topk"):
        TopK().fitted(update.items)
    with pytest.raises(NonFiniteError, match="topk"):
        TopK().fitted({"a": update["a"]}.items).encode(update["b"])


@pytest.mark.parametrize("update", [{}, {"none": torch.empty(0, 3)}, {"zero": torch.zeros(9)}])
def test_an_update_of_nothing(update):
    codec = TopK().fitted(update.items)
    for tensor in update.values():
        assert torch.equal(there_and_back(codec, tensor), tensor)


def shorts(*numbers):
    return torch.tensor(numbers, dtype=torch.int32).to(torch.int16).view(torch.uint8)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32).view(torch.uint8)


@pytest.mark.parametrize(
    ("counts", "index", "told"),
    [
        (ints(2, 0), shorts(5, 5), "not ascending"),
        (ints(2, 0), shorts(6, 5), "not ascending"),
        (ints(1, 1), shorts(5, 4464), "not ascending within 70000 values"),  # the last is 4463
        (ints(3, -1), shorts(5, 6), "not of blocks"),
        (ints(65_537, 0), shorts(5, 6), "not of blocks"),
        (ints(2, 1), shorts(5, 6), r"'index' is 4 x torch.uint8, expected 6 x"),
        (ints(2), shorts(5, 6), r"'counts' is 4 x torch.uint8, expected 8 x"),
    ],
)
def test_places_that_can_not_be_are_refused(counts, index, told):
    parts = {"counts": counts, "index": index, "values.values": torch.ones(2)}
    with pytest.raises(ValueError, match=told):
        TopK().decode(parts, (70_000,))


def test_places_that_can_be():
    parts = {"counts": ints(1, 1), "index": shorts(5, 4463), "values.values": torch.ones(2)}
    assert TopK().decode(parts, (70_000,)).nonzero().flatten().tolist() == [5, 69_999]


def test_values_and_places_must_be_as_many():
    parts = TopK(density=0.01).encode(drawn(1000))
    with pytest.raises(ValueError, match=r"values: part 'values' is 9 x .* expected 10 x"):
        TopK().decode(parts | {"values.values": parts["values.values"][1:]}, (1000,))
    parts = TopK(density=0.5).encode(drawn(1001))
    with pytest.raises(ValueError, match=r"values: part 'values' is 500 x .* expected 0 x"):
        TopK().decode(parts | {"bitmap": parts["bitmap"] * 0}, (1001,))
    stray = parts["bitmap"].clone()
    stray[-1] |= 0x80  # of the padding
    with pytest.raises(ValueError, match="a value at 1007 of 1001"):
        TopK().decode(parts | {"bitmap": stray}, (1001,))


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_densities(density):
    with pytest.raises(ValueError, match=f"density = {density}: a number above 0 to 1"):
        TopK(density=density)
