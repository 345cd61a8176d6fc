"""Runs whose text pays: what is spent, stated and withheld; kills; budgets."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import served_in_process
from forked_process import ForkedProcess
from served_in_process import Served

from photon.config import write_resolved
from photon.config.node import NodeDataConfig
from photon.data import open_data, open_stream
from photon.errors import QuorumLostError, ResumeMismatchError
from photon.federation.private import Purse, misstated, noised, spending_of
from photon.federation.tasks import Epsilon, FitTask
from photon.privacy import SECRET_FILE
from photon.privacy.epsilon import epsilon
from photon.privacy.ledger import Entry
from photon.runs import resume, simulate
from photon.silo.policy import own_part
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished, LocalProgress, RoundMerged, UpdateDropped

SHORT = ("eval.every=0", "eval.max_tokens=300", "eval.per_silo=false", "local.steps=2")
RECORD = (*SHORT, "privacy.mechanism=dp_sgd", "privacy.clip_norm=1.0")
WHOLE = (*SHORT, "privacy.mechanism=client", "privacy.clip_norm=0.5", "privacy.delta=1e-6")
DYING = Path(__file__).parent / "programs" / "dying.py"


def entries_of(folder):
    """By ledger, of all that there are in a folder."""
    found = {}
    for path in sorted(folder.glob("ledger-*.json")):
        record = json.loads(path.read_text()).get("entries", [])
        found[path.name] = [Entry.model_validate_json(json.dumps(one)) for one in record]
    return found


@pytest.fixture
def run(three_silos, make_config, tmp_path):
    def run(name, *overrides):
        return simulate(make_config(three_silos, *overrides), run_dir=tmp_path / name)

    return run


def test_steps_with_a_target_cost_it_and_say_so(run, three_silos, make_config, tmp_path):
    target = (*RECORD, "privacy.target_epsilon=3.0", "privacy.delta=1e-5")
    summary = run("run", *target).summary
    said = summary["epsilon"]
    assert (said["delta"], said["unit"]) == (1e-5, "sequence")
    assert said["value"] == pytest.approx(3.0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epsilon"] == said
    ledgers = entries_of(tmp_path / "run" / "nodes")
    assert {len(entries) for entries in ledgers.values()} == {3}
    assert all(one.answer for entries in ledgers.values() for one in entries)
    config, data = make_config(three_silos, *target), open_data(three_silos)
    sizes = set()
    for silo in data.silos:
        with open_stream(config, data, [silo]) as stream:
            z = noised(config, silo, stream).noise_multiplier
            sizes.add(stream.sequences)
        assert epsilon(1 / z**2, 1e-5) == pytest.approx(3.0)  # 24 sequences are in one epoch
    assert min(sizes) > 24
    history = read_history(tmp_path / "run")
    told = history.of(LocalFinished)
    assert len(told) == 9
    assert {(one.loss, one.first_loss, one.last_loss) for one in told} == {(None, None, None)}
    assert [one.epsilon for one in told] == pytest.approx([3.0] * 9)
    progress = history.of(LocalProgress)
    assert {(one.loss, one.gradient_norm) for one in progress} == {(None, None)}
    assert {one.train_loss for one in history.of(RoundMerged)} == {None}


def test_answers_of_silos_add_up(run, tmp_path):
    said = run("run", *WHOLE, "privacy.target_epsilon=2.0").summary["epsilon"]
    assert said == {"value": pytest.approx(2.0), "delta": 1e-6, "unit": "client"}
    z = 30.0
    said = run("z", *WHOLE, f"privacy.noise_multiplier={z}").summary["epsilon"]
    assert said["value"] == pytest.approx(epsilon(3 / z**2, 1e-6))
    assert "epsilon" not in run("clipped", *WHOLE, "privacy.noise_multiplier=0").summary
    assert not list((tmp_path / "clipped" / "nodes").glob("ledger*"))


def test_more_epochs_cost_more(run, three_silos, make_config, tmp_path):
    long = ("local.batch_size=32", "privacy.noise_multiplier=2.0")
    run("run", *RECORD, *long)
    told = {one.silo: one.epsilon for one in read_history(tmp_path / "run").of(LocalFinished)}
    for silo, found in told.items():
        with open_stream(make_config(three_silos), open_data(three_silos), [silo]) as stream:
            epochs = -(-3 * 2 * 32 // stream.sequences)
        # A sequence in both epochs of one step counts for four, of which two are there already.
        assert epsilon(epochs / 4, 1e-5) <= found <= epsilon(2 * epochs / 4, 1e-5)
    assert min(told.values()) < max(told.values())


def test_a_run_stops_before_its_target_is_passed(run, tmp_path, monkeypatch):
    """A node whose noise is less than the target takes: half of its rounds, and no more."""
    from photon.privacy import epsilon as accounting

    exact = accounting.multiplier
    monkeypatch.setattr(
        accounting, "multiplier", lambda target, delta, times: exact(target, delta, times / 2)
    )
    overrides = (*WHOLE, "privacy.target_epsilon=2.0", "federation.rounds=4")
    with pytest.raises(QuorumLostError, match=r"round 3 has 0 good updates.*epsilon spent"):
        run("run", *overrides)
    reasons = [one.reason for one in read_history(tmp_path / "run").of(UpdateDropped)]
    assert len(reasons) == 3
    assert all("would have cost more than 2 at delta" in one for one in reasons)
    assert {len(one) for one in entries_of(tmp_path / "run" / "nodes").values()} == {2}


def test_a_lost_ledger_and_other_noise_stop_a_resume(run, tmp_path):
    run("run", *RECORD, "privacy.noise_multiplier=2.0")
    folder = tmp_path / "run"
    resolved = folder / "config.resolved.toml"
    text = resolved.read_text()
    resolved.write_text(text.replace("noise_multiplier = 2.0", "noise_multiplier = 1.0"))
    with pytest.raises(ResumeMismatchError, match="not what this run began with"):
        resume(folder, overrides=["federation.rounds=4"])
    resolved.write_text(text.replace("rounds = 3", "rounds = 4"))
    (folder / "nodes" / "ledgers.json").unlink()
    with pytest.raises(QuorumLostError, match=r"noise\.key is there"):
        resume(folder)


@pytest.mark.parametrize("noise", [RECORD, WHOLE], ids=["dp_sgd", "client"])
@pytest.mark.parametrize("method", ["begin", "answered"], ids=["in training", "before it leaves"])
def test_a_kill_between_noise_and_send_spends_once(
    noise, method, forks, three_silos, make_config, tmp_path
):
    """kill -9 in the second round, at the second silo: its answer is written down, and not sent."""
    file, folder, z = tmp_path / "run.toml", tmp_path / "run", 8.0
    config = make_config(three_silos, *noise, f"privacy.noise_multiplier={z}", "local.steps=1")
    write_resolved(config, file)
    given = {"file": str(file), "folder": str(folder), "method": method, "calls": 5}
    given |= {"out": str(tmp_path / "out"), "error": str(tmp_path / "error")}
    assert ForkedProcess(forks, DYING, given).wait() == -signal.SIGKILL
    before = {one.answer for entries in entries_of(folder / "nodes").values() for one in entries}
    summary = resume(folder).summary
    ledgers = entries_of(folder / "nodes")
    assert [len(entries) for entries in ledgers.values()] == [3] * 3
    # What was written down before the kill is what was sent after it.
    assert before - {None} <= {one.answer for entries in ledgers.values() for one in entries}
    answers, delta = (1 if noise is RECORD else 3), config.privacy.at_delta
    assert summary["epsilon"]["value"] == pytest.approx(epsilon(answers / z**2, delta))


def test_groups_pay_for_what_they_send_up(five_silos, make_config, tmp_path):
    noise = "noise_multiplier=40.0"
    own = f'{{mechanism="client", clip_norm=0.5, {noise}}}'
    west = f'federation.children.west={{silos=["a", "b"], rounds=2, update_privacy={own}}}'
    overrides = (*WHOLE, west, f"privacy.{noise}", "local.steps=4", "privacy.delta=1e-5")
    summary = simulate(make_config(five_silos, *overrides), run_dir=tmp_path / "run").summary
    told = {one.silo: one.epsilon for one in read_history(tmp_path / "run").of(LocalFinished)}
    assert told["west"] == told["c"] == pytest.approx(epsilon(3 / 40**2, 1e-5))
    assert told["a"] == pytest.approx(epsilon(6 / 40**2, 1e-5))  # in the rounds of its group
    assert summary["epsilon"]["value"] == told["west"]
    # Without noise of the group's own, what its members say is what it says.
    open_west = 'federation.children.west={silos=["a", "b"], rounds=2}'
    overrides = (*WHOLE, open_west, f"privacy.{noise}", "local.steps=4", "privacy.delta=1e-5")
    summary = simulate(make_config(five_silos, *overrides), run_dir=tmp_path / "open").summary
    assert summary["epsilon"]["value"] == pytest.approx(told["a"])


def test_one_silo_without_a_promise_leaves_none_to_the_run(five_silos, make_config, tmp_path):
    free = 'federation.children.west={silos=["a"], privacy={mechanism="none"}}'
    config = make_config(five_silos, *WHOLE, free, "privacy.noise_multiplier=9.0")
    assert "epsilon" not in simulate(config, run_dir=tmp_path / "run").summary


# --- sites ------------------------------------------------------------------------------------


def test_a_site_s_account_outlives_its_runs(three_silos, make_config, tmp_path, monkeypatch):
    """Two answers are within max_epsilon: one of a run, and one of the next."""
    z = 30.0
    noise = (*WHOLE, f"privacy.noise_multiplier={z}", "local.steps=1", "federation.rounds=2")
    most = epsilon(2 / z**2, 1e-6) * 1.001

    def served(name, *overrides):
        config = make_config(three_silos, *noise, "serve.min_silos=3", *overrides)
        (tmp_path / name).mkdir()
        run = Served(config, tmp_path / name)
        for silo in run.silos.values():
            silo.start(f"policy.max_epsilon={most}")
        return run

    first = served("first", "federation.rounds=1")
    assert first.go_on().summary["epsilon"]["value"] == pytest.approx(epsilon(1 / z**2, 1e-6))
    assert first.audit().updates == 3
    monkeypatch.setattr(served_in_process, "RUN_ID", "1" * 32)
    second = served("second")
    for name, silo in second.silos.items():
        (first.silos[name].home / "privacy").rename(silo.home / "privacy")
    with pytest.raises(QuorumLostError, match=r"round 2 .*policy\.max_epsilon, over all runs"):
        second.go_on()
    assert second.audit().updates == 3
    held = second.silos["red"].home / "privacy"
    (ledger,) = entries_of(held).values()
    assert [one.run for one in ledger] == [first.serving.run_id, second.serving.run_id]
    # The site has one secret, whatever run it draws noise for.
    assert (held / SECRET_FILE).exists()
    assert not list(second.silos["red"].home.glob(f"nodes/**/{SECRET_FILE}"))


def test_a_text_pays_under_any_name(three_silos, make_config, tmp_path):
    config, data = (
        make_config(three_silos, *RECORD, "privacy.noise_multiplier=2"),
        open_data(three_silos),
    )

    def spending(name, part):
        task = FitTask("run", 1, name, 0, 1, None)
        return spending_of(config, Purse(tmp_path, "run"), part, task)

    renamed = own_part(data, NodeDataConfig(path=str(three_silos), silo="red"), "crimson")
    red, crimson = spending("red", data), spending("crimson", renamed)
    assert (red.text, red.stream, red.spans) == (crimson.text, crimson.stream, crimson.spans)
    assert red.text != spending("blue", data).text


def test_what_a_silo_states_is_held_against_the_run_file(make_config, three_silos):
    config = make_config(three_silos, *WHOLE, "privacy.target_epsilon=2.0")
    task = FitTask("run", 1, "red", 0, 1, None)
    good = Epsilon(value=1.5, delta=1e-6, unit="client")
    assert misstated(config, task, good) is None
    assert "no epsilon" in misstated(config, task, None)
    for wrong in ({"value": 2.1}, {"delta": 1e-5}, {"unit": "sequence"}):
        assert "says an epsilon of" in misstated(config, task, replace(good, **wrong))
    plain = make_config(three_silos)
    assert misstated(plain, task, None) is None
    assert "an epsilon, and the run promises otherwise" in misstated(plain, task, good)
