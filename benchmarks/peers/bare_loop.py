"""A loop written by hand: batch, forward, backward, clip, step.

`--lean` imports torch, numpy and the model; without it also what Photon's trainer and stream
import, so that the difference in memory to Photon is the loop's and not the list of imports'.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from peers.turns import Turns, Work, parameter_count

LEAN = "--lean" in sys.argv
if not LEAN:
    importlib.import_module("photon.federation.node")


def main() -> None:
    work = Work.from_command_line()
    turns = Turns(work, "transformers" if LEAN else "transformers, photon's training and data")
    torch.set_num_threads(work.threads)
    device = torch.device(work.device)
    windows = np.load(work.windows, mmap_mode="r")
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).to(device).train()
    model.config.use_cache = False
    turns.parameters = parameter_count(model)
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": work.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=work.lr, betas=(work.beta1, work.beta2), eps=work.epsilon, fused=True
    )
    forward = torch.compile(model) if work.compile else model

    def step(cursor: int) -> torch.Tensor:
        # A function, so that nothing of a step (its logits) stays alive during the next.
        batch = torch.from_numpy(windows[cursor : cursor + work.batch_size].astype(np.int64))
        batch = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=work.precision == "bf16"):
            logits = forward(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(weights, work.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    cursor = 0
    while True:
        for _ in range(turns.wait()):
            turns.last_loss = step(cursor)
            turns.first_loss(turns.last_loss)
            cursor += work.batch_size
        turns.finished()


if __name__ == "__main__":
    main()
