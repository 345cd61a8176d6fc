"""Every built-in merging rule: one contract, and the names run files give them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.aggregation import BUILTIN_RULES, MergingRule, build_merging_rule, check_update
from photon.config import FederationConfig, parse_run_config
from photon.config.run import MERGING_RULE_NAMES
from photon.errors import (
    IncompatibleConfigError,
    InvalidValueError,
    ModelMismatchError,
    NodeError,
    QuorumLostError,
    RunError,
)

EPS = torch.finfo(torch.float32).eps
SETTINGS = {
    "mean": FederationConfig(),
    "clipped_mean": FederationConfig(merging_rule="clipped_mean", clip_update_norm=3.0),
    "median": FederationConfig(merging_rule="median"),
    "trimmed_mean": FederationConfig(merging_rule="trimmed_mean"),
    "edit": FederationConfig(merging_rule="edit", clip_update_norm=1e6),
}
#: Those that sort before they sum: not a bit depends on who came first.
BIT_FOR_BIT = {"median", "trimmed_mean"}
every_rule = pytest.mark.parametrize("name", MERGING_RULE_NAMES)
Update = dict[str, torch.Tensor]


def some_updates(count: int, seed: int = 0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(5, 3, generator=generator),
            "scalar": torch.randn((), generator=generator),
            "empty": torch.zeros(0),
        }
        for _ in range(count)
    ]


def give(rule: MergingRule, update: Update, weight: float = 1.0) -> None:
    rule.add(update.items(), weight, check_update(update.items(), update))


def merged(name: str, updates: list[Update], weights: list[float] | None = None) -> Update:
    rule = build_merging_rule(SETTINGS[name])
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        give(rule, update, weight)
    return rule.result()


def test_the_registry_is_what_the_config_accepts() -> None:
    assert tuple(BUILTIN_RULES) == MERGING_RULE_NAMES == tuple(SETTINGS)


@every_rule
def test_one_participant_is_merged_into_its_own_update(name: str) -> None:
    (update,) = some_updates(1)
    update["w"].div_(update["w"].norm())  # within clipped_mean's bound
    result = merged(name, [update], [7.0])
    assert list(result) == list(update)
    for key, tensor in update.items():
        assert result[key].equal(tensor)
        assert result[key].dtype == torch.float32


@every_rule
def test_equal_updates_merge_to_themselves(name: str) -> None:
    update = {key: tensor / 10 for key, tensor in some_updates(1)[0].items()}
    result = merged(name, [update] * 5, [7.0, 1.0, 3.0, 0.25, 11.0])
    assert all(result[key].equal(tensor) for key, tensor in update.items())


@every_rule
@given(seed=st.integers(0, 10_000), count=st.integers(2, 6), scale=st.sampled_from([1e-4, 1, 1e3]))
def test_the_order_of_arrival_moves_the_result_by_rounding_at_most(
    name: str, seed: int, count: int, scale: float
) -> None:
    """K updates of mixed sizes: 4 K fp32 roundings of the largest value, or not a bit."""
    updates = [
        {key: tensor * scale * (1 + k) for key, tensor in update.items()}
        for k, update in enumerate(some_updates(count, seed))
    ]
    weights = [float(1 + (seed >> k) % 17) for k in range(count)]
    orders = list(permutations(range(count)))
    orders = orders[:: max(1, len(orders) // 6)]
    results = torch.stack(
        [merged(name, [updates[k] for k in o], [weights[k] for k in o])["w"] for o in orders]
    )
    spread = float((results.max(0).values - results.min(0).values).max())
    largest = max(float(update["w"].abs().max()) for update in updates)
    assert spread <= (0.0 if name in BIT_FOR_BIT else 4 * EPS * count * largest)


@every_rule
def test_zeros_of_both_signs_do_not_tell_who_came_first(name: str) -> None:
    signed = [{"w": torch.tensor([sign * 0.0])} for sign in (1, -1, 1, -1)]
    bits = {
        merged(name, [signed[k] for k in order])["w"].view(torch.int32).item()
        for order in permutations(range(4))
    }
    if name in BIT_FOR_BIT:
        assert bits == {0}


@every_rule
def test_the_order_of_tensors_inside_an_update_is_free(name: str) -> None:
    one, two, three = some_updates(3)
    forward = merged(name, [one, two, three])
    backward = merged(name, [one, dict(reversed(two.items())), three])
    assert all(forward[key].equal(backward[key]) for key in forward)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strided_tensors_are_merged_in_fp32(name: str, dtype: torch.dtype) -> None:
    updates = [{"w": update["w"].to(dtype).t()} for update in some_updates(3)]
    result = merged(name, updates)["w"]
    assert result.dtype == torch.float32
    same = merged(name, [{"w": update["w"].float().contiguous()} for update in updates])["w"]
    torch.testing.assert_close(result, same)


@every_rule
def test_inputs_are_not_changed_and_rounds_do_not_mix(name: str) -> None:
    rule = build_merging_rule(SETTINGS[name])
    updates = [{key: t * 10 for key, t in update.items()} for update in some_updates(4)]
    kept = [update["w"].clone() for update in updates]
    for update in updates[:2]:
        give(rule, update)
    first = rule.result()
    assert first["w"].equal(merged(name, updates[:2])["w"])
    for tensor in first.values():
        tensor.fill_(torch.nan)  # the caller may use the buffers as it likes
    other = build_merging_rule(SETTINGS[name])  # that has learned the same, and nothing else
    other.load_state_tensors(rule.state_tensors())
    for update in updates[2:]:
        give(rule, update)
        give(other, update)
    assert rule.result()["w"].equal(other.result()["w"])
    assert all(update["w"].equal(copy) for update, copy in zip(updates, kept, strict=True))


@every_rule
def test_another_model_may_follow(name: str) -> None:
    rule = build_merging_rule(SETTINGS[name])
    give(rule, {"w": torch.ones(2), "old": torch.ones(2)})
    rule.result()
    give(rule, {"w": torch.ones(3)})
    assert {key: t.shape for key, t in rule.result().items()} == {"w": torch.Size([3])}


@every_rule
def test_discard_forgets_the_round(name: str) -> None:
    rule = build_merging_rule(SETTINGS[name])
    one, two = ({key: t / 10 for key, t in update.items()} for update in some_updates(2))
    give(rule, one)
    rule.discard()
    assert rule.state_tensors() == {}
    with pytest.raises(QuorumLostError, match="no update"):
        rule.result()
    give(rule, two)
    assert rule.result()["w"].equal(two["w"])


@every_rule
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero_and_finite(name: str, weight: float) -> None:
    rule = build_merging_rule(SETTINGS[name])
    one, two = ({key: t / 10 for key, t in update.items()} for update in some_updates(2))
    give(rule, one)
    with pytest.raises(NodeError, match="weight"):
        give(rule, two, weight)
    assert rule.result()["w"].equal(one["w"]), "a refused weight leaves the round alone"


@every_rule
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", torch.ones(2))], "lacks 1 of 2 tensors: 'b'"),
        ([("w", torch.ones(2)), ("c", torch.ones(1))], "'c' is not part of"),
        ([("w", torch.ones(2)), ("b", torch.ones(1)), ("b", torch.ones(1))], "twice"),
        ([("w", torch.ones(2)), ("b", torch.ones(2))], "shape"),
        ([("w", torch.ones(2)), ("b", torch.ones(1, dtype=torch.int64))], "expected floating"),
    ],
)
def test_an_update_that_breaks_off_spoils_the_round_loudly(
    name: str, tensors: list[tuple[str, torch.Tensor]], message: str
) -> None:
    rule = build_merging_rule(SETTINGS[name])
    # The large norm has clipped_mean scale what it passes on: the type must be refused even so.
    rule.add([("w", torch.zeros(2)), ("b", torch.zeros(1))], 1.0, 0.0)
    with pytest.raises(ModelMismatchError, match=message):
        rule.add(tensors, 1.0, 100.0)
    with pytest.raises(RunError, match="broke off"):
        rule.result()
    with pytest.raises(RunError, match="broke off"):
        rule.add(tensors, 1.0, 1.0)
    rule.discard()
    give(rule, {"w": torch.ones(2), "b": torch.ones(1)})
    assert rule.result()["w"].equal(torch.ones(2))


@every_rule
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_stream_that_fails_spoils_the_round_loudly(name: str, earlier: int) -> None:
    def stream():
        yield "w", torch.ones(2)
        raise OSError("gone")

    rule = build_merging_rule(SETTINGS[name])
    for _ in range(earlier):
        rule.add([("w", torch.ones(2))], 1.0, 1.0)
    with pytest.raises(OSError, match="gone"):
        rule.add(stream(), 1.0, 1.0)
    with pytest.raises(RunError, match="broke off"):
        rule.result()
    rule.discard()


@every_rule
def test_a_first_update_with_a_name_twice_is_refused(name: str) -> None:
    rule = build_merging_rule(SETTINGS[name])
    with pytest.raises(ModelMismatchError, match="'w' comes twice"):
        rule.add([("w", torch.ones(1)), ("w", torch.ones(1))], 1.0, 1.0)
    rule.discard()


@every_rule
def test_state_of_another_rule_is_refused(name: str) -> None:
    rule = build_merging_rule(SETTINGS[name])
    rule.load_state_tensors({})
    with pytest.raises(ModelMismatchError, match="unknown 'momentum'"):
        rule.load_state_tensors({"momentum": torch.zeros(1)})


RUN = {"model": {"preset": "tiny"}, "data": {"path": "d"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merging_rule=clipped_mean"], "needs federation.clip_update_norm"),
        (["merging_rule=clipped_mean", "clip_update_norm=1", "merge=adopt"], "sends weights"),
        (["merging_rule=edit", "merge=adopt"], "sends weights"),
        (["merging_rule=edit", "optimizer_state=average"], "sends inner optimizer state"),
        (["clip_update_norm=1"], "only means something with merging_rule"),
    ],
)
def test_what_can_not_work_together_is_said_when_the_file_is_read(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(IncompatibleConfigError, match=message):
        parse_run_config(RUN, [f"federation.{override}" for override in overrides])


@pytest.mark.parametrize(
    "override", ["trim=0.5", "trim=-0.1", "clip_update_norm=0", "anomaly_z=0", "max_update_norm=0"]
)
def test_values_out_of_bounds_are_refused(override: str) -> None:
    with pytest.raises(InvalidValueError):
        parse_run_config(RUN, [f"federation.{override}"])


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_coordinatewise_rules_may_merge_weights(name: str) -> None:
    chosen = ["federation.merge=adopt", f"federation.merging_rule={name}"]
    assert parse_run_config(RUN, chosen).federation.merging_rule == name


def test_a_rule_without_the_key_it_needs_is_refused() -> None:
    with pytest.raises(IncompatibleConfigError, match="clip_update_norm"):
        build_merging_rule(FederationConfig(merging_rule="clipped_mean"))
