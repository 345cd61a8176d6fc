"""A desk with a roster, and a certificate authority."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from member_desk import Aggregator, fake_store
from seaweed import seaweed
from tls_door import Authority

__all__ = ["aggregator", "authority", "seaweed"]


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    made = Aggregator(tmp_path, fake_store())
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.made(tmp_path_factory.mktemp("ca"), "photon")
