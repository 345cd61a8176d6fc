"""Suite files: Photon's own, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.bench.suite import load_suite, scale_of, suites
from photon.errors import ConfigError, PhotonError

GOOD = """
title = "A"
about = "B"
base = { "model.preset" = "tiny", "local.batch_size" = 2 }
[scales.small]
steps = 8
set = { "local.steps" = 4 }
[methods.ours]
grid = { "local.lr" = [1e-3, 2e-3, 4e-3] }
[methods.pooled]
kind = "centralised"
small_batch = true
[[claims]]
says = "lower"
source = "here"
one = "ours"
other = "pooled"
"""


@pytest.mark.parametrize("name", suites())
def test_those_that_come_with_photon(name: str) -> None:
    suite = load_suite(name)
    assert {"cpu-quick", "cpu"} <= suite.scales.keys()
    for scale in suite.scales:
        for method, told in suite.methods.items():
            silos = suite.scales[scale].silos or 4
            config = suite.config(scale, method, {}, 1, Path("data"), silos)
            together = config.local.batch_size * (config.federation.sample or silos)
            taken = config.total_steps * (config.train.batch_size or together)
            batch = (suite.base | suite.scales[scale].set)["local.batch_size"]
            wanted = suite.scales[scale].steps * silos * batch
            assert taken == wanted, (scale, method)
            assert told.grid


def test_a_small_batch_takes_as_many_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    suite = load_suite(str(tmp_path / "a.toml"))
    config = suite.config("small", "pooled", {}, 3, Path("d"), silos=4)
    assert (config.train.batch_size, config.local.steps, config.run.seed) == (2, 16, 3)
    assert suite.config("small", "ours", {"local.lr": 0.5}, 3, Path("d"), 4).local.lr == 0.5
    half = suite.config("small", "ours", {"local.batch_size": 1.0}, 3, Path("d"), 4)
    assert (half.local.batch_size, half.local.steps, half.federation.rounds) == (1, 8, 2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('one = "ours"', 'one = "mine"', "no method is called 'mine'; there are ours, pooled"),
        ("[1e-3, 2e-3, 4e-3]", "[1e-3, 2e-3]", "three positive values or more, rising"),
        ("[1e-3, 2e-3, 4e-3]", "[2e-3, 1e-3, 4e-3]", "rising"),
        ('"local.lr" =', '"local.rate" =', r"'ours' at scale small: .*local\.rate"),
        ("steps = 8", "steps = 0", r"scales\.small\.steps"),
        ('kind = "centralised"', 'kind = "pooled"', "kind"),
        ('title = "A"', "title = ", "not valid TOML"),
        ("[methods.ours]", '[methods.ours]\ncut = "genres"', "'ours': no cut is called 'genres'"),
        ("[methods.ours]", '[cuts.a]\ntokenizer = "b"\n[methods.ours]', r"cuts\.a\.tokenizer"),
        ('source = "here"', "", r"claims\.0\.source"),
    ],
)
def test_faults_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        load_suite(str(path))


def test_unknown_suites_and_scales(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="no suite is called 'speed'"):
        load_suite("speed")
    with pytest.raises(PhotonError, match=r"no suite at .*gone\.toml"):
        load_suite(str(tmp_path / "gone.toml"))
    with pytest.raises(PhotonError, match="no scale is called 'huge'"):
        scale_of(load_suite("quality"), "huge")
