"""Federations whose children are written in files of their own."""

import json

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_run_config, resolved_toml
from photon.config.baselines import METHODS, as_method
from photon.config.children import check_served, lets_residuals
from photon.errors import ConfigError, IncompatibleConfigError, InvalidValueError, UnknownKeyError

RUN = """
model.preset = "tiny"
data.path = "nowhere"
[federation]
rounds = 2
[federation.children.eu]
file = "eu/federation.toml"
[federation.children.us]
silos = ["boston"]
[local]
steps = 8
"""
EU = """
silos = ["paris"]
rounds = 2
outer = { name = "nesterov" }
privacy = { mechanism = "client", clip_norm = 0.5, noise_multiplier = 0.01 }
update_privacy = { mechanism = "client", clip_norm = 1, noise_multiplier = 0 }
[children.nordics]
file = "nordics.toml"
"""
NORDICS = 'silos = ["oslo", "bergen"]\nrounds = 4\nsample = 1\n'


@pytest.fixture
def write(tmp_path):
    def write(run=RUN, eu=EU, nordics=NORDICS):
        (tmp_path / "eu").mkdir(exist_ok=True)
        for name, text in {
            "run.toml": run,
            "eu/federation.toml": eu,
            "eu/nordics.toml": nordics,
        }.items():
            (tmp_path / name).write_text(text)
        return tmp_path / "run.toml"

    return write


def test_each_owner_writes_its_own_part(write):
    children = load_run_config(write()).federation.children
    eu, nordics = children["eu"], children["eu"].children["nordics"]
    assert (eu.rounds, eu.outer.name, eu.silos) == (2, "nesterov", ["paris"])
    assert (nordics.rounds, nordics.silos) == (4, ["oslo", "bergen"])
    assert (eu.written_in, nordics.written_in) == ("eu/federation.toml", "nordics.toml")
    assert children["us"].written_in is None


def test_the_resolved_file_needs_the_others_no_more(write, tmp_path):
    config = load_run_config(write())
    (tmp_path / "eu/federation.toml").unlink()
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(resolved_toml(config))
    assert load_run_config(resolved) == config


MISTAKES = [
    ({"run": RUN.replace('toml"', 'toml"\nrounds = 3', 1)}, IncompatibleConfigError, "and rounds"),
    ({"nordics": NORDICS + "[children.eu]\nfile='federation.toml'"}, ConfigError, "inside itself"),
    ({"nordics": "silo = ['oslo']"}, UnknownKeyError, "nordics.toml: unknown key 'silo'"),
    ({"eu": EU.replace("= 2", "= 'two'")}, InvalidValueError, "federation.toml: rounds = 'two'"),
    ({"nordics": NORDICS + "[model]\npreset = '75m'"}, UnknownKeyError, "unknown key 'model'"),
    ({"eu": "children = 3"}, InvalidValueError, "children"),
    ({"eu": EU.replace("nordics.toml", "gone.toml")}, ConfigError, "no file of a federation at"),
    ({"nordics": "silos = ['boston']\nrounds = 4"}, IncompatibleConfigError, "in two places"),
    ({"nordics": "silos = ['oslo']\nrounds = 3"}, IncompatibleConfigError, "needs one clock"),
]


@pytest.mark.parametrize(("files", "error", "words"), MISTAKES)
def test_what_is_wrong_is_told_by_file(files, error, words, write):
    with pytest.raises(error, match=words):
        load_run_config(write(**files))


def test_nobody_overrides_what_another_wrote(write):
    path = write()
    for override in ("federation.children.eu.rounds=4", "federation.children.eu={silos=['paris']}"):
        with pytest.raises(IncompatibleConfigError, match=r"its owner's to change"):
            load_run_config(path, [override])
    inner = "federation.children.eu.children.nordics.rounds=1"
    with pytest.raises(IncompatibleConfigError, match=r"children\.eu is written in"):
        load_run_config(path, [inner])
    config = load_run_config(path, ["federation.children.us.weighting=equal"])
    assert config.federation.children["us"].weighting == "equal"


def test_the_tree_says_who_decides_what(write):
    out = CliRunner().invoke(app, ["tree", str(write())], env={"COLUMNS": "120"}).output
    lines = [line.strip("│├└─ ") for line in out.splitlines()]
    assert any(one.startswith("eu: 2 rounds of 4 steps, mean, nesterov") for one in lines)
    assert any(
        "(nordics.toml)" in one and "4 rounds of 1 steps, 1 drawn (uniform)" in one for one in lines
    )
    assert "oslo" in lines
    noise = "silos: clip 0.5, noise 0.01"
    assert f"{noise}, its own: clip 1, noise 0 (eu/federation.toml)" in " ".join(lines)
    assert f"{noise} (nordics.toml)" in " ".join(lines)
    told = json.loads(CliRunner().invoke(app, ["tree", str(write()), "--json"]).output)
    assert [one["name"] for one in told["members"]] == ["eu", "us"]
    assert told["members"][0]["members"][0]["written_in"] == "nordics.toml"


LAW = """
[parts]
key = ["last:0.3"]
key_rule = "attention"
[federation.policy]
jurisdiction = "UN"
residuals = "both"
"""
OWN_LAW = """
[children.nordics]
file = "nordics.toml"
[policy]
jurisdiction = "EU"
never_with = ["US", "CN"]
"""


def test_what_a_policy_leaves_open_is_as_above_and_what_it_says_is_its_owners(write):
    eu = EU.partition("[children")[0] + OWN_LAW
    path = write(RUN + LAW, eu, NORDICS + 'policy = { residuals = "none" }\n')
    out = CliRunner().invoke(app, ["tree", str(path)], env={"COLUMNS": "250"}).output
    lines = [line.strip("│├└─ ") for line in out.splitlines()]
    for start, words in {
        "run:": ", jurisdiction UN, residuals both (",
        "eu:": ", jurisdiction EU, residuals both, never with US CN (",
        "nordics:": ", jurisdiction EU, residuals none, never with US CN (",
        "us:": ", jurisdiction UN, residuals both (",
    }.items():
        assert any(one.startswith(start) and words in one for one in lines), (start, lines)
    with pytest.raises(IncompatibleConfigError, match=r"children\.eu is written in"):
        load_run_config(path, ["federation.children.eu.policy.never_with=[]"])
    with pytest.raises(
        IncompatibleConfigError, match=r"eu\.policy: residuals = \"both\" has no way"
    ):
        load_run_config(path, ["federation.policy.jurisdiction=US"])


def test_residuals_are_refused_where_there_are_none_yet(write):
    path = write(RUN + LAW)
    with pytest.raises(IncompatibleConfigError, match="a deployed tree has no residuals yet"):
        check_served(load_run_config(path))
    check_served(load_run_config(write()))


def test_what_a_tree_is_held_against_has_no_residuals(write):
    eu = 'silos = ["paris"]\n[policy]\njurisdiction = "EU"\nresiduals = "out"\n'
    config = load_run_config(write(RUN + LAW, eu))
    assert as_method(config).federation.children["eu"].policy.residuals == "out"
    for name in METHODS:
        assert not lets_residuals(as_method(config, name)), name
