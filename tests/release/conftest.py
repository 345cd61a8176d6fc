"""Two releases, of a served run and of a simulated one, made once by the command itself."""

from __future__ import annotations

import json
import shutil

import pytest
from served_in_process import SMALL, Served
from typer.testing import CliRunner

from photon.cli.main import app
from photon.membership.keys import NodeKey
from photon.membership.signing import CARD, sign_document
from photon.runs import simulate


@pytest.fixture(scope="session")
def photon():
    """photon("verify", folder, code=84): the command, and its exit code."""

    def photon(*arguments, code=0):
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == code, result.output
        return result

    return photon


@pytest.fixture(scope="session")
def config(three_silos, make_config):
    return make_config(three_silos, *SMALL)


@pytest.fixture(scope="session")
def served(config, tmp_path_factory):
    """A finished served run, and a data card that blue signed, and one that nobody did."""
    run = Served(config, tmp_path_factory.mktemp("served"))
    run.go_on()
    run.roster.close()
    cards = run.folder / "cards"
    cards.mkdir()
    (cards / "red.toml").write_text('title = "red"\n')
    (cards / "blue.toml").write_text('title = "blue"\n')
    key = run.silos["blue"].key
    signature = sign_document(key, CARD, (cards / "blue.toml").read_bytes())
    signed = {"public_key": key.public_pem, "signature": signature}
    (cards / "blue.toml.sig").write_text(json.dumps(signed))
    return run


@pytest.fixture(scope="session")
def simulated(config, tmp_path_factory):
    """The folder of a finished simulated run."""
    return simulate(config, run_dir=tmp_path_factory.mktemp("simulated") / "run").folder


@pytest.fixture(scope="session")
def releases(photon, served, simulated, tmp_path_factory):
    """By the kind of the run, the folder of its release. Not to be changed: see `copy`."""
    folder = tmp_path_factory.mktemp("releases")
    photon("release", served.folder, "--out", folder / "serve")
    photon("release", simulated, "--out", folder / "simulate", "--key", folder / "our.key")
    return {kind: folder / kind for kind in ("serve", "simulate")}


@pytest.fixture
def copy(releases, tmp_path):
    """copy("serve"): a release to spoil."""
    return lambda kind="serve": shutil.copytree(releases[kind], tmp_path / kind)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    return NodeKey.create(tmp_path_factory.mktemp("stranger") / "key")
