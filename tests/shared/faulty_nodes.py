"""Nodes in this process: they fail once, where a test says so, and what they are asked is noted."""

import torch

from photon.engines.local import LocalEngine
from photon.federation import FitTask


def faulty(monkeypatch, silo, number, act):
    """Has `act` done to one silo's trainer before its steps of one (inner) round, once."""
    build, fired = LocalEngine.__init__, []

    def hook(task, trainer):
        if (task.silo, task.round) == (silo, number) and not fired:
            fired.append(task)
            act(trainer)

    def with_fault(self, node):
        node._fault = hook
        build(self, node)

    monkeypatch.setattr(LocalEngine, "__init__", with_fault)
    return fired


def fail(trainer):
    raise RuntimeError("killed")


def poison(trainer):
    with torch.no_grad():
        next(iter(trainer.optimizer.parameters.values())).view(-1)[0] = torch.nan


def tasks_of(monkeypatch):
    """Notes every task that a node is given."""
    tasks, submit = [], LocalEngine.submit

    def noted(self, task, version):
        if isinstance(task, FitTask):
            tasks.append(task)
        submit(self, task, version)

    monkeypatch.setattr(LocalEngine, "submit", noted)
    return tasks
