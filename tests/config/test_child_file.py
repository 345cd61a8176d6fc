"""The file of a federation inside another: for its parent, and for its own aggregator."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.cli.main import app
from photon.config import load_run_config, load_served, resolved_toml
from photon.config.children import check_served
from photon.data import open_data
from photon.deploy.join import keep_invitation
from photon.errors import IncompatibleConfigError, UnknownKeyError

EU = """
silos = ["paris", "rome"]
rounds = 4
quorum = 2
[children.nordics]
file = "nordics.toml"
[serve]
host = "eu.example.org"
home = "eu-server"
"""
WORLD = """
model.preset = "tiny"
data.path = "nowhere"
[federation.children.eu]
file = "eu.toml"
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "eu.toml").write_text(EU)
    (tmp_path / "nordics.toml").write_text('silos = ["oslo"]\nrounds = 2\n[serve]\nmin_silos = 9\n')
    (tmp_path / "world.toml").write_text(WORLD)
    return tmp_path


def test_parent_and_aggregator_read_the_same_file(files):
    own = load_served(files / "eu.toml", Path("/site/node.toml"), ["serve.min_silos=3"])
    above = load_run_config(files / "world.toml")
    assert own.serve.child is not None
    assert own.serve.child == above.federation.children["eu"].model_copy(
        update={"written_in": own.serve.child.written_in}
    )
    assert own.serve.silos == ["paris", "rome", "nordics"]
    assert (own.run.name, own.serve.host, own.silos_needed) == ("eu", "eu.example.org", 3)
    assert (own.serve.parent, own.data.path) == ("/site/node.toml", "eu-server/parent")
    again = files / "serve.toml"
    again.write_text(resolved_toml(own))
    assert load_run_config(again) == own
    check_served(above)


def test_what_cannot_be_served(files):
    (files / "nobody.toml").write_text("rounds = 2\n")
    with pytest.raises(IncompatibleConfigError, match="no members"):
        load_served(files / "nobody.toml", Path("node.toml"))
    (files / "eu.toml").write_text(EU.replace("quorum", "quorm"))
    with pytest.raises(UnknownKeyError, match="quorm"):
        load_served(files / "eu.toml", Path("node.toml"))
    split = WORLD.replace('file = "eu.toml"', "nodes = 2")
    (files / "world.toml").write_text(split)
    with pytest.raises(IncompatibleConfigError, match="nodes"):
        check_served(load_run_config(files / "world.toml"))


def photon(*words: str):
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_members_are_invited_by_the_same_file(files, three_silos, monkeypatch):
    """Where it is served, whom it names, and the tokenizer that came with its own invitation."""
    monkeypatch.chdir(files)
    own = load_served(files / "eu.toml", Path("/site/node.toml"))
    serve = own.serve.model_copy(update={"parent": None})
    assert load_served(files / "eu.toml") == own.model_copy(update={"serve": serve})
    (files / "world.toml").write_text(WORLD.replace("nowhere", str(three_silos)))
    assert load_served(files / "world.toml") == load_run_config(files / "world.toml")
    above = photon("invite", "eu", "--run-file", "world.toml", "--new", "--address", "un.org:443")
    keep_invitation(files / "eu.invitation.toml", Path(own.data.path))
    told = photon("invite", "rome", "--run-file", "eu.toml", "--new")
    assert (told["home"], told["address"]) == ("eu-server", "eu.example.org:8443")
    assert told["tokenizer_sha256"] == open_data(three_silos).tokenizer_sha256
    assert told["tokenizer_carried"]
    assert above["home"] == "photon-server"


def test_it_is_not_served_without_its_parent(files):
    result = CliRunner().invoke(app, ["serve", str(files / "eu.toml")])
    assert isinstance(result.exception, SystemExit | IncompatibleConfigError)
    assert "--parent NODE.toml" in str(getattr(result.exception, "hint", result.output))
