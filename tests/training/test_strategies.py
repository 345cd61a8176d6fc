"""One rank, two copies, two cuts, four cuts: the same losses, gradients and weights."""

from __future__ import annotations

import pytest

from photon.errors import IncompatibleConfigError
from photon.training.ranks import Seat
from photon.training.strategy import choose_strategy

STEPS = 20
#: Losses are near 4 and fall to 2; sums in another order move the last fp32 digits, and twenty
#: steps carry them on.
TOLERANCE = 2e-5

RECIPES = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "muon": {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.1},
    "adopt": {"optimizer": "adopt"},
    "amsgrad": {"optimizer": "amsgrad", "lr": 1e-3},
    "sgd": {"optimizer": "sgd", "lr": 0.3},
}


#: (strategy, ranks, machines)
LAYOUTS = [("ddp", 2, 1), ("fsdp", 2, 1), ("fsdp", 4, 1), ("hybrid", 4, 2)]


@pytest.fixture(scope="module")
def trained(run_ranks):
    """(strategy, ranks, optimizer) -> what each rank saw. One launch for each number of ranks."""
    found = {}
    for world in (1, 2, 4):
        layouts = [each for each in [("single", 1, 1), *LAYOUTS] if each[1] == world]
        cases = [
            {"strategy": strategy, "machines": machines, "local": recipe, "steps": STEPS}
            for strategy, _, machines in layouts
            for recipe in RECIPES.values()
        ]
        answers = run_ranks("equality", world, cases)
        names = [(strategy, world, name) for strategy, _, _ in layouts for name in RECIPES]
        for number, key in enumerate(names):
            found[key] = [answer[number] for answer in answers]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize(("strategy", "world", "machines"), LAYOUTS)
def test_every_strategy_trains_the_same_model(trained, name, strategy, world, machines):
    """Equal losses, gradient norms, weights and state over 20 steps, fp32 (CPU, gloo)."""
    single = trained["single", 1, name][0]
    assert len(single["losses"]) == STEPS
    assert single["losses"][-1] < 0.8 * single["losses"][0]
    answers = trained[strategy, world, name]
    for answer in answers:
        assert answer["losses"] == pytest.approx(single["losses"], rel=TOLERANCE)
        assert answer["norms"] == pytest.approx(single["norms"], rel=100 * TOLERANCE)
        assert answer["weights"] == pytest.approx(single["weights"], rel=1e-4)
        assert answer["state"] == pytest.approx(single["state"], rel=1e-2, abs=1e-6)
        assert (answer["tokens"], answer["cursor"]) == (single["tokens"], single["cursor"])
    pieces = {"ddp": 1, "fsdp": world, "hybrid": world // machines}[strategy]
    assert sum(answer["held"] for answer in answers) == single["held"] * world // pieces


@pytest.mark.parametrize(
    ("asked", "seat", "state_gb", "chosen", "words"),
    [
        ("auto", Seat(), 200, "single", "one rank"),
        ("auto", Seat(0, 0, 8, 8), 20, "ddp", "leave room"),
        ("auto", Seat(0, 0, 8, 8), 112, "fsdp", "cut among 8 ranks"),
        ("auto", Seat(0, 0, 16, 8), 112, "hybrid", "copied between the 2 machines"),
        ("auto", Seat(0, 0, 2, 1), 112, "fsdp", "cut among 2 ranks"),
        ("fsdp", Seat(0, 0, 4, 4), 1, "fsdp", "asks for it"),
    ],
)
def test_auto_chooses_and_says_why(asked, seat, state_gb, chosen, words):
    strategy = choose_strategy(asked, seat, state_bytes=state_gb * 10**9, device_bytes=80 * 10**9)
    assert strategy.name == chosen
    assert words in strategy.reason


@pytest.mark.parametrize(
    ("asked", "seat", "words"),
    [
        ("single", Seat(0, 0, 2, 2), "the same model 2 times"),
        ("ddp", Seat(), "more than one rank"),
        ("hybrid", Seat(0, 0, 4, 4), "1 machine"),
    ],
)
def test_strategies_that_cannot_work_are_refused(asked, seat, words):
    with pytest.raises(IncompatibleConfigError, match=words):
        choose_strategy(asked, seat, state_bytes=1, device_bytes=10)
