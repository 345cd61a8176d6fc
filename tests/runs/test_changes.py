"""A run extended, or given another value, on purpose: recorded, and from there as said."""

from __future__ import annotations

import json
import shutil

import pytest

from photon.config import load_run_config
from photon.errors import NonFiniteError, QuorumLostError, ResumeMismatchError
from photon.runs import load_weights, resume, simulate, train
from photon.runs.changes import (
    CHANGEABLE_KEYS,
    RESUMABLE_KEYS,
    config_to_go_on_with,
    go_on_with,
)
from photon.telemetry import read_history
from photon.telemetry.events import LocalProgress, Notice, RoundFinished, RunChanged
from photon.training import Schedule


@pytest.fixture(scope="module")
def short(three_silos, make_config, tmp_path_factory):
    """A finished run of one round of two steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    config = make_config(
        three_silos, "federation.rounds=1", "local.steps=2", "run.log_every=1", "eval.every=0"
    )
    return folder, simulate(config, run_dir=folder).summary


def test_a_finished_run_goes_on_as_one_planned_so(short, three_silos, make_config):
    folder, summary = short
    before = load_run_config(folder / "config.resolved.toml")
    # The same over and over again, until somebody asks for more.
    assert resume(folder).summary["weights_sha256"] == summary["weights_sha256"]
    again = resume(folder, overrides=["federation.rounds=2", "local.lr=1e-3"]).summary
    assert (again["rounds"], summary["rounds"]) == (2, 1)
    assert again["weights_sha256"] != summary["weights_sha256"]
    history = read_history(folder)
    (changed,) = history.of(RunChanged)
    assert changed.round == 1
    assert changed.changes == {"federation.rounds": (1, 2), "local.lr": (3e-3, 1e-3)}
    (notice,) = history.of(Notice)
    assert "after round 1: federation.rounds = 2 (was 1), local.lr = 0.001 (was 0.003)" in (
        notice.text
    )
    assert load_run_config(folder / "config.until-round-000001.toml") == before
    now = load_run_config(folder / "config.resolved.toml")
    assert (now.federation.rounds, now.local.lr) == (2, 1e-3)
    # The clock goes on; the schedule is that of a run of two rounds.
    rates = [event.lr for event in history.of(LocalProgress) if event.round == 2]
    expected = [1e-3 * Schedule.of(now).factor(step) for step in (2, 3)]
    assert rates == pytest.approx(expected * 3)
    assert len(history.of(RoundFinished)) == 2
    # What changed is not changed again.
    assert resume(folder).summary == again
    assert len(read_history(folder).of(RunChanged)) == 1
    with pytest.raises(ResumeMismatchError, match="2 rounds are done already"):
        resume(folder, overrides=["federation.rounds=1"])


def test_what_held_is_kept_however_often_it_is_changed_before_a_round(short, tmp_path):
    resolved = (short[0] / "config.resolved.toml").read_bytes()
    (tmp_path / "config.resolved.toml").write_bytes(resolved)
    for rate in (1e-4, 2e-4):
        config = config_to_go_on_with(tmp_path, [f"local.lr={rate}"])
        go_on_with(tmp_path, config, 3, changed=True)
    assert (tmp_path / "config.until-round-000003.toml").read_bytes() == resolved
    assert config_to_go_on_with(tmp_path).local.lr == 2e-4


@pytest.mark.parametrize(
    "key",
    [
        "model.preset=75m",
        "data.sequence_length=64",
        "run.seed=3",
        "local.steps=3",
        "local.optimizer=muon",
        "federation.optimizer_state=keep",
        "outer.name=nesterov",
        "link.update_codec=int8",
        "privacy.noise_multiplier=1",
        "privacy.target_epsilon=1",
    ],
)
def test_what_the_state_was_made_by_is_refused_by_name(key, short):
    name = key.partition("=")[0]
    with pytest.raises(ResumeMismatchError, match=rf"^{name} can't change") as caught:
        resume(short[0], overrides=[key])
    assert "federation.rounds, " in caught.value.hint
    assert "local.lr, " in caught.value.hint


def test_rounds_that_noise_was_sized_for_stay(three_silos, make_config, tmp_path):
    noise = ("privacy.mechanism=client", "privacy.clip_norm=1", "privacy.delta=1e-5")
    target = make_config(three_silos, *noise, "privacy.target_epsilon=2")
    go_on_with(tmp_path, target, 0, changed=False)
    rounds = target.federation.rounds
    assert config_to_go_on_with(tmp_path, [f"federation.rounds={rounds}", "local.lr=1e-4"])
    with pytest.raises(
        ResumeMismatchError, match=f"sized for privacy.target_epsilon over {rounds}"
    ):
        config_to_go_on_with(tmp_path, ["federation.rounds=40"])
    go_on_with(
        tmp_path, make_config(three_silos, *noise, "privacy.noise_multiplier=1"), 0, changed=False
    )
    assert config_to_go_on_with(tmp_path, ["federation.rounds=40"]).federation.rounds == 40


def test_every_key_named_is_one(three_silos, make_config):
    tree = make_config(three_silos).model_dump()
    for name in RESUMABLE_KEYS + CHANGEABLE_KEYS:
        table, _, key = name.partition(".")
        assert key in tree[table]


def test_a_served_run_takes_its_new_values_at_the_next_start(short):
    folder, _ = short
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "kind": "serve"}))
    try:
        with pytest.raises(ResumeMismatchError, match="goes on with the new values") as caught:
            resume(folder, overrides=["local.lr=5e-4"])
        assert "photon serve --resume" in caught.value.hint
        assert config_to_go_on_with(folder).local.lr == 5e-4
        assert load_run_config(folder / "config.resolved.toml").local.lr != 5e-4
    finally:
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "config.next.toml").unlink()


@pytest.mark.parametrize(("start", "error"), [(simulate, QuorumLostError), (train, NonFiniteError)])
def test_a_diverged_run_is_told_the_way_out_and_takes_it(
    start, error, three_silos, make_config, tmp_path
):
    config = make_config(
        three_silos,
        "federation.rounds=1",
        "local.optimizer=sgd",
        "local.clip_norm=0",
        "local.lr=1e30",
        "eval.every=0",
    )
    with pytest.raises(error) as caught:
        start(config, run_dir=tmp_path / "run")
    assert "photon resume DIR --set local.lr=" in caught.value.hint
    with pytest.raises(error):
        resume(tmp_path / "run")  # the same bits diverge again
    assert resume(tmp_path / "run", overrides=["local.lr=0.1"]).summary["rounds"] == 1


def test_a_run_of_another_format_is_refused_before_its_run_file_is_read(short, tmp_path):
    shutil.copytree(short[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "format": 2}))
    (tmp_path / "run" / "config.resolved.toml").write_text("[serve]\nround_deadline_s = 1\n")
    for use in (resume, load_weights):
        with pytest.raises(ResumeMismatchError, match=r"format 2, begun by Photon .* reads format"):
            use(tmp_path / "run")
