"""A finished run with cards, and a copy of it whose cards and data a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from made_cards import tree

from photon.cards.folder import data_card_of, read_card, write_cards
from photon.runs import simulate


@pytest.fixture(scope="module")
def finished(three_silos: Path, make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `run` and `data` in it; nobody has answered anything."""
    folder = tmp_path_factory.mktemp("forms")
    shutil.copytree(three_silos, folder / "data")
    config = make_config(
        folder / "data", "federation.rounds=1", "local.steps=2", "eval.max_tokens=200"
    )
    simulate(config, run_dir=folder / "run")
    write_cards(folder / "run")
    return folder


def copy(folder: Path, to: Path) -> Path:
    """The run folder of a copy of `run` and `data`."""
    shutil.copytree(folder / "data", to / "data")
    shutil.copytree(folder / "run", to / "run")
    resolved = to / "run" / "config.resolved.toml"
    text = resolved.read_text().replace(str(folder / "data"), str(to / "data"))
    resolved.write_text(text)
    return to / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The run folder, with data of its own."""
    return copy(finished, tmp_path)


@pytest.fixture(scope="module")
def kept(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with answers, a licence that is known and of a silo one that is not: only to read."""
    run = copy(finished, tmp_path_factory.mktemp("kept"))
    whole = tree(("blue", "green", "red"))
    whole["project"]["entities"] = whole["entity"]
    whole["model"]["round-8"]["about"] |= {"licence": "apache-2.0", "provider": "Consortium"}
    for silo, card in whole["data"].items():
        card["about"] |= {"languages": ["en", "fr"], "sources": ["own"], "obtained": "by hand"}
        card["about"]["licence"] = "MIT" if silo == "red" else f"terms of {silo}"
    cards = {run / "cards/project.toml": ("project", whole["project"])}
    cards[run / "cards/models/round-1.toml"] = ("model", whole["model"]["round-8"])
    cards |= {data_card_of(run, silo): ("data", card) for silo, card in whole["data"].items()}
    for path, (kind, answers) in cards.items():
        facts = read_card(path, kind).model_dump(exclude_none=True)["facts"]
        path.write_text(tomli_w.dumps(answers | {"facts": facts}))
    return run


@pytest.fixture
def answered(kept: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return copy(kept.parent, tmp_path)
