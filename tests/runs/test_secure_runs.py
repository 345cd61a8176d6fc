"""Secure aggregation in whole runs, simulated and served; kills and dropouts in every phase."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from federations_in_process import Region
from served_in_process import SMALL, Served
from silos_in_process import join_all
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import parse_run_config, write_resolved
from photon.dashboard.report import write_report
from photon.engines.local import LocalEngine
from photon.errors import ConfigError, IncompatibleConfigError, QuorumLostError
from photon.federation import FitTask, SecureReceipt, SecureTask, Update
from photon.federation.secure_rounds import COHORTS_FILE
from photon.membership.keys import AGGREGATOR_KEY_FILE, NodeKey
from photon.runs import resume, simulate
from photon.store.contract import FolderStore
from photon.telemetry import read_history
from photon.telemetry.events import LocalFinished, RoundMerged, UpdateDropped

SECURE = (*SMALL, "privacy.secure_aggregation=true", "serve.min_silos=5", "eval.per_silo=false")
PHASES = ("advertise", "share", "fit", "unmask")


def weights_of(result):
    return result.summary["weights_sha256"]


@pytest.fixture(scope="module")
def config(make_config, five_silos):
    return make_config(five_silos, *SECURE)


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory):
    """The simulated run that nothing happens in."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    return weights_of(simulate(config, run_dir=folder))


@pytest.fixture
def served(config, tmp_path):
    return Served(config, tmp_path, names=tuple("abcde"))


def dropping(monkeypatch, silo, phase, number=2):
    """A silo that is gone from this phase of a round on, until the round is over."""
    fired, arrivals = [], LocalEngine.arrivals

    def gone(self, timeout_s=None):
        came = arrivals(self, timeout_s)
        if came and came[0][0].silo == silo and came[0][0].round == number:
            task = came[0][0]
            at = task.phase if isinstance(task, SecureTask) else "fit"
            if at in PHASES and PHASES.index(at) >= PHASES.index(phase):
                fired.append(at)
                if isinstance(task, FitTask):
                    receipt = replace(came[0][1].receipt, failure="it is gone")
                    return [(task, Update.none(receipt))]
                if isinstance(task, SecureTask):
                    return [(task, SecureReceipt(failure="it is gone"))]
        return came

    monkeypatch.setattr(LocalEngine, "arrivals", gone)
    return fired


# --- simulated --------------------------------------------------------------------------------


def test_secrets_change_no_bit_and_no_single_norm_is_known(config, calm, tmp_path):
    again = simulate(config, run_dir=tmp_path / "again")
    assert weights_of(again) == calm
    told = read_history(tmp_path / "again").of(LocalFinished)
    assert len(told) == 15
    assert {one.update_norm for one in told} == {None}
    assert all(0 < one.left_out < 0.2 for one in told)


def test_workers_give_the_same(config, calm, tmp_path):
    run = config.having(federation={"workers": 2})
    assert weights_of(simulate(run, run_dir=tmp_path / "run")) == calm


def test_it_learns_as_int8_does(make_config, five_silos, tmp_path):
    def loss(name, *overrides):
        long = ("federation.rounds=6", "eval.every=0", "eval.per_silo=false", *overrides)
        run = simulate(make_config(five_silos, *long), run_dir=tmp_path / name)
        return run.summary["global_loss"]

    int8 = loss("int8", "link.update_codec=int8")
    assert abs(loss("secure", "privacy.secure_aggregation=true") - int8) < 0.005 * int8


@pytest.mark.parametrize("phase", PHASES)
def test_a_silo_that_drops_out_costs_nobody_else(phase, config, calm, tmp_path, monkeypatch):
    fired = dropping(monkeypatch, "c", phase)
    run = weights_of(simulate(config, run_dir=tmp_path / "run"))
    assert fired
    dropped = [one.silo for one in read_history(tmp_path / "run").of(UpdateDropped)]
    assert dropped == ([] if phase == "unmask" else ["c"])
    assert (run == calm) == (phase == "unmask")


def reasons_of(folder):
    return {one.silo: one.reason for one in read_history(folder).of(UpdateDropped)}


def test_a_sum_that_stays_closed_costs_its_round(config, calm, tmp_path, monkeypatch):
    first, second = dropping(monkeypatch, "c", "fit"), dropping(monkeypatch, "d", "fit")
    result = simulate(config, run_dir=tmp_path / "run")
    assert first
    assert second
    assert result.summary["rounds"] == 3
    assert weights_of(result) != calm
    assert [one.round for one in read_history(tmp_path / "run").of(RoundMerged)] == [1, 3]
    reasons = reasons_of(tmp_path / "run")
    assert reasons["c"] == reasons["d"] == "it is gone"
    for name in "abe":
        assert reasons[name].startswith(
            "round 2 is passed over: it stays closed: 2 shares of a's mask"
        )
    write_report(tmp_path / "run")


def test_too_few_updates_end_a_run_and_a_resume_passes_over_their_round(
    config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        for silo in "bcd":
            dropping(patch, silo, "fit")
        with pytest.raises(QuorumLostError, match="the quorum is 3"):
            simulate(config, run_dir=tmp_path / "run")
    resume(tmp_path / "run")
    told = read_history(tmp_path / "run")
    assert [one.round for one in told.of(RoundMerged)] == [1, 3]
    assert "have left their silos, for no sum" in reasons_of(tmp_path / "run")["a"]


def test_too_few_with_keys_try_again(config, calm, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for silo in "bcd":
            dropping(patch, silo, "share")
        with pytest.raises(QuorumLostError, match=r"has 2 silos with keys .* left out: b: it is"):
            simulate(config, run_dir=tmp_path / "run")
    assert weights_of(resume(tmp_path / "run")) == calm
    kept = json.loads((tmp_path / "run" / COHORTS_FILE).read_text())["rounds"]
    assert {number: one["attempt"] for number, one in kept.items()} == {"1": 1, "2": 2, "3": 1}


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_goes_on_to_the_same_bits(phase, config, calm, tmp_path, monkeypatch):
    fired, arrivals = [], LocalEngine.arrivals

    def dying(self, timeout_s=None):
        came = arrivals(self, timeout_s)
        task = came[0][0]
        at = getattr(task, "phase", "fit" if isinstance(task, FitTask) else "")
        if (at, task.silo, task.round) == (phase, "c", 2) and not fired:
            fired.append(task)
            raise KeyboardInterrupt
        return came

    monkeypatch.setattr(LocalEngine, "arrivals", dying)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, run_dir=tmp_path / "run")
    assert fired
    assert weights_of(resume(tmp_path / "run")) == calm


GROUPS = {
    "children": {
        "north": {"silos": ["a", "b", "c"], "rounds": 2},
        "south": {"silos": ["d", "e"], "privacy": {}},
    }
}


def test_groups_sum_their_own(make_config, five_silos, tmp_path):
    run = make_config(five_silos, *SECURE, "local.steps=4")
    tree = run.model_dump(exclude_none=True)
    tree["federation"] |= GROUPS
    with pytest.raises(IncompatibleConfigError, match="is of 2 silos a round"):
        simulate(parse_run_config(tree), run_dir=tmp_path / "two")
    tree["privacy"]["secure_aggregation"] = False
    tree["federation"]["children"]["north"]["privacy"] = {"secure_aggregation": True}
    result = simulate(parse_run_config(tree), run_dir=tmp_path / "run")
    norms = {one.silo: one.update_norm for one in read_history(tmp_path / "run").of(LocalFinished)}
    assert {name for name, norm in norms.items() if norm is None} == {"a", "b", "c"}
    assert (tmp_path / "run" / "nodes" / "north" / COHORTS_FILE).is_file()
    assert result.summary["global_loss"] > 0


NINE = {f"{group}{number}": 8 for group in "xyz" for number in "123"}
TREE = (
    "local.steps=4",
    "federation.rounds=2",
    "federation.max_update_norm=none",
    "eval.max_tokens=500",
    "serve.min_silos=3",
    "privacy.secure_aggregation=true",
    "federation.children={"
    + ", ".join(f'{g} = {{silos = ["{g}1", "{g}2", "{g}3"], rounds = 2}}' for g in "xyz")
    + "}",
)


@pytest.fixture(scope="module")
def nine_silos(prepare_text, tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("nine"), NINE)


@pytest.fixture(scope="module")
def tree(make_config, nine_silos):
    """Three groups of three; groups and their members send sums alone."""
    return make_config(nine_silos, *TREE)


@pytest.fixture(scope="module")
def calm_tree(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree") / "run"
    return folder, weights_of(simulate(tree, run_dir=folder))


def test_a_tree_sums_at_both_levels(calm_tree):
    folder, _ = calm_tree
    told = read_history(folder).of(LocalFinished)
    assert {one.silo for one in told} == {*NINE, *"xyz"}
    assert {one.update_norm for one in told} == {None}
    for name in "xyz":
        assert (folder / "nodes" / name / COHORTS_FILE).is_file()


def test_served_federations_inside_one_come_to_the_same(tree, calm_tree, nine_silos, tmp_path):
    """`photon serve --parent`: a region seals its update as a silo does, and sums its members'."""
    root = Served(tree, tmp_path, names=())
    key = NodeKey.load(tmp_path / "home" / AGGREGATOR_KEY_FILE)
    for number, (name, child) in enumerate(tree.federation.children.items(), 1):
        root.silos[name] = Region(tmp_path, name, child, nine_silos, key, f"{number}" * 32)
        root.silos[name].store = FolderStore(tmp_path / "store")
    join_all(root.roster, root.silos)
    summary = root.go_on().summary
    assert summary["weights_sha256"] == calm_tree[1]
    assert root.audit().updates == 6
    for region in root.silos.values():
        assert region.audit().updates == 12
        kinds = [ask.kind for ask in region.wire.asked]
        assert {kind: kinds.count(kind) for kind in PHASES} == dict.fromkeys(PHASES, 12)
        region.close()


@pytest.mark.slow
def test_a_node_of_two_ranks_seals_one_update(make_config, five_silos, tmp_path):
    run = make_config(five_silos, *SECURE, "federation.rounds=1", "eval.every=1")
    write_resolved(run, tmp_path / "run.toml")
    ranks = ("--set", "compute.processes=2", "--set", "compute.strategy=ddp")
    words = ["simulate", str(tmp_path / "run.toml"), "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*words, "--quiet", *ranks])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    norms = {one.update_norm for one in read_history(tmp_path / "run").of(LocalFinished)}
    assert norms == {None}
    alone = simulate(run, run_dir=tmp_path / "alone").summary
    assert told["global_loss"] == pytest.approx(alone["global_loss"], rel=1e-3)


# --- served -----------------------------------------------------------------------------------


def test_five_sites_come_to_the_weights_of_simulate(served, calm):
    assert weights_of(served.go_on()) == calm
    assert served.audit().updates == 15
    # Nothing of an update lies open: what the aggregator's store and folders hold is masked.
    asked = [ask.kind for ask in served.wire.asked if ask.round == 2]
    assert {kind: asked.count(kind) for kind in PHASES} == dict.fromkeys(PHASES, 5)


@pytest.mark.parametrize("phase", PHASES)
def test_kills_of_aggregator_and_sites_in_a_phase(phase, served, calm):
    fired = []

    def dying(silo, ask, times):
        if ask.kind == phase and ask.round == 2 and silo.name == "c" and len(fired) < 2:
            fired.append(phase)
            answer = silo.answer(ask)
            silo.start()  # the site forgot whatever was not on disk
            if len(fired) == 1:
                raise KeyboardInterrupt  # and so does the aggregator
            return "the line broke" if answer else None
        return silo.answer(ask)

    served.wire.fault = dying
    with pytest.raises(KeyboardInterrupt):
        served.go_on()
    served.wire = type(served.wire)(served.silos, served.roster)
    served.wire.fault = dying
    assert weights_of(served.go_on()) == calm
    assert len(fired) == 2


def test_an_answer_without_a_mask_is_never_given(served, config):
    """An aggregator that says one thing and asks another."""
    served.go_on()
    ask = next(ask for ask in served.wire.asked if ask.kind == "fit" and ask.round == 3)
    plain = ask.model_copy(update={"fit": ask.fit.model_copy(update={"sealing": None})})
    refused = said(served.silos["a"].answer(plain.model_copy(update={"silo": "a"})))
    assert "secure_aggregation = true, and the task has no cohort" in refused
    other = ask.run.model_copy(
        update={"config": ask.run.config | {"local": ask.run.config["local"] | {"lr": 1e-9}}}
    )
    silo = served.silos[ask.silo]
    assert "asked another question" in said(silo.answer(ask.model_copy(update={"run": other})))
    moved = replace(ask.state, sha256="0" * 64)
    assert "asked another question" in said(silo.answer(ask.model_copy(update={"state": moved})))


def said(answer):
    return json.loads(answer.text)["refused"]["message"]


def test_pins_hold_other_keys_out(served, tmp_path):
    silos = served.silos
    keys = {name: silo.key.fingerprint for name, silo in silos.items()}
    pins = "\n".join(f'{name} = "{key}"' for name, key in keys.items() if name != "a")
    toml = silos["a"].home / "node.toml"
    good = toml.read_text() + "min_participants = 3\nsecure_aggregation = true\n[policy.pins]\n"
    toml.write_text(good + pins)
    silos["a"].start()
    wrong = NodeKey.create(tmp_path / "other.key").fingerprint
    other = silos["b"].home / "node.toml"
    pins = "\n".join(f'{name} = "{wrong if name == "c" else key}"' for name, key in keys.items())
    other.write_text(other.read_text() + "[policy.pins]\n" + pins)
    silos["b"].start()
    # One without b's shares would be short of nobody: two more that trust nobody.
    for name in "cd":
        pinned = silos[name].home / "node.toml"
        pinned.write_text(pinned.read_text() + f'[policy.pins]\nnobody = "{wrong}"\n')
        silos[name].start()
    words = f"c would be in the cohort with the key {keys['c']}; policy.pins has {wrong}"
    with pytest.raises(QuorumLostError, match=words):
        served.go_on()


def test_a_site_refuses_runs_without_it(config, tmp_path):
    run = config.having(privacy={"secure_aggregation": False}, serve={"min_silos": 3})
    served = Served(run, tmp_path, names=tuple("abcde"))
    served.silos["a"].start("policy.secure_aggregation=true", "policy.min_participants=3")
    served.go_on()
    reasons = [one.reason for one in read_history(served.folder).of(UpdateDropped)]
    assert any("the aggregator would see single updates" in one for one in reasons)
    with pytest.raises(ConfigError, match="needs min_participants of 3 or more"):
        served.silos["a"].start("policy.secure_aggregation=true")


def test_a_lost_file_of_cohorts_costs_nothing_where_the_same_silos_answer(served, calm):
    def dying(silo, ask, times):
        answer = silo.answer(ask)
        if ask.kind == "unmask" and ask.round == 2 and silo.name == "a":
            raise KeyboardInterrupt
        return answer

    served.wire.fault = dying
    with pytest.raises(KeyboardInterrupt):
        served.go_on()
    (served.folder / COHORTS_FILE).unlink()
    served.wire = type(served.wire)(served.silos, served.roster)
    assert weights_of(served.go_on()) == calm


# --- what excludes what -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.merging_rule=median"], 'use "mean": members keep within the round'),
        (["federation.merging_rule=trimmed_mean"], 'use "mean"'),
        (["federation.merging_rule=edit"], 'use "mean"'),
        (
            ["federation.merging_rule=clipped_mean", "federation.clip_update_norm=1.0"],
            'privacy.mechanism = "client" has them clip',
        ),
        (["federation.max_update_norm=3.0"], "leave it out: nodes keep within"),
        (
            ['parts.key=["*mlp*"]', "parts.key_rule=attention"],
            'compares single updates; use "mean"',
        ),
        (["federation.optimizer_state=average"], 'use "keep" or "reset"'),
        (["federation.merge=adopt"], 'use merge = "delta"'),
        (["federation.pace=buffered"], '"quorum" with late = "drop"'),
        (["federation.pace=quorum", "federation.late=merge"], '"quorum" with late = "drop"'),
        (["federation.normalise=true"], "who takes fewer steps counts less"),
        (["link.update_codec=topk"], "travel in fixed point"),
        (["link.update_codec=powersgd"], "travel in fixed point"),
        (["federation.sample=2"], "of two each knows both"),
    ],
)
def test_what_excludes_it_is_told_with_what_to_use(overrides, words):
    tree = {"model": {"preset": "tiny"}, "data": {"path": "unread"}}
    parse_run_config(tree, ["privacy.secure_aggregation=true", "federation.pace=quorum"])
    with pytest.raises(IncompatibleConfigError) as caught:
        parse_run_config(tree, ["privacy.secure_aggregation=true", *overrides])
    assert words in caught.value.message
    assert "secure_aggregation" in caught.value.message


def test_two_silos_are_too_few(make_config, prepare_text, tmp_path):
    run = make_config(
        prepare_text(tmp_path, {"red": 8, "blue": 8}), "privacy.secure_aggregation=true"
    )
    with pytest.raises(IncompatibleConfigError, match="of 2 silos a round"):
        simulate(run, run_dir=tmp_path / "run")
