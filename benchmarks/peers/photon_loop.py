"""Photon's Trainer on its own stream: what a node does between two rounds."""

from __future__ import annotations

from torch import nn

from peers.turns import Turns, Work, parameter_count
from photon.config import RunConfig, parse_run_config
from photon.data import open_data, open_stream
from photon.federation.layout import initial_model
from photon.training import Schedule, Trainer, plan_compute


def run_config(work: Work) -> RunConfig:
    """The same work as a run file says it."""
    return parse_run_config(
        {
            "model": {"path": work.model, "init": "pretrained"},
            "data": {
                "path": work.data,
                "sequence_length": work.sequence_length,
                "verify": False,
            },
            "local": {
                "steps": work.total_steps,
                "batch_size": work.batch_size,
                "optimizer": "adamw",
                "lr": work.lr,
                "beta1": work.beta1,
                "beta2": work.beta2,
                "epsilon": work.epsilon,
                "weight_decay": work.weight_decay,
                "clip_norm": work.clip_norm,
            },
            "compute": {
                "device": work.device,
                "precision": work.precision,
                "threads": work.threads,
                # The others compile the whole model, too.
                "compile": {None: "auto", True: "whole", False: "off"}[work.compile],
            },
            "federation": {"rounds": 1},
        }
    )


def make_trainer(config: RunConfig, model: nn.Module, steps: int) -> Trainer:
    """The Trainer with a constant learning rate."""
    return Trainer(model, config.local, Schedule("constant", steps), plan_compute(config.compute))


def main() -> None:
    work = Work.from_command_line()
    turns = Turns(work, "transformers, photon's training and data")
    config = run_config(work)
    data = open_data(config.data.path)
    model = initial_model(config, data)
    turns.parameters = parameter_count(model)
    trainer = make_trainer(config, model, work.total_steps)
    step = cursor = 0
    with open_stream(config, data, sorted(data.silos)) as stream:
        while True:
            steps = turns.wait()
            result = trainer.fit(stream, cursor=cursor, global_step=step, steps=steps)
            turns.first_loss(result.first_loss)
            turns.last_loss = result.last_loss
            turns.finished()
            cursor, step = result.cursor, step + steps


if __name__ == "__main__":
    main()
