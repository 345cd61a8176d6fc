"""Every inner optimizer on every layout gives what one process alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from photon.training.muon import _heights

LAYOUTS = [(2, ["fsdp", "ddp"]), (3, ["fsdp", "ddp"]), (4, ["fsdp", "hybrid"])]
OPTIMIZERS = ("adamw", "adamw8", "muon", "normuon", "adopt", "amsgrad", "sgd")
CASES = [(world, layout) for world, layouts in LAYOUTS for layout in layouts]


@pytest.fixture(scope="module")
def found(run_ranks) -> dict[int, list[dict[str, Any]]]:
    """For 2, 3 and 4 ranks what each rank found."""
    (answers,) = run_ranks("sharded_optimizers", 1, LAYOUTS)
    return {world: answer for (world, _), answer in zip(LAYOUTS, answers, strict=True)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("world", "layout"), CASES)
def test_five_steps_are_those_of_one_process(found, world, layout, name):
    for rank in found[world]:
        assert rank[f"{layout} {name}"]["weights"] < 1e-6
        assert rank[f"{layout} {name}"]["state"] < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("world", "layout"), CASES)
def test_saved_state_goes_on_bit_for_bit(found, world, layout, name):
    for rank in found[world]:
        answer = rank[f"{layout} {name}"]
        assert answer["loads"]
        assert answer["copied"]
        assert answer["resumes"]
        assert answer["starts"]


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_ranks_share_the_orthogonalisation(found, world, layout):
    """Together they do every matrix once (once per replica), none more than its share."""
    done = [rank[f"{layout} muon"]["done"] for rank in found[world]]
    alone = found[world][0][f"{layout} muon"]["done_alone"]
    assert alone == 5 * 12 - 1  # five steps of twelve matrices, one without a gradient once
    replicas = 2 if layout == "hybrid" else 1
    assert sum(done) == replicas * alone
    assert max(done) - min(done) <= 5


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_gradients_of_a_real_backward_pass(found, world, layout):
    """A rank that holds no row of a matrix still gets a gradient for it, and joins in."""
    for rank in found[world]:
        assert rank[f"{layout} backward"] < 1e-5


def test_rows_are_cut_as_torch_cuts_them():
    for rows in range(1, 20):
        for world in range(1, 9):
            chunks = [len(chunk) for chunk in torch.empty(rows, 1).chunk(world)]
            assert _heights(rows, world) == chunks + [0] * (world - len(chunks))
