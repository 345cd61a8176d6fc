"""Silos in this process that have done round 1, and a remote engine over them."""

from __future__ import annotations

import pytest
from remote_bench import Bench, Federated, hashes

from photon.engines.remote import errand


@pytest.fixture(scope="module")
def calm(three_silos, make_config, tmp_path_factory):
    """Silos that have done round 1: asked again they answer from their disks."""
    config = make_config(three_silos, "local.steps=2", "run.log_every=1")
    federated = Federated(config, tmp_path_factory.mktemp("calm"))
    federated.expected = hashes(federated.local, federated.tasks(), federated.version)
    yield federated
    federated.local.close()


@pytest.fixture
def remake(make_config):
    return lambda data, *more: make_config(data, "local.steps=2", "run.log_every=1", *more)


@pytest.fixture
def make_bench(calm, tmp_path, remake, monkeypatch):
    # The first pause of a task that is asked again stays as it is: one second.
    monkeypatch.setattr(errand, "_LAST_PAUSE_S", 0.05)
    made = []

    def make(*overrides: str) -> Bench:
        made.append(Bench(calm, tmp_path, *overrides, remake=remake))
        return made[-1]

    yield make
    for bench in made:
        bench.roster.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()
