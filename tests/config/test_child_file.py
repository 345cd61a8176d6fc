"""The file of a federation inside another: for its parent, and for its own aggregator."""

from pathlib import Path

import pytest

from photon.config import load_child, load_run_config, resolved_toml
from photon.config.children import check_served
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
    own = load_child(files / "eu.toml", Path("/site/node.toml"), ["serve.min_silos=3"])
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
        load_child(files / "nobody.toml", Path("node.toml"))
    (files / "eu.toml").write_text(EU.replace("quorum", "quorm"))
    with pytest.raises(UnknownKeyError, match="quorm"):
        load_child(files / "eu.toml", Path("node.toml"))
    split = WORLD.replace('file = "eu.toml"', "nodes = 2")
    (files / "world.toml").write_text(split)
    with pytest.raises(IncompatibleConfigError, match="nodes"):
        check_served(load_run_config(files / "world.toml"))
