"""The largest micro-batch that fits: found once, remembered, backed off from, never the maths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from photon.errors import DoesNotFitError, RankLostError
from photon.training import Ranks, Seat, within_memory
from photon.training.micro_batch import MicroBatch, ran_out_of_memory


def test_sizes_are_divisors_of_the_share():
    size = MicroBatch(12)
    seen = [size.size]
    while size.size > 1:
        size.back_off("out of memory with", "")
        seen.append(size.size)
    assert seen == [12, 6, 4, 3, 2, 1]
    with pytest.raises(DoesNotFitError, match="one sequence at a time"):
        size.back_off("out of memory with", "")
    assert size.size == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 12), ({"asked": 4}, 4), ({"guess": 5}, 4), ({"asked": 6, "guess": 2}, 6)],
)
def test_the_search_begins_where_it_is_told(options, expected):
    assert MicroBatch(12, **options).size == expected


def test_what_was_found_is_remembered_for_its_key_only(tmp_path):
    memo = tmp_path / "nodes" / "micro_batch.json"
    first = MicroBatch(8, memo=memo, key="125m cuda fsdp")
    first.back_off("out of memory with", "")
    assert MicroBatch(8, memo=memo, key="125m cuda fsdp").size == 4
    assert MicroBatch(8, asked=8, memo=memo, key="125m cuda fsdp").size == 4
    assert MicroBatch(8, memo=memo, key="125m cuda ddp").size == 8
    assert MicroBatch(16, memo=memo, key="125m cuda fsdp").size == 16


def test_a_memo_that_cannot_be_read_costs_a_search_only(tmp_path):
    memo = tmp_path / "micro_batch.json"
    memo.write_text("{")
    assert MicroBatch(8, memo=memo).size == 8


def test_only_failed_allocations_count_as_out_of_memory():
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not ran_out_of_memory(caught.value)


def test_scoring_takes_what_fits_on_all_ranks(run_ranks):
    for answer in run_ranks("scoring", 2, {"room": [8, 2]}):
        assert answer == {"tried": [8, 4, 2], "given": 2}


def test_scoring_that_can_not_go_on_says_so(tmp_path):
    def fails(_: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    cpu, memo = torch.device("cpu"), tmp_path / "memo.json"
    with pytest.raises(DoesNotFitError, match="one sequence at a time"):
        within_memory(fails, MicroBatch(4), cpu, Ranks.alone())
    # Cut among ranks: the others wait inside a collective, so the node starts again, with less.
    with pytest.raises(RankLostError, match=r"rank 1: .*scoring 4 sequences"):
        within_memory(fails, MicroBatch(4, memo=memo), cpu, Ranks(Seat(1, 1, 2, 2)), cut=True)
    assert MicroBatch(4, memo=memo).size == 2


@pytest.fixture
def run(run_ranks) -> Callable[..., dict[str, Any]]:
    """Runs programs/small_memory.py, alone in a process of its own."""

    def run(**options: Any) -> dict[str, Any]:
        return run_ranks("small_memory", 1, options)[0]

    return run


def test_a_real_shortage_halves_the_micro_batch_and_not_the_maths(run, tmp_path):
    """The kernel refuses memory beyond a limit (RLIMIT_DATA); training goes on, the same."""
    memo = str(tmp_path / "memo.json")
    free = run()
    assert free["micro_batch_size"] == 64
    assert free["notices"] == []
    tight = run(limit_bytes=free["needs_bytes"] // 2, memo=memo)
    assert tight["micro_batch_size"] < 64
    assert any("out of memory" in text and "same maths" in text for text in tight["notices"])
    assert tight["losses"] == pytest.approx(free["losses"], rel=1e-5)
    again = run(limit_bytes=free["needs_bytes"] // 2, memo=memo)
    assert again["micro_batch_size"] == tight["micro_batch_size"]
    assert again["notices"] == []


def test_a_model_that_cannot_fit_at_all_says_so(run):
    """Room for the weights, none for one sequence."""
    answer = run(limit_bytes=24 << 20)
    assert "with one sequence at a time" in answer["error"]
    assert "activation_checkpointing" in answer["hint"]
