"""The real object store, started once for the tests of this folder."""

from __future__ import annotations

import pytest
from seaweed import seaweed

__all__ = ["prefix", "seaweed"]


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A folder in the bucket that no other test writes to."""
    return "t" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
