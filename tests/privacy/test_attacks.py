"""What an aggregator reads of a silo's text out of one round, with privacy off and on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH = 8


@pytest.fixture
def leakage(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("leakage")


def read(leakage: Any, data: Path, scratch: Path, **settings: Any) -> float:
    option = leakage.Option("", {key.replace("__", "."): one for key, one in settings.items()})
    return leakage.inversion(data, option, 1, scratch / "run", LENGTH)


def test_two_sequences_are_read_out_of_a_muon_update(
    leakage: Any, one_silo: Path, tmp_path: Path
) -> None:
    assert read(leakage, one_silo, tmp_path) == 1


def test_a_sum_of_three_hides_whose_they_are_and_not_what(
    leakage: Any, three_silos: Path, tmp_path: Path
) -> None:
    """With so few tokens that a layer's gradient spans less than all: docs/privacy.md."""
    assert read(leakage, three_silos, tmp_path, privacy__secure_aggregation=True) > 0.5


@pytest.mark.parametrize("mechanism", ["client", "dp_sgd"])
def test_noise_leaves_nothing_to_read(
    leakage: Any, one_silo: Path, tmp_path: Path, mechanism: str
) -> None:
    settings = {"privacy__mechanism": mechanism, "privacy__clip_norm": 1.0}
    assert read(leakage, one_silo, tmp_path, **settings, privacy__noise_multiplier=0.05) < 0.2


def test_a_clip_alone_hides_nothing(leakage: Any, one_silo: Path, tmp_path: Path) -> None:
    settings = {"privacy__mechanism": "dp_sgd", "privacy__clip_norm": 1.0}
    assert read(leakage, one_silo, tmp_path, **settings, privacy__noise_multiplier=0.0) == 1
