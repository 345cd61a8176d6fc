"""The running mean: exact where it must be, close to fp64 elsewhere, one accumulator."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.aggregation import BUILTIN_RULES, WeightedMean, build_merging_rule
from photon.config import FederationConfig
from photon.config.run import MERGING_RULE_NAMES
from photon.errors import ModelMismatchError, NodeError, PluginError, QuorumLostError, RunError

EPS = torch.finfo(torch.float32).eps


def some_updates(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(5, 3, generator=generator),
            "scalar": torch.randn((), generator=generator),
            "empty": torch.zeros(0),
        }
        for _ in range(count)
    ]


def merged(updates: list[dict[str, torch.Tensor]], weights: list[float]) -> dict[str, torch.Tensor]:
    rule = WeightedMean()
    for tensors, weight in zip(updates, weights, strict=True):
        rule.add(tensors.items(), weight)
    return rule.result()


def test_the_registry_is_what_the_config_accepts() -> None:
    assert tuple(BUILTIN_RULES) == MERGING_RULE_NAMES
    assert isinstance(build_merging_rule(FederationConfig()), WeightedMean)


def test_an_unknown_rule_is_a_plugin_error() -> None:
    with pytest.raises(PluginError, match="'mode'"):
        build_merging_rule(FederationConfig().model_copy(update={"merging_rule": "mode"}))


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.1, 524288.0, 1e-30])
def test_one_participants_mean_is_its_tensors_bit_for_bit(weight: float) -> None:
    (update,) = some_updates(1)
    update["w"][0] = torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max])
    result = merged([update], [weight])
    for name, tensor in update.items():
        assert result[name].view(torch.int32).equal(tensor.view(torch.int32))


def test_equal_updates_merge_to_themselves_bit_for_bit() -> None:
    (update,) = some_updates(1)
    result = merged([update] * 5, [7.0, 1.0, 3.0, 0.25, 11.0])
    assert all(result[name].equal(tensor) for name, tensor in update.items())


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_it_is_the_weighted_mean_of_fp64(weights: list[float], seed: int, scale: float) -> None:
    updates = [{n: t * scale for n, t in u.items()} for u in some_updates(len(weights), seed)]
    result = merged(updates, weights)
    stacked = torch.stack([u["w"] for u in updates]).double()
    shares = torch.tensor(weights, dtype=torch.float64)
    expected = (stacked * (shares / shares.sum()).view(-1, 1, 1)).sum(0)
    bound = 4 * EPS * len(weights) * float(stacked.abs().max())
    assert float((result["w"].double() - expected).abs().max()) <= bound
    assert result["w"].dtype == torch.float32


def test_the_order_of_arrival_moves_the_mean_by_rounding_only() -> None:
    updates, weights = some_updates(4), [1.0, 10.0, 100.0, 3.0]
    results = [
        merged([updates[k] for k in order], [weights[k] for k in order])["w"]
        for order in permutations(range(4))
    ]
    spread = torch.stack(results).max(0).values - torch.stack(results).min(0).values
    largest = max(float(u["w"].abs().max()) for u in updates)
    assert float(spread.max()) <= 4 * EPS * 4 * largest


def test_the_order_of_tensors_inside_an_update_is_free() -> None:
    one, two = some_updates(2)
    forward = merged([one, two], [1.0, 2.0])
    backward = merged([one, dict(reversed(two.items()))], [1.0, 2.0])
    assert all(forward[name].equal(backward[name]) for name in forward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_merged_in_fp32(dtype: torch.dtype) -> None:
    one, two = ({"w": u["w"].to(dtype)} for u in some_updates(2))
    result = merged([one, two], [1.0, 1.0])["w"]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (one["w"].float() + two["w"].float()) / 2)


def test_inputs_are_not_changed_and_not_kept() -> None:
    one, two = some_updates(2)
    kept = one["w"].clone()
    result = merged([one, two], [1.0, 1.0])
    assert one["w"].equal(kept)
    assert result["w"].data_ptr() not in (one["w"].data_ptr(), two["w"].data_ptr())


def test_a_round_starts_afresh_in_the_same_buffers() -> None:
    rule = WeightedMean()
    one, two = some_updates(2)
    rule.add(one.items(), 5.0)
    first = rule.result()
    assert first["w"].equal(one["w"])
    first["w"].zero_()  # the caller may use the buffers as it likes
    rule.add(two.items(), 1.0)
    second = rule.result()
    assert second["w"].equal(two["w"])
    assert second["w"].data_ptr() == first["w"].data_ptr()


def test_results_stay_valid_until_the_next_add() -> None:
    rule = WeightedMean()
    (one,) = some_updates(1)
    rule.add(one.items(), 1.0)
    result = rule.result()
    rule.discard()
    assert result["w"].equal(one["w"])


def test_another_model_may_follow() -> None:
    rule = WeightedMean()
    rule.add([("w", torch.ones(2)), ("old", torch.ones(2))], 1.0)
    rule.result()
    rule.add([("w", torch.ones(3))], 1.0)
    assert {name: t.shape for name, t in rule.result().items()} == {"w": torch.Size([3])}


def test_discard_forgets_the_round() -> None:
    rule = WeightedMean()
    one, two = some_updates(2)
    rule.add(one.items(), 1.0)
    rule.discard()
    with pytest.raises(QuorumLostError):
        rule.result()
    rule.add(two.items(), 1.0)
    assert rule.result()["w"].equal(two["w"])


def test_nothing_merged_is_an_error() -> None:
    with pytest.raises(QuorumLostError, match="no update"):
        WeightedMean().result()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero_and_finite(weight: float) -> None:
    rule = WeightedMean()
    one, two = some_updates(2)
    rule.add(one.items(), 1.0)
    with pytest.raises(NodeError, match="weight"):
        rule.add(two.items(), weight)
    assert rule.result()["w"].equal(one["w"]), "a refused weight leaves the mean alone"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", torch.ones(2))], "lacks 1 of 2 tensors: 'b'"),
        ([("w", torch.ones(2)), ("c", torch.ones(1))], "'c' is not part of"),
        ([("w", torch.ones(2)), ("w", torch.ones(2)), ("b", torch.ones(1))], "twice|lacks"),
        ([("w", torch.ones(2)), ("b", torch.ones(1)), ("b", torch.ones(1))], "twice"),
        ([("w", torch.ones(2)), ("b", torch.ones(2))], "shape"),
        ([("w", torch.ones(1)), ("b", torch.ones(1))], "shape"),
    ],
)
def test_an_update_that_breaks_off_spoils_the_round_loudly(
    tensors: list[tuple[str, torch.Tensor]], message: str
) -> None:
    rule = WeightedMean()
    rule.add([("w", torch.zeros(2)), ("b", torch.zeros(1))], 1.0)
    with pytest.raises(ModelMismatchError, match=message):
        rule.add(tensors, 1.0)
    with pytest.raises(RunError, match="broke off"):
        rule.result()
    with pytest.raises(RunError, match="broke off"):
        rule.add(tensors, 1.0)
    rule.discard()
    rule.add([("w", torch.ones(2)), ("b", torch.ones(1))], 1.0)
    assert rule.result()["w"].equal(torch.ones(2))


def test_a_stream_that_fails_spoils_the_round_loudly() -> None:
    def stream():
        yield "w", torch.ones(2)
        raise OSError("gone")

    rule = WeightedMean()
    with pytest.raises(OSError, match="gone"):
        rule.add(stream(), 1.0)
    with pytest.raises(RunError, match="broke off"):
        rule.result()


_MEASURE = """
import sys, torch
from photon.aggregation import WeightedMean, check_update
torch.set_num_threads(1)
tensors, size = 24, 1 << 20   # 24 x 4 MiB = 96 MiB a model

def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1])

def update(k):
    for i in range(tensors):
        yield f"t{i}", torch.full((size,), float(k + i))

reference = {f"t{i}": torch.empty(size, device="meta") for i in range(tensors)}
before = peak()
for participants in (2, 16):
    rule = WeightedMean()
    for k in range(participants):
        check_update(update(k), reference)
        rule.add(update(k), 1.0 + k)
    rule.result()
    print((peak() - before) / 1024 / 96)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_one_model_whatever_the_number_of_participants() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        capture_output=True,
        text=True,
        check=True,
        # Each tensor in pages of its own: what glibc keeps of freed ones is not ours to count.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    few, many = map(float, done.stdout.split())
    assert 0.9 < few < 1.4
    assert many - few < 0.2
