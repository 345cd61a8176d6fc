"""What each group decides for itself: who is drawn, what leaves with noise, who goes first."""

import json
import math

import pytest
import torch
from faulty_nodes import fail, faulty, poison, tasks_of

from photon.config.children import at_work, check_children, with_branches
from photon.data import open_data
from photon.errors import ConfigError
from photon.federation import CheckpointStore, FitTask, Node, NodeSettings
from photon.federation.checkpoint import RunState
from photon.federation.engine import Version
from photon.federation.layout import initial_model
from photon.federation.norm_bound import SLACK, norm_bound
from photon.federation.tasks import WEIGHTS
from photon.models import trainable_parameters
from photon.runs import load_weights, resume, simulate
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished, Notice, UpdateDropped

SHORT = ("eval.every=0", "eval.max_tokens=300", "eval.per_silo=false", "federation.rounds=3")
KEYS = ("weights_sha256", "tokens", "bytes_up", "bytes_down", "bytes_inside")


def tree(west="", coast="", above=()):
    """west has a and coast, which has b, c and d; e is in no group."""
    inner = f'coast={{silos=["b", "c", "d"], rounds=2{coast}}}'
    return (
        *SHORT,
        f'federation.children.west={{silos=["a"], rounds=2, children={{{inner}}}{west}}}',
        *above,
    )


@pytest.fixture
def run(five_silos, make_config, small_model, tmp_path):
    def run(name, *overrides):
        config = make_config(five_silos, *overrides, model=small_model)
        return simulate(config, run_dir=tmp_path / name)

    return run


@pytest.fixture
def killed_and_resumed(run, tmp_path, monkeypatch):
    def killed(silo, number, *overrides):
        with monkeypatch.context() as patch:
            fired = faulty(patch, silo, number, fail)
            with pytest.raises(RuntimeError, match="killed"):
                run(f"killed-{silo}", *overrides)
            assert fired
        return resume(tmp_path / f"killed-{silo}")

    return killed


@pytest.fixture
def tasks(monkeypatch):
    """Every task that a node is given."""
    return tasks_of(monkeypatch)


def clip(norm, noise=0):
    """A table of privacy."""
    return f'{{mechanism="client", clip_norm={norm}, noise_multiplier={noise}}}'


def norms(result):
    """By silo or group, of the updates that were merged."""
    found = {}
    for event in read_history(result).of(LocalFinished):
        found.setdefault(event.silo, []).append(event.update_norm)
    return found


def assert_same(one, two):
    assert {key: one.summary[key] for key in KEYS} == {key: two.summary[key] for key in KEYS}


def of(tasks, silo):
    return [task for task in tasks if task.silo == silo]


def test_to_draw_all_members_is_to_draw_none(run):
    drawn = ", sample=2, quorum=1", ', sample=3, quorum=2, deadline_s=600, pace="synchronous"'
    assert_same(run("plain", *tree()), run("drawn", *tree(*drawn)))


def test_each_level_draws_its_own_and_each_silo_reads_on(run, tasks):
    config = tree(coast=", sample=2"), tree(coast=', sample=2, sampling="weighted"')
    for name, one in zip(("uniform", "weighted"), config, strict=True):
        tasks.clear()
        result = run(name, *one)
        inner = [task for task in tasks if task.silo in tuple("bcd")]
        rounds = [{task.silo for task in inner if task.round == n} for n in range(1, 13)]
        assert all(rounds)
        if name == "uniform":
            assert {len(drawn) for drawn in rounds} == {2}
            assert len({frozenset(drawn) for drawn in rounds}) > 1
        for silo in "abcde":
            mine = of(tasks, silo)
            assert [one.cursor for one in mine] == [4 * mine[0].steps * i for i in range(len(mine))]
        assert result.summary["tokens"] == sum(4 * 32 * task.steps for task in tasks)


def test_a_kill_changes_nothing_where_members_are_drawn(run, tasks, killed_and_resumed):
    config = tree(coast=', sample=2, outer={name="nesterov"}')
    undisturbed = run("undisturbed", *config)
    last = [task for task in tasks if task.silo in "bcd" and task.round == 8][-1]
    assert_same(killed_and_resumed(last.silo, 8, *config), undisturbed)


def test_a_run_of_before_members_kept_their_own_place_goes_on(run, tmp_path, monkeypatch):
    """Groups' states did not say where the group itself read on: where its members did, then."""
    undisturbed = run("undisturbed", *tree())
    with monkeypatch.context() as patch:
        faulty(patch, "e", 3, fail)
        with pytest.raises(RuntimeError, match="killed"):
            run("old", *tree())
    for group in ("west", "coast"):
        for path in (tmp_path / "old/nodes" / group).glob("round-*/state.json"):
            state = json.loads(path.read_text())
            assert state["cursors"].pop(group)
            path.write_text(json.dumps(state))
    assert_same(resume(tmp_path / "old"), undisturbed)


def test_a_lost_task_of_a_group_keeps_no_silo_at_its_text(run, tasks, monkeypatch):
    """Whatever a task made of it: what its members were to read of it is behind them."""
    config = (*SHORT, 'federation.children.west={silos=["b", "c"], sample=1, quorum=1, rounds=2}')
    with monkeypatch.context() as patch:
        run("plain", *config)
        lost = next(task for task in tasks if task.round in (3, 4) and task.silo in "bc")
        tasks.clear()
        faulty(patch, lost.silo, lost.round, poison)
        result = run("run", *config)
    told = [(one.round, one.silo) for one in read_history(result).of(UpdateDropped)]
    assert told == [(2, lost.silo), (2, "west")]
    for silo in "bc":
        starts = {task.round: task.cursor for task in of(tasks, silo)}
        before = [at for number, at in starts.items() if number < 3]
        after = [at for number, at in starts.items() if number > 4]
        assert all(at == 16 + 8 * len(before) + 8 * i for i, at in enumerate(after))
    state = CheckpointStore(result.folder / "nodes/west", 1).load(3)[0]
    assert state.cursors["west"] == 3 * 16


def test_each_group_says_how_many_must_be_good_and_how_long_it_waits(run, monkeypatch):
    for own, dropped in ((", quorum=2", ["b"]), (", quorum=3", ["b", "coast"])):
        with monkeypatch.context() as patch:
            faulty(patch, "b", 1, poison)
            result = run(own[-1], *tree(coast=own))
        assert [one.silo for one in read_history(result).of(UpdateDropped)] == dropped
    result = run("late", *tree(coast=", deadline_s=1e-9"))
    late = [one for one in read_history(result).of(UpdateDropped) if one.silo in "bcd"]
    assert len(late) == 3 * 2 * 3
    assert "has not answered in the 1e-09 s" in late[0].reason


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("sample=4", r"sample of \[federation.children.west\] to be at most its 3 members"),
        ("sample=2, quorum=3", r"quorum of \[federation.children.west\] to be at most the 2"),
        ("quorum=4", r"quorum of \[federation.children.west\] to be at most the 3"),
        ('sampling="weighted", weighting="data"', r"data twice in \[federation.children.west\]"),
        ('pace="quorum"', r"children.west.pace"),
        ('privacy={mechanism="client", clip_norm=1}', r"west.privacy.*privacy.noise_multiplier"),
        ("update_privacy={clip_norm=1}", r"west.update_privacy.*makes nothing of"),
        (
            'update_privacy={mechanism="dp_sgd", clip_norm=1, noise_multiplier=1}',
            "a group takes no steps of its own",
        ),
    ],
)
def test_what_can_not_be_is_refused_with_the_run_file(own, words, five_silos, make_config):
    group = f'federation.children.west={{silos=["a", "b", "c"], {own}}}'
    with pytest.raises(ConfigError, match=words):
        make_config(five_silos, group)


def test_a_target_of_answers_that_nobody_can_count_is_refused(five_silos, make_config):
    target = 'update_privacy={mechanism="client", clip_norm=1, target_epsilon=1, delta=1e-5}'
    key = ('parts.key=["*mlp*"]', "parts.key_rule=attention", "federation.policy.residuals=in")
    group = f'federation.children.west={{silos=["a"], policy={{residuals="out"}}, {target}}}'
    with pytest.raises(ConfigError, match="nobody knows how many will leave"):
        make_config(five_silos, group, *key)


@pytest.mark.parametrize("own", ["privacy", "update_privacy"])
def test_what_would_void_a_group_s_promise_is_refused(own, five_silos, make_config):
    group = f"federation.children.west={{silos=['a'], {own}={clip(1)}}}"
    for key, words in (("optimizer_state=average", "unclipped"), ("normalise=true", "the clip")):
        with pytest.raises(ConfigError, match=f"{own} of 'west': .*{words}"):
            make_config(five_silos, group, f"federation.{key}")


def test_all_nodes_of_a_silo_read_their_part(five_silos, make_config):
    with pytest.raises(ConfigError, match=r"all nodes of \[federation.children.a\]"):
        make_config(five_silos, "federation.children.a={nodes=2, sample=1}")


def test_a_mechanism_that_changes_nothing_changes_no_bit(run):
    plain = run("plain", *tree())
    none = ', privacy={mechanism="none"}, update_privacy={mechanism="none"}'
    assert_same(run("none", *tree(none)), plain)
    wide = f", privacy={clip(1e9)}, update_privacy={clip(1e9)}"
    assert_same(run("wide", *tree(wide, wide)), plain)


def test_the_table_nearest_to_a_silo_holds(run):
    """The run's says 0.01, west's 0.02 and that of d's nodes 0.03."""
    nodes = f", children={{d={{nodes=2, privacy={clip(0.03)}}}}}"
    inner = f'coast={{silos=["b", "c"], rounds=2{nodes}, update_privacy={clip(0.015)}}}'
    west = f'federation.children.west={{silos=["a"], privacy={clip(0.02)}, children={{{inner}}}}}'
    above = f"privacy={clip(0.01)}"
    found = norms(run("run", *SHORT, above, west))
    limits = {"e": 0.01, **dict.fromkeys("abc", 0.02), "d.0": 0.03, "d.1": 0.03, "coast": 0.015}
    for name, limit in limits.items():
        assert found[name] == pytest.approx([limit] * len(found[name])), name
    assert 0.015 < max(found["d"]) <= 0.03
    free = 'federation.children.west={silos=["a"], privacy={mechanism="none"}}'
    found = norms(run("free", *SHORT, above, free))
    assert min(found["a"]) > 0.02  # its own say, stricter or not
    assert found["b"] == pytest.approx([0.01] * 3)


def test_a_kill_changes_nothing_where_groups_add_noise(run, killed_and_resumed, monkeypatch):
    monkeypatch.setattr("photon.privacy.noise.secrets.token_bytes", lambda count: b"k" * count)
    noise = f", privacy={clip(0.5, 0.01)}, update_privacy={clip(0.5, 0.01)}"
    config = tree(noise, f'{noise}, update_codec="int8"')
    undisturbed = run("undisturbed", *config)
    assert_same(killed_and_resumed("c", 7, *config), undisturbed)
    assert_same(killed_and_resumed("e", 2, *config), undisturbed)
    assert undisturbed.summary["weights_sha256"] != run("plain", *tree()).summary["weights_sha256"]


def test_noise_that_others_have_not_is_no_reason_to_refuse(run):
    """Of b it is a hundred times what others move, and comes to a and c undiminished."""
    noisy = f'federation.children.west={{silos=["b"], rounds=2, update_privacy={clip(1, 1)}}}'
    result = run("run", *SHORT, "federation.rounds=4", noisy)
    found, history = norms(result), read_history(result)
    quiet = max(found["a"] + found["c"] + found["d"])
    assert len(found["west"]) == 4
    assert min(found["west"]) > 20 * quiet
    assert not history.of(UpdateDropped)
    assert not history.of(Notice)


def test_how_far_a_group_may_move(five_silos, make_config):
    """As far as its members in all its rounds; what its own clip lets through, if it has one."""
    before, state = RunState(), {"weights/a": torch.zeros(10_000)}

    def bound(own):
        group = f"federation.children.west={{silos=['a'], {own}}}"
        sgd = ("local.optimizer=sgd", "local.schedule=constant", "local.lr=1")
        return norm_bound(make_config(five_silos, *sgd, group), before, state).norm / SLACK

    assert bound("rounds=2") == bound("weighting='equal'") == pytest.approx(4)
    assert bound(f"rounds=2, privacy={clip(1, 0.1)}") == pytest.approx(2 * (1 + 0.1 * 100))
    assert bound(f"rounds=2, update_privacy={clip(1, 0.1)}") == pytest.approx(1 + 0.1 * 100)
    assert bound("outer={name='nesterov'}") == math.inf
    kept = f"outer={{name='nesterov'}}, update_privacy={clip(5)}"
    assert bound(kept) == pytest.approx(5)
    assert bound(f"{kept}, update_codec='int8'") == math.inf


IN_TURN = ', levels="in_turn"'


def test_who_has_the_turn(run, tasks):
    """The root's silos, then those of a group, then those of the group in it; steps add up."""
    result = run("run", *tree(IN_TURN, above=("federation.levels=in_turn", "federation.rounds=4")))
    order = ["e", "a", "b", "c", "d", "b", "c", "d"]
    assert [task.silo for task in tasks] == 2 * order
    clocks = [[4 * 2 * r + at for at in (0, 4, 6, 6, 6, 7, 7, 7)] for r in (0, 1)]
    assert [task.global_step for task in tasks] == clocks[0] + clocks[1]
    assert [task.cursor for task in of(tasks, "b")] == [0, 4, 8, 12]
    state = CheckpointStore(result.folder / "checkpoints", 1).load_latest()[0]
    assert state.global_step == 16


def test_in_turn_is_one_federation_after_another(run, five_silos, make_config, tmp_path):
    """By hand: the mean of a root's silos, from there a region's, from there an edge's."""
    edge = 'edge={silos=["d", "e"]}'
    west = f'federation.children.west={{silos=["c"], rounds=2, children={{{edge}}}{IN_TURN}}}'
    config = (*SHORT, "federation.levels=in_turn", "federation.rounds=2", west)
    result = run("run", *config)

    made = make_config(five_silos, *config)
    node = Node(NodeSettings(made, tmp_path / "nodes"), lambda _: None)
    model = initial_model(made, open_data(five_silos))
    state = {WEIGHTS + name: one.detach() for name, one in trainable_parameters(model).items()}
    for silos, clock, steps in (("ab", 0, 4), ("c", 4, 2), ("de", 6, 2)):
        version, deltas = Version(clock, state), []
        for silo in silos:
            update = node.fit(FitTask("test", 1, silo, clock, steps, None), version)
            deltas.append({name: tensor.clone() for name, tensor in update.tensors()})
        state = {
            name: tensor - sum(delta[name] for delta in deltas) / len(deltas)
            for name, tensor in state.items()
        }
    node.close()
    found = load_weights(result)[0].state_dict()
    # Training goes on, twice, from a mean that another processor rounds otherwise: 3e-6 were seen.
    # A step moves a weight by 3e-3.
    for name, tensor in state.items():
        torch.testing.assert_close(found[name.removeprefix(WEIGHTS)], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("silo", "number"), [("a", 3), ("d", 8), ("e", 3)])
def test_a_kill_at_any_level_changes_nothing_in_turn(silo, number, run, killed_and_resumed):
    above = ("federation.levels=in_turn", "federation.rounds=4", "federation.sample=1")
    config = tree(f'{IN_TURN}, outer={{name="nesterov"}}', ", sample=2", above)
    config = (*config, "federation.optimizer_state=keep")
    assert_same(killed_and_resumed(silo, number, *config), run("undisturbed", *config))


def test_the_baseline_of_levels_in_turn_has_as_many_steps_and_tokens(run, five_silos, make_config):
    config = tree(IN_TURN, above=("federation.levels=in_turn", "federation.rounds=4"))
    made = make_config(five_silos, *config)
    children = made.federation.children
    west = children["west"]
    assert at_work(west, len(west.silos), west.children) == (1 + 3) / 2
    assert at_work(made.federation, 1, children) == (1 + 2) / 2
    sampled = west.model_copy(update={"levels": "at_once", "sample": 1})
    assert at_work(sampled, len(west.silos), west.children) == 4 / 2
    coast = west.children["coast"].model_copy(update={"sample": 2})
    assert at_work(coast, len(coast.silos), coast.children) == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.levels=in_turn"], r"silos and groups in \[federation\]"),
        (
            ["federation.levels=in_turn", 'federation.children.west={silos=["a","b","c","d","e"]}'],
            r"silos and groups in \[federation\]",
        ),
        (
            [f'federation.children.west={{silos=["a"], rounds=2{IN_TURN}}}'],
            r"silos and groups in \[federation.children.west\]",
        ),
        (
            [f'federation.children.west={{rounds=2, children={{b={{silos=["b"]}}}}{IN_TURN}}}'],
            r"silos and groups in \[federation.children.west\]",
        ),
        (
            [f'federation.children.west={{silos=["a"], children={{b={{silos=["b"]}}}}{IN_TURN}}}'],
            r"even number of rounds in \[federation.children.west\]",
        ),
    ],
)
def test_who_has_nobody_to_take_turns_with_is_told(overrides, words, run):
    with pytest.raises(ConfigError, match=words):
        run("run", *SHORT, *overrides)


def test_groups_by_name_take_turns_where_there_is_somebody_to(make_config, five_silos):
    config = make_config(five_silos, "federation.branches={rounds=2, levels='in_turn'}")
    children = with_branches(config, ["eu.rome", "eu.north.oslo", "eu.north.bergen", "us"])
    eu = children.federation.children["eu"]
    assert (eu.levels, eu.children["eu.north"].levels) == ("in_turn", "at_once")
    check_children(children, ["eu.rome", "eu.north.oslo", "eu.north.bergen", "us"])
