"""The real object store, started once for the tests of this folder."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _seaweed_class() -> Any:
    spec = importlib.util.spec_from_file_location("seaweed", Path(__file__).with_name("seaweed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Seaweed


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Any]:
    """A running SeaweedFS with a bucket (tests/link/seaweed.py). Tests use a prefix each."""
    # Not pytest's folder: paths of unix sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="photon-seaweed-"))
    weed = _seaweed_class()(folder)
    try:
        weed.start()
        yield weed
    finally:
        weed.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A folder in the bucket that no other test writes to."""
    return "t" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
