"""A Flower federation that carries Photon's letters.

PHOTON_FLOWER says where Flower's programs are; `make flower` sets it, for each version in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import photon.flower
from deployment.flower import Flower

PROGRAMS = Path(os.environ.get("PHOTON_FLOWER", "/nowhere"))
needs_flower = pytest.mark.skipif(
    not (PROGRAMS / "flwr").exists(), reason="needs Flower's programs: `make flower` has them"
)


class Bridged(Flower):
    """A SuperLink, a SuperNode beside each of some nodes, and Photon's app, at work.

    Args:
        home: serve.home.
        sites: homes of nodes, by name.
    """

    def __init__(self, folder: Path, home: Path, sites: Mapping[str, Path]) -> None:
        super().__init__(folder, PROGRAMS)
        self._home = home
        self._sites = sites

    def __enter__(self) -> Bridged:
        self.begin()
        return self

    def begin(self) -> None:
        self.superlink()
        for name, home in self._sites.items():
            self.join(name, home)
        app = Path(photon.flower.__file__).with_name("app")
        assert (trouble := self.submit(app, f'home="{self._home}"')) == "", trouble

    def join(self, name: str, home: Path) -> None:
        self.node(name, "--node-config", f'photon-home="{home}"')

    def await_log(self, name: str, words: str) -> None:
        """Until a program's log has some words."""
        deadline = time.monotonic() + 120
        while words not in self.log(name):
            assert time.monotonic() < deadline, f"no {words!r} in {self.log(name)[-3000:]}"
            time.sleep(0.2)
