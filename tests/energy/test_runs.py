"""Energy of real runs: two ways of counting, what is told of it, and what it is put into."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from photon.cards.filling import known_of
from photon.config.clock import ClockConfig
from photon.dashboard.report import write_report
from photon.energy.account import JOULES, KWH_J
from photon.energy.counters import Packages
from photon.errors import ConfigError
from photon.runs import resume, simulate, train
from photon.telemetry import read_history
from photon.telemetry.events import EnergySpent, Evaluated, LocalFinished

#: The defaults are slow to differ from 0 in rounding; these are exact.
WATTS = ("energy.core_busy_w=4.0", "energy.core_idle_w=1.0", "energy.network_kwh_per_gb=0.01")


def _told(result) -> list[EnergySpent]:
    return read_history(result.folder).of(EnergySpent)


@pytest.fixture(scope="module")
def alone(three_silos, make_config, tmp_path_factory):
    """A run in this process, with much merging, evaluation and compression beside training."""
    more = ("federation.rounds=2", "link.update_codec=int8", "energy.carbon_g_per_kwh=300.0")
    config = make_config(three_silos, *WATTS, *more, preset="tiny")
    return simulate(config, run_dir=tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def workers(three_silos, make_config, tmp_path_factory):
    """The same by two workers, one of which waits for the other a third of the time."""
    more = ("federation.rounds=2", "federation.workers=2")
    config = make_config(three_silos, *WATTS, *more)
    return simulate(config, run_dir=tmp_path_factory.mktemp("workers") / "run")


@pytest.mark.parametrize("name", ["alone", "workers"])
def test_phases_sum_to_what_the_kernel_has_of_the_processes(name, request):
    """An identity of accounts: no phase is missing, none is counted twice."""
    result = request.getfixturevalue(name)
    energy = result.summary["energy"]
    phases_kwh = energy["kwh"] - energy["kwh_by_phase"]["communication"]
    assert phases_kwh > 0
    assert energy["independent_kwh"] == pytest.approx(phases_kwh, rel=0.02)
    assert energy["unexplained"] == pytest.approx(1 - phases_kwh / energy["independent_kwh"])
    told_j = sum(sum(one.joules.values()) for one in _told(result))
    assert told_j / KWH_J == pytest.approx(energy["kwh"], rel=1e-6)


def _sums(told: list[EnergySpent], silo: str | None) -> Counter[str]:
    sums: Counter[str] = Counter()
    for one in told:
        if one.silo == silo:
            sums.update(one.joules)
    return sums


def test_each_phase_is_who_does_it(workers):
    red, here = (_sums(_told(workers), silo) for silo in ("red", None))
    assert red["training"] > red["evaluation"] > 0
    assert min(red[name] for name in ("privacy", "idle", "other", "communication")) > 0
    assert red["merging"] == here["training"] == here["communication"] == 0
    assert here["merging"] > 0


def test_every_figure_says_how_it_is_known(alone):
    energy, summary = alone.summary["energy"], alone.summary
    assert {one.how for one in _told(alone)} == {"estimated"}
    assert energy["how"] == "estimated, communication modelled"
    moved = summary["bytes_up"] + summary["bytes_down"]
    assert energy["kwh_by_phase"]["communication"] == pytest.approx(moved / 1e9 * 0.01)
    assert energy["kwh"] == pytest.approx(sum(energy["kwh_by_phase"].values()))
    assert energy["carbon_g"] == pytest.approx(energy["kwh"] * 300)


def test_what_energy_was_good_for(alone):
    energy, summary = alone.summary["energy"], alone.summary
    history = read_history(alone.folder)
    per_million = energy["kwh"] / (summary["tokens"] / 1e6)
    assert energy["kwh_per_million_tokens"] == pytest.approx(per_million)
    assert energy["tokens_per_s_per_w"] == pytest.approx(summary["tokens"] / energy["kwh"] / KWH_J)
    scores = [one.loss for one in history.of(Evaluated) if one.silo is None]
    assert scores[0] > scores[-1]
    assert energy["kwh_per_nat"] == pytest.approx(energy["kwh"] / (scores[0] - scores[-1]))
    done = history.of(LocalFinished)
    compute_s = sum(one.train_s for one in done)
    sent_s = sum(one.load_s + one.publish_s for one in done)
    assert energy["granularity"] == pytest.approx(compute_s / sent_s)
    assert energy["link_utilisation"] == pytest.approx(sent_s / (sent_s + compute_s))


def test_none_declared_none_claimed(workers):
    assert "carbon_g" not in workers.summary["energy"]


def test_a_resume_goes_on_with_the_account(three_silos, make_config, tmp_path):
    config = make_config(three_silos, *WATTS, "federation.rounds=1")
    first = simulate(config, run_dir=tmp_path / "run").summary["energy"]
    result = resume(tmp_path / "run", overrides=["federation.rounds=2"])
    both = result.summary["energy"]
    assert both["kwh_by_phase"]["training"] > first["kwh_by_phase"]["training"] > 0
    assert both["kwh_per_nat"] is not None  # from the loss before the first round
    phases_kwh = both["kwh"] - both["kwh_by_phase"]["communication"]
    # What came after the first process's last checkpoint stands in neither account.
    assert both["independent_kwh"] == pytest.approx(phases_kwh, rel=0.02)


def test_a_counter_makes_it_measured(three_silos, make_config, tmp_path, machine, monkeypatch):
    """A machine whose cores do nothing else, and whose counter goes by what they do."""
    from photon.energy import account, meter

    class Exact(Packages):
        """100 J a second of the clock, and all work is ours."""

        def __init__(self) -> None:
            super().__init__(machine.root, machine.stat)

        def joules(self) -> float:
            return 100 * account.time.perf_counter()

        def busy_s(self) -> float:
            return meter.time.process_time()

    machine.zone("0", "package-0", 0)
    monkeypatch.setattr(account, "Packages", Exact)
    monkeypatch.setattr(meter.METER, "_make", Exact)
    monkeypatch.setattr(account.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(account.Power, "machine_cores", 1)
    meter.METER.begin_anew()
    try:
        config = make_config(three_silos, *WATTS, "federation.rounds=1")
        energy = simulate(config, run_dir=tmp_path / "run").summary["energy"]
    finally:
        meter.METER.begin_anew()
    assert energy["how"] == "measured, communication modelled"
    phases_kwh = energy["kwh"] - energy["kwh_by_phase"]["communication"]
    assert energy["independent_kwh"] == pytest.approx(phases_kwh, rel=0.02)


def test_a_clock_that_nobody_waits_for_has_no_energy(three_silos, make_config, tmp_path):
    config = make_config(three_silos, "federation.rounds=1")
    result = simulate(config, run_dir=tmp_path / "run", clock=ClockConfig())
    assert "energy" not in result.summary
    assert {one.how for one in _told(result)} == {None}
    assert "energy" not in known_of(result.folder).models["round-1"]


def test_one_node_alone_exchanges_nothing(three_silos, make_config, tmp_path):
    config = make_config(three_silos, *WATTS, "federation.rounds=1")
    energy = train(config, run_dir=tmp_path / "run").summary["energy"]
    assert energy["how"] == "estimated"
    assert energy["kwh_by_phase"]["communication"] == 0
    assert energy["granularity"] is energy["link_utilisation"] is None


def test_two_ranks_tell_of_both(three_silos, make_config, tmp_path):
    more = ("federation.rounds=1", "compute.processes=2", "eval.every=0")
    config = make_config(three_silos, *WATTS, *more)
    energy = simulate(config, run_dir=tmp_path / "run").summary["energy"]
    phases_kwh = energy["kwh"] - energy["kwh_by_phase"]["communication"]
    assert energy["independent_kwh"] == pytest.approx(phases_kwh, rel=0.02)


def test_cards_take_it_under_one_key(alone):
    energy = alone.summary["energy"]
    for facts in (known_of(alone.folder).models["round-2"], known_of(alone.folder).project):
        assert facts["energy_kwh"] == energy["kwh"]
        assert facts["energy_method"] == "estimated, communication modelled"
    # Before its end, from the newest checkpoint.
    events = alone.folder / "events.jsonl"
    lines = events.read_text().splitlines()
    try:
        events.write_text("\n".join(lines[:-1]) + "\n")
        kwh = known_of(alone.folder).models["round-2"]["energy_kwh"]
    finally:
        events.write_text("\n".join(lines) + "\n")
    assert kwh == pytest.approx(energy["kwh"], rel=0.2)


def test_the_report_has_the_picture(alone):
    page = write_report(alone.folder).read_text()
    for title in ("Energy by round", "Energy by silo", "compression and privacy"):
        assert title in page
    assert "estimated; communication always modelled" in page
    assert page.count('class="figure"') >= 2


def test_bounds(three_silos, make_config):
    with pytest.raises(ConfigError, match="core_busy_w"):
        make_config(three_silos, "energy.core_busy_w=-1.0")


def test_events_of_a_silo_without_figures_are_read(tmp_path):
    line = {"event": "energy_spent", "round": 1, "silo": "old", "how": None, "joules": {}}
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + "\n")
    (event,) = read_history(tmp_path).of(EnergySpent)
    assert (event.how, event.joules, len(JOULES)) == (None, {}, 6)
