"""Federations of federations with key layers of their own (WorldLM, arXiv 2405.14446)."""

import pytest
import torch
from faulty_nodes import fail, faulty

from photon.config import load_run_config
from photon.data import PrepareOptions, prepare
from photon.errors import IncompatibleConfigError, ModelError
from photon.federation.node_state import Kept
from photon.products import evaluate
from photon.runs import load_weights, resume, simulate
from photon.telemetry import read_history
from photon.telemetry.events import Evaluated, KeyMerged

SHORT = ("eval.every=0", "eval.max_tokens=300", "federation.rounds=3")
KEY = ('parts.key=["last:0.4"]',)
ATTENTION = (*KEY, "parts.key_rule=attention", "parts.key_down=attention")
BEST = (*KEY, "parts.key_rule=attention", "parts.key_down=best")
#: Two levels above the silos.
TREE = ('federation.children.west={silos=["a"], children={coast={silos=["b", "c"], rounds=2}}}',)


@pytest.fixture(scope="module")
def four_silos(prepare_text, tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("four"), dict.fromkeys("abcd", 6))


@pytest.fixture
def run(four_silos, make_config, small_model, tmp_path):
    def run(name, *overrides):
        config = make_config(four_silos, *SHORT, *overrides, model=small_model)
        return simulate(config, run_dir=tmp_path / name)

    return run


def weights(result):
    return load_weights(result)[0].state_dict()


def assert_alike(one, two):
    """But for rounding, which AdamW turns into steps."""
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=2e-5)


def test_key_layers_replaced_by_their_mean_are_shared_ones(run):
    flat, key = run("flat"), run("key", *KEY)
    assert flat.summary["weights_sha256"] == key.summary["weights_sha256"]


def test_with_a_very_high_temperature_a_tree_is_hierarchical_fedavg(run):
    assert_alike(
        run("mean", *TREE),
        run("hot", *TREE, *KEY, "parts.key_rule=attention", "parts.key_temperature=1e9"),
    )


def test_a_tree_whose_members_keep_their_own_is_fedper(run):
    """Attention one-hot on oneself, whatever is sent up."""
    fedper = run("fedper", *TREE, 'parts.personal=["last:0.4"]')
    kept = run("kept", *TREE, *KEY, "parts.key_down=keep")
    cold = run("cold", *TREE, *ATTENTION, "parts.key_temperature=1e-6")
    assert kept.summary["per_silo"] == fedper.summary["per_silo"]
    assert cold.summary["per_silo"] == pytest.approx(fedper.summary["per_silo"], rel=1e-5)
    # And it is not what replacing them gives.
    assert run("mean", *TREE).summary["per_silo"] != pytest.approx(
        fedper.summary["per_silo"], rel=1e-5
    )


def test_who_is_named_first_changes_nothing(run):
    names = [
        'federation.children.east={silos=["a", "b"]}',
        'federation.children.west={silos=["c"]}',
    ]
    assert_alike(run("one", *names, *ATTENTION), run("two", *reversed(names), *ATTENTION))


def test_each_level_tells_what_counted_for_how_much(run):
    result = run("run", *TREE, *ATTENTION)
    told = read_history(result).of(KeyMerged)
    assert {(event.silo, tuple(event.participants)) for event in told} == {
        ("", ("d", "west")),
        ("west", ("a", "coast")),
        ("coast", ("b", "c")),
    }
    assert [event.round for event in told if event.silo == "coast"] == [1, 1, 2, 2, 3, 3]
    for event in told:
        assert all(sum(shares) == pytest.approx(1) for shares in event.shares.values())
    scored = read_history(result).of(Evaluated)
    assert {event.silo for event in scored} == {None, *"abcd"}


@pytest.mark.parametrize(
    ("parts", "silo", "number"),
    [
        (ATTENTION, "d", 3),
        (ATTENTION, "b", 4),
        (BEST, "a", 2),
        (('parts.personal=["last:0.4"]',), "c", 6),
    ],
)
def test_a_kill_at_any_level_changes_nothing(parts, silo, number, run, tmp_path, monkeypatch):
    undisturbed = run("undisturbed", *TREE, *parts)
    with monkeypatch.context() as patch:
        faulty(patch, silo, number, fail)
        with pytest.raises(RuntimeError, match="killed"):
            run("run", *TREE, *parts)
    resumed = resume(tmp_path / "run")
    for key in ("weights_sha256", "per_silo", "global_loss", "tokens"):
        assert resumed.summary[key] == undisturbed.summary[key], key


def test_whose_model_is_had_by_its_path(run, four_silos):
    """It is the one that was scored: in the tree's place of it, and with its own layers."""
    result = run("run", *TREE, *ATTENTION)
    for path, silo in (("d", "d"), ("west/coast/b", "b"), ("c", "c"), ("west/a", "a")):
        scored = evaluate(result, four_silos, max_tokens=300, device="cpu", of=path)
        assert scored.per_silo[silo].perplexity == pytest.approx(
            result.summary["per_silo"][silo], rel=1e-5
        )
    models = [load_weights(result, of)[0].state_dict() for of in (None, "west", "coast", "b")]
    own = [name for name, tensor in models[0].items() if not torch.equal(tensor, models[1][name])]
    assert own
    for other in models[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, models[0][name]) == (name not in own), name
    for wrong in ("e", "coast/a", "west/b", "west/d"):
        with pytest.raises(ModelError, match=f"has no '{wrong}'"):
            load_weights(result, wrong)


def test_each_layer_is_the_best_of_three_on_the_text_to_come(run, monkeypatch):
    choose, told = Kept._choose, []

    def noted(self, ways, score):
        before = score()
        choose(self, ways, score)
        told.append((before, score()))

    monkeypatch.setattr(Kept, "_choose", noted)
    result = run("run", *TREE, *BEST)
    # Once for each task but a silo's first: coast has two rounds in each of the run's.
    assert len(told) == 2 * 1 + 2 * 1 + 5 * 2
    assert all(after <= before for before, after in told)
    assert any(after < before for before, after in told)
    again = run("again", *TREE, *ATTENTION)
    assert again.summary["weights_sha256"] != result.summary["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_of_a_node_choose_together(strategy, run):
    ranks = ("compute.processes=2", f"compute.strategy={strategy}", "local.batch_size=4")
    one, two = run("one", *BEST), run("two", *BEST, *ranks)
    assert two.summary["per_silo"] == pytest.approx(one.summary["per_silo"], rel=1e-3)


def test_workers_come_to_the_same(run):
    one, two = run("one", *TREE, *ATTENTION), run("two", *TREE, *ATTENTION, "federation.workers=2")
    for key in ("weights_sha256", "per_silo", "global_loss", "bytes_up"):
        assert one.summary[key] == two.summary[key], key


def test_nodes_of_a_silo_keep_nothing_of_their_own(four_silos, make_config):
    for own in (ATTENTION, ('parts.personal=["last:0.4"]',)):
        with pytest.raises(IncompatibleConfigError, match="has nodes in a"):
            make_config(four_silos, *own, "federation.children.a.nodes=2")


def test_any_folder_of_folders_is_a_tree(make_config, small_model, tmp_path):
    """Files of a federation's own are a silo of it."""
    line = "the law of this land is made for all who live in it and by them"
    words = line.split(" ")
    for place in ("eu/north/oslo", "eu/north/bergen", "eu/rome", "eu", "us"):
        folder = tmp_path / "text" / place
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(6):
            turned = words[number:] + words[:number]
            (folder / f"{number}.txt").write_text(" ".join([*turned, place] * 40))
    options = {"silo_tree": True, "vocab_size": 300, "silo_fraction": 0.2, "global_fraction": 0.1}
    data = prepare(PrepareOptions(input=tmp_path / "text", out=tmp_path / "data", **options))
    assert sorted(data.silos) == ["eu.north.bergen", "eu.north.oslo", "eu.own", "eu.rome", "us"]
    config = make_config(
        data.path, *SHORT, *ATTENTION, "federation.branches.rounds=2", model=small_model
    )
    result = simulate(config, run_dir=tmp_path / "run")
    children = load_run_config(tmp_path / "run/config.resolved.toml").federation.children
    assert set(children) == {"eu"}
    assert (children["eu"].silos, set(children["eu"].children)) == (
        ["eu.own", "eu.rome"],
        {"eu.north"},
    )
    assert children["eu"].children["eu.north"].rounds == 2
    assert set(result.summary["per_silo"]) == set(data.silos)
    with pytest.raises(IncompatibleConfigError, match="branches can't both"):
        make_config(data.path, "federation.branches.rounds=2", "federation.children.us.nodes=2")
