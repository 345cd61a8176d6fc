"""What `photon plan` says beforehand, against the paper's figures and real runs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_run_config, write_resolved
from photon.config.children import with_branches
from photon.data import open_data
from photon.runs import simulate
from photon.runs.plan import exchange_s, plan, wall_s

#: A gigabit a second in bytes.
GBIT = 1e9 / 8


def test_the_paper_s_7b_row():
    """Four participants, bf16, a ring of 10 Gbit/s links."""
    size = 2 * 6.657e9
    assert exchange_s("rar", 4, size, 10 * GBIT) == pytest.approx(15.98, abs=0.005)
    each_step = wall_s("rar", 4, size, 10 * GBIT, rounds=21_902, steps=1, steps_per_s=0.12)
    assert each_step / 3600 == pytest.approx(50.7 + 97.2, abs=0.1)
    federated = wall_s("rar", 4, size, 10 * GBIT, rounds=22, steps=500, steps_per_s=0.032)
    assert federated / 3600 == pytest.approx(95.5 + 0.1, abs=0.1)


@pytest.mark.parametrize(
    ("topology", "seconds"), [("ps", 1004.0), ("ar", 1001.8), ("rar", 1000.36)]
)
def test_the_authors_golden_figures(topology, seconds):
    """Ten participants, a million parameters of 2 bytes, 1,000 MB/s."""
    found = wall_s(topology, 10, 2e6, 1e9, rounds=100, steps=1000, steps_per_s=100)
    assert found == pytest.approx(seconds, abs=1e-5)


#: By K: steps to perplexity 36 at 125M with tau = 64, and the time of each topology.
STEPS_BY_K = {
    1: (24_980, {"ps": 288.6, "ar": 249.6, "rar": 249.6}),
    2: (17_196, {"ps": 225.1, "ar": 184.9, "rar": 184.9}),
    4: (14_677, {"ps": 238.2, "ar": 180.9, "rar": 163.7}),
    8: (15_020, {"ps": 337.0, "ar": 231.7, "rar": 170.2}),
}


def test_how_many_participants_are_best_depends_on_the_topology():
    """The unit is that notebook's: its link takes 0.05 of a round's seconds for a model."""
    took = {topology: {} for topology in ("ps", "ar", "rar")}
    for k, (steps, published) in STEPS_BY_K.items():
        for topology, seconds in published.items():
            found = wall_s(topology, k, 0.05, 1.0, rounds=steps / 64, steps=64, steps_per_s=100)
            took[topology][k] = found
            assert found == pytest.approx(seconds, rel=0.01), (topology, k)
    best = {topology: min(times, key=times.get) for topology, times in took.items()}
    assert best == {"ps": 2, "ar": 4, "rar": 4}


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
#: The paper's, by preset: parameters, and tokens of all silos together where they are published.
PUBLISHED = {
    "75m": (75e6, 8 * 88_000 * 64 * 2048),
    "125m": (0.125e9, 8 * 5_120 * 256 * 2048),
    "350m": (350e6, 20 * 354e6),  # ours: 20 tokens for each parameter
    "1.3b": (1.32e9, 8 * 24_800 * 512 * 2048),
    "3b": (2.65e9, 8 * 51_500 * 512 * 2048),
    "7b": (6.66e9, 8 * 63_900 * 1024 * 2048),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_and_the_papers_are_the_papers(recipe):
    config = load_run_config(recipe)
    names = ["eu.a", "eu.b", "us.a", "us.b"] if config.federation.branches else list("abcdefgh")
    found = plan(
        with_branches(config, names),
        dict.fromkeys(names, 1),
        vocab_size=50_368,
        bytes_per_s=GBIT,
        steps_per_s=1.0,
    )
    assert found["memory_bytes"] > 12 * found["parameters"]  # weights, gradients, a moment
    assert found["wall_s"] > found["train_s"] > 0
    parameters, tokens = PUBLISHED.get(recipe.stem, (None, None))
    if tokens is not None:
        assert found["parameters"] == pytest.approx(parameters, rel=0.02)
        assert 8 * found["tokens_per_silo"] == pytest.approx(tokens, rel=0.01)
        assert config.run.name == config.model.preset == recipe.stem


def test_every_size_of_the_paper_has_a_recipe():
    assert PUBLISHED.keys() <= {recipe.stem for recipe in RECIPES}


TREE = (
    "eval.every=0",
    "eval.max_tokens=300",
    "federation.rounds=2",
    "link.update_codec=int8",
    'federation.children.west={silos=["a"], rounds=2, update_codec="bf16"}',
    'federation.children.west.children.coast={silos=["b", "c"], rounds=2}',
)


AT_ONCE = [(2, 2, 4), (2, 4, 2), (2, 8, 1)]
IN_TURN = ("federation.levels=in_turn", "federation.children.west.levels=in_turn")
SAMPLED = "federation.children.west.children.coast.sample=1"


@pytest.mark.parametrize(
    ("more", "levels"),
    [
        ((), AT_ONCE),
        (("federation.optimizer_state=average",), AT_ONCE),
        ((*IN_TURN, SAMPLED), [(1, 2, 4), (1, 2, 2), (1, 2, 1)]),
    ],
)
def test_bytes_of_each_level_are_those_of_a_run(more, levels, prepare_text, make_config, tmp_path):
    data = prepare_text(tmp_path / "text", dict.fromkeys("abcd", 6))
    config = make_config(data, *TREE, *more)
    opened = open_data(data)
    found = plan(
        config, dict.fromkeys(opened.silos, 1), vocab_size=opened.vocab_size, bytes_per_s=GBIT
    )
    root, west, coast = found["levels"]
    assert [(one["members"], one["rounds"], one["steps"]) for one in found["levels"]] == levels
    ran = simulate(config, run_dir=tmp_path / "run").summary
    assert root["bytes"] == pytest.approx(ran["bytes_up"] + ran["bytes_down"], rel=0.03)
    assert west["bytes"] + coast["bytes"] == pytest.approx(ran["bytes_inside"], rel=0.03)
    # From the root through west to coast, each over a link of its own.
    assert found["link_s"] == pytest.approx(found["bytes"] / GBIT)


def test_the_command_needs_no_text(make_config, tmp_path):
    file = tmp_path / "run.toml"
    config = make_config(tmp_path / "nowhere", "link.update_codec=int8", preset="tiny")
    write_resolved(config, file)

    def told(*more):
        return CliRunner().invoke(app, ["plan", str(file), *more])

    refused = told()
    assert refused.exit_code == 10
    assert "--silos N" in refused.output
    few, many = (json.loads(told("--silos", n, "--json").output) for n in ("2", "4"))
    assert many["bytes"] == 2 * few["bytes"]
    assert "bottleneck" not in few
    # A quarter of the bytes up, as int8; all of them down.
    (level,) = few["levels"]
    assert level["bytes_up"] == pytest.approx(level["bytes_down"] / 4, rel=0.05)
    shown = told("--silos", "2", "--steps-per-s", "1000", "--mbit", "1").output
    assert "bound by link" in shown
