"""Two readings: nothing of a bad update is merged, and nothing of others is read again for it."""

from __future__ import annotations

import math

import pytest
import torch

from photon.aggregation import BUILTIN_RULES, WeightedMean
from photon.config import FederationConfig
from photon.config.parts import PartsConfig
from photon.errors import ChunkCorruptError, DiskFullError, RunError, StoreUnavailableError
from photon.federation.merging import Merging
from photon.federation.norm_bound import NormBound
from photon.federation.tasks import Receipt, Update
from photon.torch_threads import torch_threads

SHAPES = {"matrix": (60, 40), "vector": (40,), "last": (7, 3)}
REFERENCE = {f"weights/{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
MOMENTS = {f"optimizer/{key}": torch.zeros(4) for key in ("w.exp_avg", "w.exp_avg_sq")}
BOUND = NormBound(1000.0, "what the recipe can move", state=50.0)


def tensors(seed, **changes):
    draw = torch.Generator().manual_seed(seed)
    named = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return {f"weights/{name}": one for name, one in (named | changes).items()}


class Sent:
    """An update that counts how often it is read; `breaks` is raised before its last tensor."""

    def __init__(self, named, *, breaks=None, wire_bytes=0):
        self.readings, self._named, self._breaks = 0, named, breaks
        self.update = Update(Receipt(1, "red"), self._read, wire_bytes=wire_bytes)

    def _read(self):
        self.readings += 1
        for number, (name, tensor) in enumerate(self._named.items(), 1):
            if self._breaks is not None and number == len(self._named):
                raise self._breaks
            yield name, tensor


#: What is wrong with an update, and what is said of it.
BAD = {
    "nan in the last tensor": (Sent(tensors(9, last=torch.full((7, 3), math.nan))), "last' holds"),
    "infinite": (Sent(tensors(9, vector=torch.full((40,), math.inf))), "holds 40 NaN or inf"),
    "a tensor less": (Sent({"weights/matrix": torch.ones(60, 40)}), "lacks 2 of 3"),
    "another shape": (Sent(tensors(9, last=torch.ones(3, 7))), "has shape"),
    "damaged": (Sent(tensors(9), breaks=ChunkCorruptError("another hash")), "another hash"),
    "undecodable": (Sent(tensors(9), breaks=ValueError("no such index")), "no such index"),
    "not even an error of Photon's": (Sent(tensors(9), breaks=RuntimeError("in a kernel")), "ker"),
    "too large": (Sent({n: t * 1e4 for n, t in tensors(9).items()}), "exceeds what the recipe can"),
    "the largest there is": (Sent({n: t * 3e37 for n, t in tensors(9).items()}), "exceeds what"),
}


@pytest.mark.parametrize("rule", ["mean", "median", "edit"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_leaves_no_trace(bad, rule):
    config = FederationConfig(merging_rule=rule)
    sent, words = BAD[bad]
    sent.readings = 0
    merging, undisturbed = Merging(config), Merging(config)
    good = [Sent(tensors(seed)) for seed in (1, 2, 3)]
    for number, one in enumerate([*good[:2], sent, good[2]]):
        verdict = merging.offer(one.update, REFERENCE, number + 1.0, BOUND)
        if one is sent:
            assert words in verdict.refused
            continue
        assert verdict.refused is None
        flat = torch.cat([tensor.flatten() for tensor in one._named.values()])
        assert verdict.norm == pytest.approx(float(flat.norm()), rel=1e-5)
        undisturbed.offer(Sent(one._named).update, REFERENCE, number + 1.0, BOUND)
    assert [one.readings for one in good] == [2, 2, 2]  # no reading more for the bad one
    assert sent.readings == 1
    merged, expected = merging.result(REFERENCE), undisturbed.result(REFERENCE)
    assert merged.norms == expected.norms
    for name, tensor in expected.tensors.items():
        assert torch.equal(merged.tensors[name], tensor)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_none_costs_its_update(weight):
    merging = Merging(FederationConfig())
    assert "weight is" in merging.offer(Sent(tensors(1)).update, REFERENCE, weight).refused
    assert merging.offer(Sent(tensors(2)).update, REFERENCE, 1.0).refused is None


@pytest.mark.parametrize("error", [StoreUnavailableError("no store"), DiskFullError("no room")])
def test_what_is_nobodys_fault_is_not_an_update_refused(error):
    merging = Merging(FederationConfig())
    with pytest.raises(type(error)):
        merging.offer(Sent(tensors(1), breaks=error).update, REFERENCE, 1.0)
    merging.discard()
    assert merging.offer(Sent(tensors(2)).update, REFERENCE, 1.0).norm > 0


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_what_is_unusually_large_counts_as_if_it_were_not(rule):
    sent = tensors(1)
    usual = Merging(FederationConfig()).offer(Sent(sent).update, REFERENCE, 1.0).norm
    merging = Merging(FederationConfig(merging_rule=rule))
    bound = NormBound(math.inf, counted=usual / 4)
    verdict = merging.offer(Sent(sent).update, REFERENCE, 1.0, bound)
    assert (verdict.norm, verdict.share) == (usual, 0.25)
    merged = merging.result(REFERENCE, bound)
    assert all(torch.equal(merged.tensors[name], sent[name] / 4) for name in sent)
    assert merged.norms == [usual / 4]


def test_averaged_state_is_not_scaled_with_its_update():
    reference = REFERENCE | {"optimizer/w.exp_avg": torch.zeros(2)}
    sent = tensors(1) | {"optimizer/w.exp_avg": torch.ones(2)}
    merging = Merging(FederationConfig(optimizer_state="average"))
    merging.offer(Sent(sent).update, reference, 1.0, NormBound(math.inf, counted=1e-3))
    assert merging.result(reference).tensors["optimizer/w.exp_avg"].tolist() == [1.0, 1.0]


def test_adopted_weights_are_judged_by_how_far_they_went():
    held = {name: tensor + 1e3 for name, tensor in tensors(5).items()}
    near = {name: tensor + 0.01 for name, tensor in held.items()}
    merging = Merging(FederationConfig(merge="adopt"))
    verdict = merging.offer(Sent(near).update, held, 1.0, NormBound(1.0, "1"))
    parameters = sum(tensor.numel() for tensor in held.values())
    assert verdict.norm == pytest.approx(0.01 * math.sqrt(parameters), rel=1e-2)
    assert verdict.refused is None
    assert merging.offer(Sent(tensors(5)).update, held, 1.0, NormBound(1.0, "1")).refused


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("w.exp_avg", 100.0, "inner optimizer's state has norm 200.1; "),
        ("w.exp_avg_sq", -1e-9, "second moments below 0"),
        ("w.exp_avg_sq", math.nan, "holds 4 NaN"),
    ],
)
def test_averaged_state_is_bounded_and_counts_for_no_distance(key, value, words):
    merging = Merging(FederationConfig(optimizer_state="average"))
    reference = REFERENCE | MOMENTS
    moments = {name: torch.full((4,), 3.0) for name in MOMENTS}
    bad = moments | {f"optimizer/{key}": torch.full((4,), value)}
    verdict = merging.offer(Sent(tensors(1) | bad).update, reference, 1.0, BOUND)
    assert words in verdict.refused
    alone = Merging(FederationConfig()).offer(Sent(tensors(1)).update, REFERENCE, 1.0)
    verdict = merging.offer(Sent(tensors(1) | moments).update, reference, 1.0, BOUND)
    assert (verdict.norm, verdict.refused) == (alone.norm, None)


class Doubling(WeightedMean):
    """A rule that leaves the range of what it was given."""

    def result(self):
        return {name: tensor * self.factor for name, tensor in super().result().items()}


@pytest.mark.parametrize(("factor", "words"), [(1e3, "its norm"), (3e38, "NaN or infinite")])
def test_what_came_out_is_held_against_the_bound_too(factor, words, monkeypatch):
    monkeypatch.setitem(BUILTIN_RULES, "mean", lambda config, folder: Doubling())
    monkeypatch.setattr(Doubling, "factor", factor, raising=False)
    merging = Merging(FederationConfig())
    assert merging.offer(Sent(tensors(1)).update, REFERENCE, 1.0, BOUND).refused is None
    with pytest.raises(RunError, match=f"is not used: .*{words}"):
        merging.result(REFERENCE, BOUND)


def test_norms_are_those_of_the_merged():
    merging = Merging(FederationConfig())
    for scale in (5.0, 1.0, 3.0, 1e9, 2.0):
        one = {name: torch.full(shape, scale) for name, shape in SHAPES.items()}
        sent = Sent({f"weights/{name}": tensor for name, tensor in one.items()})
        merging.offer(sent.update, REFERENCE, 1.0, NormBound(1e3, "1000"))
    parameters = sum(tensor.numel() for tensor in REFERENCE.values())
    merged = merging.result(REFERENCE, NormBound(1e3, "1000"))
    assert merged.norms == pytest.approx([one * math.sqrt(parameters) for one in (5, 1, 3, 2)])


def test_cores_are_left_to_those_that_hash():
    fp32_bytes = sum(4 * tensor.numel() for tensor in REFERENCE.values())
    seen = []

    class Watched(Sent):
        def _read(self):
            for named in super()._read():
                seen.append(torch.get_num_threads())
                yield named

    def used(wire_bytes, breaks=None):
        seen.clear()
        sent = Watched(tensors(1), breaks=breaks, wire_bytes=wire_bytes)
        verdict = Merging(FederationConfig()).offer(sent.update, REFERENCE, 1.0)
        assert (verdict.refused is None) == (breaks is None)
        assert torch.get_num_threads() == 6
        return set(seen)

    with torch_threads(6):
        assert used(0) == {6}
        assert used(fp32_bytes // 8) == {5}
        assert used(fp32_bytes) == {2}
        assert used(fp32_bytes * 100) == {1}
        assert used(fp32_bytes, ChunkCorruptError("another hash")) == {2}


def test_key_tensors_have_a_rule_of_their_own():
    """The norm that verdicts go by is the whole update's."""
    merging = Merging(
        FederationConfig(), parts=PartsConfig(key=["key"], key_rule="median"), key=["key"]
    )
    reference = {f"weights/{name}": torch.zeros(2) for name in ("key", "rest")}
    for value in (1.0, 2.0, 30.0):
        sent = {name: torch.full((2,), value) for name in reference}
        verdict = merging.offer(Sent(sent).update, reference, 1.0)
        assert verdict.norm == pytest.approx(2 * value)
    merged = merging.result(reference).tensors
    assert torch.equal(merged["weights/key"], torch.full((2,), 2.0))
    torch.testing.assert_close(merged["weights/rest"], torch.full((2,), 11.0))
