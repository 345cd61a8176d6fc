"""Nodes in this process that fail once, where a test says so."""

import torch

from photon.engines.local import LocalEngine


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
