"""One reading or two: the same bits, the same refusals, and only bad updates cost a second one."""

from __future__ import annotations

import math

import pytest
import torch

from photon.config import FederationConfig
from photon.errors import ChunkCorruptError, StoreUnavailableError
from photon.federation.merging import Merging
from photon.federation.tasks import Receipt, Update
from photon.torch_threads import torch_threads

SHAPES = {"matrix": (60, 40), "vector": (40,), "last": (7, 3)}
REFERENCE = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}


def tensors(seed, **changes):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()} | changes


class Sent:
    """An update that counts how often it is read; `breaks` is raised before its last tensor."""

    def __init__(self, named, *, lasting, breaks=None):
        self.readings, self._named, self._breaks = 0, named, breaks
        self.update = Update(Receipt(1, "red"), self._read, lasting=lasting)

    def _read(self):
        self.readings += 1
        for number, (name, tensor) in enumerate(self._named.items(), 1):
            if self._breaks is not None and number == len(self._named):
                raise self._breaks
            yield name, tensor


#: What is wrong with an update, and what is said of it.
BAD = {
    "nan in the last tensor": (tensors(9, last=torch.full((7, 3), math.nan)), None, "'last' holds"),
    "a tensor less": ({"matrix": torch.ones(60, 40)}, None, "lacks 2 of 3"),
    "another shape": (tensors(9, last=torch.ones(3, 7)), None, "has shape"),
    "damaged": (tensors(9), ChunkCorruptError("another hash"), "another hash"),
    "too large": ({n: t * 1e4 for n, t in tensors(9).items()}, None, "max_update_norm = 1000"),
}


def merged(lasting, bad, rule="mean"):
    """The result of three good updates with a bad one before the last, and all that was sent."""
    merging = Merging(FederationConfig(merging_rule=rule, max_update_norm=1000))
    named, breaks, words = BAD[bad]
    sent = [Sent(tensors(seed), lasting=lasting) for seed in (1, 2, 3)]
    sent.insert(2, Sent(named, lasting=lasting, breaks=breaks))
    for number, one in enumerate(sent):
        verdict = merging.offer(one.update, REFERENCE, number + 1.0)
        if number == 2:
            assert words in verdict.refused
        else:
            assert verdict.refused is None
            flat = torch.cat([tensor.flatten() for tensor in one._named.values()])
            assert verdict.norm == pytest.approx(float(flat.norm()), rel=1e-5)
    return {name: t.clone() for name, t in merging.result().items()}, [s.readings for s in sent]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_leaves_no_trace(bad):
    once, readings = merged(True, bad)
    twice, both = merged(False, bad)
    merging = Merging(FederationConfig())
    for seed, weight in ((1, 1.0), (2, 2.0), (3, 4.0)):
        merging.offer(Sent(tensors(seed), lasting=False).update, REFERENCE, weight)
    for name, expected in merging.result().items():
        assert torch.equal(once[name], expected)
        assert torch.equal(twice[name], expected)
    assert readings == [2, 2, 1, 1]  # those before the bad one are read again
    assert both == [2, 2, 1, 2]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "edit"])
def test_rules_that_ask_for_the_norm_get_it(rule):
    once, readings = merged(True, "damaged", rule)
    assert readings == [2, 2, 1, 2]
    assert all(bool(tensor.isfinite().all()) for tensor in once.values())


def test_what_is_nobodys_fault_is_not_an_update_refused():
    merging = Merging(FederationConfig())
    for lasting in (True, False):
        gone = Sent(tensors(1), lasting=lasting, breaks=StoreUnavailableError("no store"))
        with pytest.raises(StoreUnavailableError):
            merging.offer(gone.update, REFERENCE, 1.0)
        merging.discard()
        assert merging.offer(Sent(tensors(2), lasting=lasting).update, REFERENCE, 1.0).norm > 0
        merging.discard()


@pytest.mark.parametrize("lasting", [True, False])
def test_cores_are_left_to_those_that_hash(lasting):
    fp32_bytes = sum(4 * tensor.numel() for tensor in REFERENCE.values())
    seen = []

    def reading(breaks=None):
        for name, tensor in tensors(1).items():
            seen.append(torch.get_num_threads())
            yield name, tensor
        if breaks is not None:
            raise breaks

    def used(wire_bytes, breaks=None):
        seen.clear()
        update = Update(
            Receipt(1, "red"), lambda: reading(breaks), lasting=lasting, wire_bytes=wire_bytes
        )
        merging = Merging(FederationConfig())
        verdict = merging.offer(update, REFERENCE, 1.0)
        assert (verdict.refused is None) == (breaks is None)
        assert torch.get_num_threads() == 6
        return set(seen)

    with torch_threads(6):
        assert used(0) == {6}
        assert used(fp32_bytes // 8) == {5}
        assert used(fp32_bytes) == {2}
        assert used(fp32_bytes * 100) == {1}
        assert used(fp32_bytes, ChunkCorruptError("another hash")) == {2}
