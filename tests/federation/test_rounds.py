"""The round: sampling, refusal, quorum, memory of what a silo has read, checkpoints."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch

from photon.data import open_data
from photon.engines.local import LocalEngine
from photon.errors import (
    DiskFullError,
    IncompatibleConfigError,
    QuorumLostError,
    ResumeMismatchError,
    RunExistsError,
)
from photon.federation import FitTask, sample_participants
from photon.federation.merging import Merging
from photon.runs import resume, simulate
from photon.telemetry import read_history
from photon.telemetry.events import (
    Evaluated,
    LocalFinished,
    Notice,
    RoundFinished,
    RoundMerged,
    RoundStarted,
    RunStopped,
    UpdateDropped,
)


def poison(monkeypatch, silo: str, rounds: set[int]):
    """Put a NaN into the model of one silo before its local steps; returns the fired tasks."""
    fired = []
    build = LocalEngine.__init__

    def hook(task, trainer):
        if task.silo == silo and task.round in rounds:
            fired.append((task.round, task.silo))
            with torch.no_grad():
                next(iter(trainer.optimizer.parameters.values())).view(-1)[0] = math.nan

    def with_fault(self, node):
        node._fault = hook
        build(self, node)

    monkeypatch.setattr(LocalEngine, "__init__", with_fault)
    return fired


def test_a_run_writes_what_it_promises(three_silos, make_config, tmp_path):
    config = make_config(three_silos, preset="tiny")  # parcels that dwarf their manifests
    result = simulate(config, run_dir=tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert set(summary) == {
        "rounds",
        "tokens",
        "global_loss",
        "global_perplexity",
        "bits_per_byte",
        "per_silo",
        "bytes_up",
        "bytes_down",
        "all_reduce_bytes",
        "bf16_exchange_bytes",
        "wall_s",
        "local_train_s",
        "utilisation",
        "train_share",
        "goodput",
        "simulated_s",
        "energy",
        "tokens_lost",
        "weights_sha256",
        "photon_version",
    }
    local, silos = config.local, 3
    assert summary["tokens"] == (
        config.federation.rounds * silos * local.steps * local.batch_size * 32
    )
    assert set(summary["per_silo"]) == set(config_silos(three_silos))
    assert 0 < summary["utilisation"] <= 1
    parameters = read_history(tmp_path / "run").started.parameters
    tasks = config.federation.rounds * silos
    assert summary["all_reduce_bytes"] == 8 * parameters * local.steps * tasks
    assert summary["bf16_exchange_bytes"] == 4 * parameters * tasks
    payload_bytes = config.federation.rounds * silos * parameters * 4
    assert payload_bytes < summary["bytes_up"] < payload_bytes * 1.01  # and manifests
    for line in (tmp_path / "run/events.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert "event" in record
        assert record["time_s"] >= 0
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["round-000002", "round-000003"]
    assert not list((tmp_path / "run").rglob("*.partial"))


def config_silos(data):
    return open_data(data).silos


def test_loss_falls(three_silos, make_config, tmp_path):
    config = make_config(three_silos, "federation.rounds=4", "local.steps=8")
    simulate(config, run_dir=tmp_path / "run")
    losses = [
        event.loss for event in read_history(tmp_path / "run").of(Evaluated) if event.silo is None
    ]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    three_silos, make_config, tmp_path
):
    hashes = [
        simulate(
            make_config(three_silos, f"run.seed={seed}"), run_dir=tmp_path / str(index)
        ).summary["weights_sha256"]
        for index, seed in enumerate([5, 5, 6])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_participants_are_drawn_by_seed_and_round():
    tokens = {f"silo-{index:02d}": 10**index for index in range(8)}
    draws = [
        sample_participants(tokens, count=3, sampling="uniform", seed=1, round_number=number)
        for number in range(1, 200)
    ]
    assert all(len(set(draw)) == 3 and draw == sorted(draw) for draw in draws)
    assert draws == [
        sample_participants(tokens, count=3, sampling="uniform", seed=1, round_number=number)
        for number in range(1, 200)
    ]
    assert len({tuple(draw) for draw in draws}) > 20
    weighted = [
        sample_participants(tokens, count=1, sampling="weighted", seed=1, round_number=number)[0]
        for number in range(1, 200)
    ]
    assert weighted.count("silo-07") > 150
    with pytest.raises(IncompatibleConfigError, match=r"federation.sample = 9 .* 8 silos"):
        sample_participants(tokens, count=9, sampling="uniform", seed=1, round_number=1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_weighted_draw_gives_each_silo_its_share_of_the_text(count):
    tokens = {"big": 70, "mid": 17, "low": 10, "few": 3}
    rounds, drawn = 2000, Counter()
    for number in range(rounds):
        draw = sample_participants(
            tokens, count=count, sampling="weighted", seed=5, round_number=number
        )
        assert len(draw) == count
        assert draw == sorted(draw)
        for silo, times in Counter(draw).items():
            assert abs(times - count * tokens[silo] / 100) < 1
        drawn.update(draw)
    for silo, share in tokens.items():
        spread = (share / 100 / rounds / count) ** 0.5
        assert drawn[silo] / rounds / count == pytest.approx(share / 100, abs=4 * spread)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["federation.weighting=data"], lambda config, tokens, drawn: tokens),
        (["federation.weighting=equal"], lambda config, tokens, drawn: 1),
        ([], lambda config, tokens, drawn: 4 * 4 * 32),
        (
            ["federation.sampling=weighted", "federation.sample=3", "run.seed=3"],
            lambda config, tokens, drawn: 4 * 4 * 32 * drawn,
        ),
    ],
)
def test_weights_are_what_their_name_says(
    overrides, expected, three_silos, make_config, tmp_path, monkeypatch
):
    weights, offer = [], Merging.offer

    def noted(self, update, reference, weight, *rest):
        weights.append((update.receipt.silo, weight))
        return offer(self, update, reference, weight, *rest)

    monkeypatch.setattr(Merging, "offer", noted)
    config = make_config(three_silos, "federation.rounds=2", "eval.every=0", *overrides)
    simulate(config, run_dir=tmp_path / "run")
    tokens = {name: silo.train_tokens for name, silo in open_data(three_silos).silos.items()}
    wanted = []
    for number in (1, 2):
        draw = sample_participants(
            tokens,
            count=config.federation.sample,
            sampling=config.federation.sampling,
            seed=config.run.seed,
            round_number=number,
        )
        wanted += [
            (silo, float(expected(config, tokens[silo], times)))
            for silo, times in sorted(Counter(draw).items())
        ]
    assert weights == wanted
    if config.federation.sampling == "weighted":
        assert len(weights) < 6  # somebody was drawn twice, and trained once


def test_a_sampled_silo_reads_on_where_it_stopped(three_silos, make_config, tmp_path):
    """Cursors of virtual clients advance only by rounds they took part in."""
    config = make_config(three_silos, "federation.sample=1", "federation.rounds=5")
    simulate(config, run_dir=tmp_path / "run")
    taken = [event.participants[0] for event in read_history(tmp_path / "run").of(RoundStarted)]
    assert len(set(taken)) > 1
    state = json.loads((tmp_path / "run/checkpoints/round-000005/state.json").read_text())
    per_task = config.local.steps * config.local.batch_size
    for silo in set(taken):
        node_round = state["node_rounds"][silo]
        assert node_round == max(n + 1 for n, name in enumerate(taken) if name == silo)
        assert state["cursors"][silo] == taken.count(silo) * per_task


def test_a_diverged_silo_is_dropped_by_name_and_the_round_goes_on(
    three_silos, make_config, tmp_path, monkeypatch
):
    silo = sorted(config_silos(three_silos))[1]
    fired = poison(monkeypatch, silo, {2})
    summary = simulate(make_config(three_silos), run_dir=tmp_path / "run").summary
    assert fired == [(2, silo)]
    history = read_history(tmp_path / "run")
    (dropped,) = history.of(UpdateDropped)
    assert (dropped.round, dropped.silo) == (2, silo)
    assert "nan" in dropped.reason
    merged = {event.round: event.participants for event in history.of(RoundMerged)}
    assert len(merged[2]) == 2
    assert silo not in merged[2]
    assert len(merged[3]) == 3
    assert math.isfinite(summary["global_loss"])
    assert history.of(RoundFinished)[1].dropped == [silo]


def test_a_dropped_silo_reads_on_and_keeps_the_optimizer_of_its_last_good_round(
    three_silos, make_config, tmp_path, monkeypatch
):
    """A batch that no training survives can't come again and again."""
    silo = sorted(config_silos(three_silos))[0]
    tasks = []
    submit = LocalEngine.submit

    def noted(self, task, version):
        if isinstance(task, FitTask) and task.silo == silo:
            tasks.append(task)
        submit(self, task, version)

    monkeypatch.setattr(LocalEngine, "submit", noted)
    fired = poison(monkeypatch, silo, {2})
    config = make_config(
        three_silos, "federation.rounds=4", 'federation.optimizer_state="keep"', "eval.every=0"
    )
    simulate(config, run_dir=tmp_path / "run")
    assert fired == [(2, silo)]
    per_task = config.local.steps * config.local.batch_size
    assert [task.cursor for task in tasks] == [0, per_task, 2 * per_task, 3 * per_task]
    assert [task.node_round for task in tasks] == [None, 1, 1, 3]


LOSSES = {
    "all of it": lambda nodes: shutil.rmtree(nodes / "red"),
    "one file": lambda nodes: next(nodes.glob("red/round-000002/*.distcp")).unlink(),
    "the feedback": lambda nodes: (nodes / "red/feedback-000002.safetensors").write_bytes(b"torn"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_silo_that_lost_what_it_kept_comes_back(
    loss, three_silos, make_config, tmp_path, monkeypatch
):
    config = make_config(
        three_silos,
        'federation.optimizer_state="keep"',
        'link.update_codec="int8"',
        "link.error_feedback=true",
        "federation.quorum=3",
        "eval.every=0",
    )
    with monkeypatch.context() as patch:
        poison(patch, "green", {3})
        with pytest.raises(QuorumLostError):
            simulate(config, run_dir=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    hashes = []
    for folder in (tmp_path / "run", tmp_path / "again"):
        LOSSES[loss](folder / "nodes")
        hashes.append(resume(folder).summary["weights_sha256"])
        history = read_history(folder)
        (notice,) = history.of(Notice)
        assert (notice.round, notice.silo) == (3, "red")
        assert "red has lost what it kept after round 2" in notice.text
        assert len(history.of(RoundMerged)[-1].participants) == 3
        state = json.loads((folder / "checkpoints/round-000003/state.json").read_text())
        per_task = config.local.steps * config.local.batch_size
        assert set(state["cursors"].values()) == {3 * per_task}
    assert hashes[0] == hashes[1]  # the same loss, the same bits


def test_quorum_lost_stops_resumably(three_silos, make_config, tmp_path, monkeypatch):
    undisturbed = simulate(make_config(three_silos), run_dir=tmp_path / "calm").summary
    silo = sorted(config_silos(three_silos))[2]
    with monkeypatch.context() as patch:
        fired = poison(patch, silo, {2})
        config = make_config(three_silos, "federation.quorum=3")
        with pytest.raises(QuorumLostError, match=rf"round 2 has 2 good updates of 3.*{silo}"):
            simulate(config, run_dir=tmp_path / "run")
        assert fired == [(2, silo)]
    stopped = read_history(tmp_path / "run").of(RunStopped)[-1]
    assert stopped.round == 1
    assert not (tmp_path / "run/summary.json").exists()
    assert not (tmp_path / "run/nodes").exists()  # what keeps nothing can lose nothing
    summary = resume(tmp_path / "run").summary
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]
    assert summary["tokens"] == undisturbed["tokens"]


def test_a_resume_names_other_versions_and_refuses_what_it_can_not_read(
    three_silos, make_config, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, "red", {2})
        config = make_config(three_silos, "federation.quorum=3", "federation.rounds=2")
        with pytest.raises(QuorumLostError):
            simulate(config, run_dir=folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "format": 1, "photon_version": "0.1"}))
    with pytest.raises(ResumeMismatchError, match=r"format 1, begun by Photon 0\.1;"):
        resume(folder)
    (folder / "run.json").write_text(json.dumps({**record, "torch_version": "1.0"}))
    resume(folder)
    (notice,) = read_history(folder).of(Notice)
    assert "PyTorch 1.0, and goes on with" in notice.text
    assert json.loads((folder / "run.json").read_text()) == record


def test_impossible_quorum_and_sample_are_refused_before_training(
    three_silos, make_config, tmp_path
):
    for key in ("federation.quorum=4", "federation.sample=4"):
        with pytest.raises(IncompatibleConfigError, match=r"4"):
            simulate(make_config(three_silos, key), run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_folder_is_not_overwritten_by_accident(three_silos, make_config, tmp_path):
    config = make_config(three_silos, "federation.rounds=1")
    simulate(config, run_dir=tmp_path / "run")
    with pytest.raises(RunExistsError, match="already holds a run"):
        simulate(config, run_dir=tmp_path / "run")
    again = simulate(config, run_dir=tmp_path / "run", overwrite=True)
    assert again.summary["rounds"] == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match="not empty"):
        simulate(config, run_dir=tmp_path / "full", overwrite=True)
    assert (tmp_path / "full/notes.txt").read_text() == "mine"


def test_a_disk_too_small_is_known_before_training(three_silos, make_config, tmp_path):
    config = make_config(three_silos, "run.keep_checkpoints=100000000")
    with pytest.raises(DiskFullError, match=r"this run needs .* GB at .*, .* GB are free"):
        simulate(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_token_weights_merge_by_tokens(three_silos, make_config, tmp_path):
    config = make_config(three_silos, "federation.rounds=1")
    simulate(config, run_dir=tmp_path / "run")
    finished = read_history(tmp_path / "run").of(LocalFinished)
    merged = read_history(tmp_path / "run").of(RoundMerged)[0]
    tokens = sum(event.tokens for event in finished)
    expected = sum(event.loss * event.tokens for event in finished) / tokens
    assert merged.train_loss == pytest.approx(expected)
    assert merged.tokens == tokens
    assert all(event.update_norm > 0 for event in finished)
