"""check_update: what may be merged."""

from __future__ import annotations

import math

import pytest
import torch

from photon.aggregation import check as check_module
from photon.aggregation import check_update
from photon.aggregation.check import square_sum
from photon.errors import ModelMismatchError, NonFiniteError
from photon.torch_threads import torch_threads

REFERENCE = {
    "w": torch.zeros(3, 4),
    "b": torch.zeros(4),
    "scale": torch.zeros(()),
    "none": torch.zeros(0),
}


def update(**changes: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return list({**{name: torch.ones_like(t) for name, t in REFERENCE.items()}, **changes}.items())


def test_the_norm_is_that_of_all_tensors_together() -> None:
    assert check_update(update(), REFERENCE) == pytest.approx(math.sqrt(12 + 4 + 1))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("piece", [7, 1 << 17])
def test_the_norm_is_right_at_every_scale(
    scale: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "_PIECE", piece)
    count = 300_000 if piece > 7 else 150
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(0)) * scale
    norm = check_update([("w", tensor)], {"w": tensor})
    assert norm == pytest.approx(float(tensor.double().norm()), rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strided_tensors_pass(dtype: torch.dtype) -> None:
    strided = torch.ones(4, 3, dtype=dtype).t()
    assert check_update([("w", strided)], {"w": REFERENCE["w"]}) == pytest.approx(math.sqrt(12))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_and_refused(value: float) -> None:
    bad = torch.ones(3, 4)
    bad[1, 2] = value
    with pytest.raises(NonFiniteError, match="'w' holds 1 NaN or infinite values of 12"):
        check_update(update(w=bad), REFERENCE)


def test_huge_finite_values_do_not_overflow() -> None:
    huge = torch.full((3, 4), torch.finfo(torch.float32).max)
    assert math.isfinite(check_update(update(w=huge), REFERENCE))


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(ModelMismatchError, match="lacks 1 of 4 tensors: 'none'"):
        check_update(update()[:-1], REFERENCE)


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(ModelMismatchError, match="'extra' is not part of"):
        check_update(update(extra=torch.ones(1)), REFERENCE)


def test_a_tensor_given_twice_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match="'b' comes twice"):
        check_update([*update(), ("b", torch.ones(4))], REFERENCE)


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (1, 4)])
def test_another_shape_is_refused_even_if_it_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelMismatchError, match="'w' has shape"):
        check_update(update(w=torch.ones(shape)), REFERENCE)


def test_integers_are_refused() -> None:
    with pytest.raises(ModelMismatchError, match=r"'b' is torch\.int64"):
        check_update(update(b=torch.ones(4, dtype=torch.int64)), REFERENCE)


def test_a_norm_does_not_depend_on_the_number_of_threads():
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(700_001, generator=draw) * 1e-3
    squares = set()
    for threads in (1, 2, 4):
        with torch_threads(threads):
            squares.add(square_sum("w", tensor))
            assert torch.get_num_threads() == threads
    assert len(squares) == 1
