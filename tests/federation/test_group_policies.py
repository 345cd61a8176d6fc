"""What each group decides for itself: who is drawn, what leaves with noise, who goes first."""

import pytest
from faulty_nodes import fail, faulty, poison

from photon.engines.local import LocalEngine
from photon.errors import ConfigError
from photon.federation import CheckpointStore, FitTask
from photon.runs import resume, simulate
from photon.telemetry import read_history
from photon.telemetry.events import UpdateDropped

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
                run("killed", *overrides)
            assert fired
        return resume(tmp_path / "killed")

    return killed


@pytest.fixture
def tasks(monkeypatch):
    """Every task that a node is given."""
    tasks, submit = [], LocalEngine.submit

    def noted(self, task, version):
        if isinstance(task, FitTask):
            tasks.append(task)
        submit(self, task, version)

    monkeypatch.setattr(LocalEngine, "submit", noted)
    return tasks


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
    ],
)
def test_what_can_not_be_is_refused_with_the_run_file(own, words, five_silos, make_config):
    group = f'federation.children.west={{silos=["a", "b", "c"], {own}}}'
    with pytest.raises(ConfigError, match=words):
        make_config(five_silos, group)


def test_all_nodes_of_a_silo_read_their_part(five_silos, make_config):
    with pytest.raises(ConfigError, match=r"all nodes of \[federation.children.a\]"):
        make_config(five_silos, "federation.children.a={nodes=2, sample=1}")
