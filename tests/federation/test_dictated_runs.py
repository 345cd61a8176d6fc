"""What a run dictates to a site, and what it can not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from envelope_documents import SITE, VALUES, ask, paths, put, run_part
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.config import load_run_config
from photon.errors import ConfigError, ProtocolError
from photon.federation.envelopes import dictated, encoded, node_config, parse_ask

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.fixture
def config(make_config):
    return make_config(
        Path("/aggregators/own"),
        "compute.threads=7",
        'serve.silos=["red"]',
        "train.batch_size=64",
        "federation.silence_s=5",
        'link.update_codec="int8"',
    )


def test_the_aggregators_own_is_not_sent(config):
    tree = dictated(config)
    assert not {"compute", "serve", "train"} & set(tree)
    assert "path" not in tree["data"]
    assert "/aggregators/own" not in json.dumps(tree)


def test_a_site_takes_the_maths_of_the_run_and_its_own_machine(config):
    found = node_config(run_part(dictated(config)), SITE)
    assert found.data.path == "/its/own"
    assert found.compute.threads == 3
    assert found.serve.silos == []
    for table in ("run", "model", "federation", "local", "outer", "link", "eval"):
        assert getattr(found, table) == getattr(config, table), table
    assert dictated(found) == dictated(config)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("compute",), {"threads": 64}, "compute"),
        (("compute",), {}, "compute"),
        (("serve",), {"home": "/"}, "serve"),
        (("train",), {"batch_size": 1}, "train"),
        (("plugins",), {}, "plugins"),
        (("data", "path"), "/etc", "data.path"),
        (("data",), [], "data.path"),
        (("data",), "x", "data.path"),
    ],
)
def test_a_run_can_not_dictate_what_is_the_sites(path, value, words, config):
    run = run_part(put(dictated(config), path, value))
    with pytest.raises(ProtocolError, match="which is the site's to decide") as caught:
        node_config(run, SITE)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("local", "steps"), "many"),
        (("local", "unknown"), 1),
        (("nonsense",), {"a": 1}),
        (("federation",), 5),
        (("model",), None),
    ],
)
def test_a_run_that_is_none_is_refused_as_a_run_file(path, value, config):
    with pytest.raises(ConfigError):
        node_config(run_part(put(dictated(config), path, value)), SITE)


@settings(max_examples=60)
@given(data=st.data(), value=VALUES)
def test_any_config_is_a_run_file_or_none(data, value):
    tree = dictated(load_run_config(RECIPES[0]))
    places = [path for path in paths(tree) if path]
    run = run_part(put(tree, data.draw(st.sampled_from(places)), value))
    try:
        found = node_config(run, SITE)
    except (ConfigError, ProtocolError):
        return
    assert found.data.path == "/its/own"
    assert found.compute.threads == 3


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_keeps_its_maths_on_a_site(recipe):
    config = load_run_config(recipe)
    # What groups others are in is none of a silo's business.
    config = config.having(federation={"branches": None})
    question = ask(run=run_part(dictated(config)))
    found = node_config(parse_ask(encoded(question)).run, SITE)
    assert dictated(found) == dictated(config)
    for table in type(config).model_fields:
        if table not in ("compute", "serve", "train", "data"):
            assert getattr(found, table) == getattr(config, table), table
    assert found.data == config.data.model_copy(update={"path": "/its/own"})


def test_no_run_says_what_groups_others_are_in():
    """Or all but one member could be told to clip to nothing, under masks that hide it."""
    config = dictated(load_run_config(RECIPES[0]))
    config["federation"]["children"] = {"g": {"silos": ["red", "blue"]}}
    with pytest.raises(ProtocolError, match="what groups others are in"):
        node_config(parse_ask(encoded(ask(run=run_part(config)))).run, SITE)
