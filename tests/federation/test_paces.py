"""Rounds that close before everybody has answered, on a clock of their own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from photon.aggregation.outer import build_outer_optimizer
from photon.config import FederationConfig, OuterConfig
from photon.config.clock import ClockConfig
from photon.federation.pace import Book, left_s, staleness_weight, unequal_steps
from photon.runs import resume, simulate
from photon.runs.study import study_time
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished, RoundFinished, RoundMerged, UpdateDropped

#: "green" is five times slower than the others.
CLOCK = {"silos": {"*": {"step_s": 1.0}, "green": {"step_s": 5.0}}}
SHORT = ("local.steps=2", "eval.every=0", "eval.max_tokens=300", "eval.per_silo=false")


@pytest.fixture
def timed(three_silos, make_config, tmp_path):
    """A run on simulated time; its summary and what it told."""

    def run(*overrides, clock=CLOCK, folder="run"):
        config = make_config(three_silos, *SHORT, *overrides)
        at = tmp_path / folder
        result = simulate(config, clock=ClockConfig.model_validate(clock), run_dir=at)
        return result.summary, read_history(at)

    return run


def merged(history):
    return [event.participants for event in history.of(RoundMerged)]


def test_everybody_is_waited_for_by_default(timed):
    summary, history = timed()
    assert merged(history) == [["blue", "green", "red"]] * 3
    sent_s = sum(event.load_s + event.publish_s for event in history.of(LocalFinished))
    # Three rounds of two steps of five seconds, and the slow one's own line.
    assert summary["simulated_s"] == pytest.approx(30 + sent_s / 3, rel=1e-6)
    ends_s = [event.simulated_s for event in history.of(RoundFinished)]
    assert ends_s[-1] == summary["simulated_s"]
    assert ends_s[0] == pytest.approx(ends_s[1] - ends_s[0], rel=0.1)
    trained_s = 3 * (2 + 2 + 10)
    assert summary["goodput"] == pytest.approx(trained_s / (3 * summary["simulated_s"]))
    assert summary["utilisation"] == pytest.approx(trained_s / (trained_s + sent_s))
    assert summary["tokens_lost"] == 0


def test_a_clock_changes_no_bit_of_a_synchronous_run(timed, three_silos, make_config, tmp_path):
    summary, _ = timed('federation.optimizer_state="keep"')
    config = make_config(three_silos, *SHORT, 'federation.optimizer_state="keep"')
    plain = simulate(config, run_dir=tmp_path / "plain").summary
    assert summary["weights_sha256"] == plain["weights_sha256"]
    assert plain["simulated_s"] is None
    assert read_history(tmp_path / "plain").of(RoundFinished)[-1].simulated_s is None


def test_a_quorum_closes_a_round_and_late_updates_are_lost(timed):
    summary, history = timed('federation.pace="quorum"', "federation.quorum=2")
    assert merged(history) == [["blue", "red"]] * 3
    assert [event.silo for event in history.of(UpdateDropped)] == ["green"] * 3
    assert "had not answered when round 1 closed" in history.of(UpdateDropped)[0].reason
    assert summary["simulated_s"] < 3 * 2 * 1.6
    assert summary["tokens_lost"] == 3 * 2 * 4 * 32


def test_a_late_update_is_merged_when_it_comes_with_less_weight(timed, monkeypatch):
    from photon.federation.merging import Merging

    weights, offer = [], Merging.offer

    def noted(self, update, reference, weight, *rest):
        weights.append((update.receipt.silo, update.receipt.round, weight))
        return offer(self, update, reference, weight, *rest)

    monkeypatch.setattr(Merging, "offer", noted)
    summary, history = timed(
        "federation.rounds=6",
        'federation.pace="quorum"',
        "federation.quorum=2",
        'federation.late="merge"',
        'federation.optimizer_state="keep"',
    )
    came = [(number, who) for number, who in enumerate(merged(history), 1) if "green" in who]
    assert came
    tokens = 2 * 4 * 32
    for silo, _, weight in weights:
        if silo != "green":
            assert weight == tokens
    (first, *_) = [(begun, weight) for silo, begun, weight in weights if silo == "green"]
    assert first == (1, pytest.approx(tokens * staleness_weight(came[0][0] - 1)))
    assert summary["tokens_lost"] == 0


def test_buffered_merges_wait_for_nobody(timed):
    summary, history = timed(
        'federation.pace="buffered"',
        "federation.quorum=1",
        "federation.rounds=3",
        "outer.name=delayed_nesterov",
        "outer.delay=3",
    )
    counts = [len(who) for who in merged(history)]
    assert set(counts) == {1}
    assert summary["rounds"] == len(counts) > 3
    # As many tokens as three rounds of three silos would take, in far less time.
    assert summary["tokens"] == pytest.approx(3 * 3 * 2 * 4 * 32, rel=0.5)
    assert summary["simulated_s"] < 0.6 * 30


def test_unequal_steps_let_all_end_together(timed):
    _, history = timed("federation.unequal_steps=true", "federation.rounds=2", "local.steps=10")
    by_round = {
        number: {
            event.silo: event.tokens // (4 * 32)
            for event in history.of(LocalFinished)
            if event.round == number
        }
        for number in (1, 2)
    }
    assert by_round[1] == {"blue": 10, "green": 10, "red": 10}
    assert by_round[2] == {"blue": 10, "green": 2, "red": 10}


def test_normalised_updates_are_fednova(three_silos, make_config, tmp_path):
    """With one silo at half the steps, sum p d_i / tau_i times tau_eff, by hand."""
    from photon.federation import Receipt, Update
    from photon.federation.merging import Merging

    merging = Merging(FederationConfig())
    reference = {"weights/a": torch.zeros(2)}
    sent = {"one": (torch.tensor([4.0, 0.0]), 4, 3.0), "two": (torch.tensor([0.0, 2.0]), 2, 1.0)}
    for silo, (delta, steps, weight) in sent.items():
        update = Update(Receipt(1, silo), lambda delta=delta: iter([("weights/a", delta)]))
        merging.offer(update, reference, weight, None, 4 / steps)
    shares = {"one": 0.75, "two": 0.25}
    tau = sum(share * sent[silo][1] for silo, share in shares.items())
    expected = tau * sum(shares[silo] * sent[silo][0] / sent[silo][1] for silo in shares)
    torch.testing.assert_close(merging.result(reference).tensors["weights/a"], expected)


@pytest.mark.parametrize("pace", ["quorum", "buffered"])
def test_a_run_goes_on_to_the_same_weights(pace, timed, tmp_path):
    options = (
        "federation.rounds=5",
        f'federation.pace="{pace}"',
        "federation.quorum=1",
        'federation.late="merge"',
        'federation.optimizer_state="keep"',
        "run.keep_checkpoints=20",
    )
    whole, _ = timed(*options)
    rounds = sorted((tmp_path / "run/checkpoints").iterdir())
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", cut)
    (cut / "summary.json").unlink()
    for folder in sorted((cut / "checkpoints").iterdir())[len(rounds) // 2 :]:
        shutil.rmtree(folder)
    state = json.loads(max((cut / "checkpoints").iterdir()).joinpath("state.json").read_text())
    assert state["in_flight"]  # somebody was at work when it was written
    again = resume(cut).summary
    for name in ("weights_sha256", "simulated_s", "tokens", "rounds", "tokens_lost"):
        assert again[name] == whole[name], name


def test_a_failure_costs_what_was_begun(timed, tmp_path):
    trace = tmp_path / "failures.csv"
    trace.write_text("silo,down_s,up_s\nred,1.5,4.0\n")
    summary, history = timed(
        "federation.rounds=1",
        clock={"silos": {"*": {"step_s": 1.0}}, "failures": {"trace": str(trace)}},
    )
    assert merged(history) == [["blue", "green", "red"]]
    assert summary["simulated_s"] > 4 + 2  # begun again once it was up


def test_who_is_down_is_not_asked(timed, tmp_path):
    trace = tmp_path / "failures.csv"
    trace.write_text("silo,down_s,up_s\nred,0,1000\n")
    _, history = timed(
        clock={"silos": {"*": {"step_s": 1.0}}, "failures": {"trace": str(trace)}},
    )
    assert merged(history) == [["blue", "green"]] * 3


def test_a_window_of_grace_goes_by_how_long_quorums_took():
    config = FederationConfig(pace="quorum", deadline_s=1000.0, grace=0.5)
    book = Book(asked=3, quorum=2, began_s=100.0, now_s=100.0)
    assert left_s(config, book) == 1000.0
    book.note_good(110.0)
    book.note_good(120.0)
    assert left_s(config, book) == pytest.approx(0.5 * 20)
    book.now_s = 131.0
    assert left_s(config, book) < 0


def test_delayed_nesterov_by_hand():
    outer = build_outer_optimizer(OuterConfig(name="delayed_nesterov", lr=0.5, delay=2))
    theta = {"a": torch.zeros(1)}
    outer.step(theta, {"a": torch.ones(1)}, 1)
    assert theta["a"].item() == pytest.approx(-0.25)
    outer.step(theta, {"a": torch.ones(1)}, 2)
    # m = (1 + 1) / 2 = 1; theta -= lr (0.9 m + 1 / 2)
    assert theta["a"].item() == pytest.approx(-0.25 - 0.5 * (0.9 + 0.5))


def test_steps_by_speed():
    assert unequal_steps(10, {"a": 2.0, "b": 1.0, "c": 0.1}) == {"a": 10, "b": 5, "c": 1}


@pytest.mark.parametrize(
    "keys",
    [
        ('federation.pace="buffered"', 'federation.merge="adopt"'),
        ('federation.pace="quorum"', 'federation.late="merge"', 'federation.merge="adopt"'),
        ('federation.pace="buffered"', 'federation.optimizer_state="average"'),
        ("federation.normalise=true", 'federation.merge="adopt"'),
    ],
)
def test_what_can_not_be_merged_late_is_refused(keys, three_silos, make_config):
    from photon.errors import ConfigError

    with pytest.raises(ConfigError, match="deltas"):
        make_config(three_silos, *keys)


def test_time_alone_needs_no_data(make_config, tmp_path):
    """Sixteen silos over half a day: the shares of time are what the trace leaves."""
    silos = {f"silo-{number:02d}": {"step_s": 1.0} for number in range(16)}
    clock = ClockConfig.model_validate(
        {
            "silos": silos,
            "failures": {"mean_up_s": 3600.0, "mean_down_s": 600.0, "seed": 3},
            "until_s": 43_200.0,
            "time_only": True,
            "parameters": 1000,
        }
    )
    results = {}
    for pace in ("synchronous", "quorum", "buffered"):
        config = make_config(
            tmp_path,
            "federation.rounds=100000",
            "local.steps=300",
            f'federation.pace="{pace}"',
            "federation.quorum=8",
            'federation.late="merge"',
        )
        results[pace] = study_time(config, clock)
    for result in results.values():
        assert result["up_share"] == pytest.approx(3600 / 4200, abs=0.05)
        assert 0 < result["goodput"] < result["up_share"]
        assert result["simulated_s"] == pytest.approx(43_200, rel=0.1)
    assert results["buffered"]["goodput"] > results["synchronous"]["goodput"]
    assert results["quorum"]["goodput"] > results["synchronous"]["goodput"]
