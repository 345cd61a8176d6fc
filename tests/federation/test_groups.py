"""Groups: federations that are participants."""

import shutil

import pytest
import torch
from faulty_nodes import fail, faulty, poison, tasks_of
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import parse_run_config, write_resolved
from photon.config.clock import ClockConfig
from photon.data import open_data
from photon.errors import IncompatibleConfigError, UnknownKeyError
from photon.federation import CheckpointStore
from photon.runs import load_weights, resume, simulate, train
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated, LocalFinished, UpdateDropped

SHORT = ("eval.every=0", "eval.max_tokens=300", "eval.per_silo=false")
#: Three levels, each with a clock, an outer optimizer and a codec of its own.
DEEP = (
    *SHORT,
    "link.update_codec=int8",
    "federation.rounds=2",
    "local.steps=4",
    'federation.children.west={silos=["a"], rounds=2, outer={name="nesterov"}, '
    'update_codec="int8"}',
    'federation.children.west.children.coast={silos=["b", "c"], rounds=2, '
    'outer={name="fedavgm"}, update_codec="int8"}',
    "federation.children.west.children.coast.children.d={nodes=2}",
)
KEYS = ("weights_sha256", "tokens", "bytes_up", "bytes_down", "bytes_inside")


@pytest.fixture(scope="module")
def four_silos(prepare_text, tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("four"), dict.fromkeys("abcd", 6))


@pytest.fixture(scope="module")
def undisturbed(four_silos, make_config, small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "run"
    return simulate(make_config(four_silos, *DEEP, model=small_model), run_dir=folder)


def states_kept(folder):
    """What is in the folder of kept states, by silo or group and number."""
    paths = [*folder.glob("nodes/*/round-*"), *folder.glob("nodes/*/feedback-*")]
    return sorted((path.parent.name, path.name.partition(".")[0]) for path in paths)


@pytest.mark.parametrize(("weighting", "state"), [("tokens", "keep"), ("equal", "average")])
def test_two_groups_of_two_are_four_silos(
    weighting, state, four_silos, make_config, small_model, tmp_path
):
    recipe = (
        *SHORT,
        "federation.rounds=2",
        f"federation.weighting={weighting}",
        f"federation.optimizer_state={state}",
    )
    groups = [
        f'federation.children.{name}={{silos={silos}, weighting="{weighting}"}}'
        for name, silos in {"east": ["a", "b"], "west": ["c", "d"]}.items()
    ]
    flat = make_config(four_silos, *recipe, model=small_model)
    nested = make_config(four_silos, *recipe, *groups, model=small_model)
    results = [
        simulate(config, run_dir=tmp_path / name)
        for name, config in (("flat", flat), ("nested", nested))
    ]
    weights = [load_weights(result)[0].state_dict() for result in results]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)
    (one, two) = (result.summary for result in results)
    assert one["tokens"] == two["tokens"]
    assert two["bytes_up"] == pytest.approx(one["bytes_up"] / 2, rel=1e-3)
    assert two["bytes_inside"] == pytest.approx(one["bytes_up"] + one["bytes_down"], rel=0.02)
    assert "bytes_inside" not in one


def test_three_levels_train(undisturbed, four_silos):
    history = read_history(undisturbed)
    done = history.of(LocalFinished)
    assert {event.round for event in done} == {1, 2}
    assert {event.silo for event in done} == {"a", "b", "c", "d", "d.0", "d.1", "coast", "west"}
    for silo in ("west", "coast", "b", "d.1"):
        losses = [event.last_loss for event in done if event.silo == silo]
        assert losses[-1] < losses[0], silo
    assert undisturbed.summary["tokens"] == 2 * 5 * 4 * 4 * 32
    assert {event.silo for event in history.of(Evaluated)} == {None}


def test_what_no_checkpoint_needs_is_removed(undisturbed):
    """Two checkpoints are kept; each names a state of the group, and so of those below."""
    kept = states_kept(undisturbed.folder)
    numbers = {"west": (1, 2), "a": (2, 4), "coast": (2, 4)}
    numbers |= dict.fromkeys(("b", "c", "d", "d.0", "d.1"), (4, 8))
    groups = ("west", "coast", "d")
    wanted = {(name, f"round-{n:06d}") for name in groups for n in numbers[name]}
    assert {one for one in kept if one[1].startswith("round")} == wanted
    feedback = {(name, f"feedback-{n:06d}") for name, pair in numbers.items() for n in pair}
    feedback -= {("d", "feedback-000004"), ("d", "feedback-000008")}  # its codec is fp32
    assert {one for one in kept if one[1].startswith("feedback")} == feedback


@pytest.mark.parametrize(("silo", "number"), [("a", 4), ("c", 6), ("d.1", 7)])
def test_a_kill_at_any_level_changes_nothing(
    silo, number, undisturbed, four_silos, make_config, small_model, tmp_path, monkeypatch
):
    config = make_config(four_silos, *DEEP, model=small_model)
    with monkeypatch.context() as patch:
        fired = faulty(patch, silo, number, fail)
        with pytest.raises(RuntimeError, match="killed"):
            simulate(config, run_dir=tmp_path / "run")
        assert fired
    resumed = resume(tmp_path / "run")
    for key in KEYS:
        assert resumed.summary[key] == undisturbed.summary[key], key
    assert states_kept(tmp_path / "run") == states_kept(undisturbed.folder)


def test_workers_come_to_the_same_bits(undisturbed, four_silos, make_config, small_model, tmp_path):
    config = make_config(four_silos, *DEEP, "federation.workers=2", model=small_model)
    summary = simulate(config, run_dir=tmp_path / "run").summary
    for key in KEYS:
        assert summary[key] == undisturbed.summary[key], key


def test_nodes_read_every_sequence_of_their_silo_once(
    four_silos, make_config, small_model, tmp_path, monkeypatch
):
    tasks = tasks_of(monkeypatch)
    config = make_config(
        four_silos,
        *SHORT,
        'parts.frozen=["*embed*"]',
        "federation.children.a={nodes=2, rounds=2}",
        'federation.children.rest={silos=["c"], children={b={nodes=3, rounds=2}}}',
        "federation.rounds=2",
        model=small_model,
    )
    simulate(config, run_dir=tmp_path / "run")
    for name, nodes in (("a", 2), ("b", 3), ("c", 1), ("d", 1)):
        mine = [task for task in tasks if task.pooled == (name,)]
        spans = [range(one.cursor, one.cursor + one.steps * 4) for one in mine]
        read = [sequence for span in spans for sequence in span]
        assert sorted(read) == list(range(2 * nodes * 4 * 4)), name
        assert len({(one.silo, one.round) for one in mine}) == len(mine)
    assert {one.silo for one in tasks} == {"a.0", "a.1", "b.0", "b.1", "b.2", "c", "d"}
    state = CheckpointStore(tmp_path / "run/checkpoints", 1).load_latest()[0]
    assert state.cursors == {"a": 64, "rest": 32, "d": 32}


def test_a_bad_update_is_dropped_inside_and_a_lost_group_outside(
    four_silos, make_config, small_model, tmp_path, monkeypatch
):
    config = make_config(
        four_silos,
        *SHORT,
        "federation.rounds=2",
        'federation.children.east={silos=["a", "b"]}',
        'federation.children.west={silos=["c"]}',
        model=small_model,
    )
    for silo, dropped in (("a", ["a"]), ("c", ["c", "west"])):
        with monkeypatch.context() as patch:
            faulty(patch, silo, 1, poison)
            result = simulate(config, run_dir=tmp_path / silo)
        events = read_history(result).of(UpdateDropped)
        assert [(event.round, event.silo) for event in events] == [(1, one) for one in dropped]
        assert result.summary["tokens"] == 7 * 4 * 4 * 32
        assert result.summary["tokens_lost"] == 4 * 4 * 32


def test_a_group_that_lost_what_it_kept_comes_back(
    four_silos, make_config, small_model, tmp_path, monkeypatch
):
    group = 'federation.children.west={silos=["a"], outer={name="nesterov"}}'
    config = make_config(four_silos, *SHORT, "federation.rounds=2", group, model=small_model)
    with monkeypatch.context() as patch:
        faulty(patch, "a", 2, fail)
        with pytest.raises(RuntimeError, match="killed"):
            simulate(config, run_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run/nodes/west")
    resume(tmp_path / "run")
    told = [event.text for event in read_history(tmp_path / "run").events if hasattr(event, "text")]
    assert [text for text in told if text.startswith("west has lost what it kept after round 1")]


MISTAKES = {
    "a has two places|has a in two places": ['one={silos=["a", "b"]}', 'two={silos=["a"]}'],
    "names 'z'; the data's silos are a, b, c, d": ['one={silos=["a", "z"]}'],
    "needs another name for 'd'": ['d={silos=["a"]}'],
    r"rounds x steps of \[federation.children.one\] are not the 4 steps": [
        'one={silos=["a"], rounds=3}'
    ],
    r"rounds x steps of \[federation.children.one.children.two\] are not the 2 steps": [
        'one={silos=["a"], rounds=2, children={two={silos=["b"], steps=4}}}'
    ],
    r"members of one kind in \[federation.children.a\]": ['a={nodes=2, silos=["b"]}'],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_groups_that_can_not_be_are_refused_before_training(
    message, four_silos, make_config, tmp_path
):
    with pytest.raises(IncompatibleConfigError, match=message):
        simulate(
            make_config(four_silos, *(f"federation.children.{one}" for one in MISTAKES[message])),
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_groups_go_with_rounds_that_wait_for_all(four_silos, make_config):
    for key in ("federation.merge=adopt", "federation.pace=buffered"):
        with pytest.raises(IncompatibleConfigError, match=r"federation\.children needs"):
            make_config(four_silos, key, "federation.children.a.nodes=2")
    with pytest.raises(UnknownKeyError, match="node'") as caught:
        make_config(four_silos, "federation.children.a.node=2")
    assert "federation.children.a.nodes" in str(caught.value.hint)


def test_a_resolved_run_file_has_its_groups(four_silos, make_config):
    config = make_config(four_silos, *DEEP)
    assert parse_run_config(config.model_dump(exclude_none=True)) == config
    assert set(open_data(four_silos).silos) == set(config.federation.children["west"].silos_of(""))


def test_only_a_simulation_on_real_time_has_groups(four_silos, make_config, tmp_path):
    config = make_config(four_silos, *SHORT, "federation.children.a.nodes=2")
    with pytest.raises(IncompatibleConfigError, match="simulated time has no groups yet"):
        simulate(config, run_dir=tmp_path / "run", clock=ClockConfig())
    run_file = tmp_path / "run.toml"
    write_resolved(config, run_file)
    result = CliRunner().invoke(app, ["serve", str(run_file)])
    assert result.exit_code == IncompatibleConfigError.exit_code
    assert "nodes can't be" in " ".join(result.output.split())


def test_the_baseline_reads_as_many_tokens_as_groups_do(
    four_silos, make_config, small_model, tmp_path
):
    recipe = (*SHORT, "federation.rounds=1", "federation.children.a.nodes=2")
    config = make_config(four_silos, *recipe, model=small_model)
    (one, two) = (run(config, run_dir=tmp_path / run.__name__) for run in (simulate, train))
    assert one.summary["tokens"] == two.summary["tokens"] == 5 * 4 * 4 * 32
