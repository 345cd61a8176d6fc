"""200 rounds of two steps through one compiled trainer, state swapped each time; prints growth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from photon.config import ComputeConfig, LocalConfig
from photon.training import Schedule, Trainer, plan_compute

ROUNDS, WARM_UP, CLIENTS = 200, 20, 3


class Text:
    def batch(self, start: int, count: int) -> np.ndarray:
        rows = np.arange(start, start + count)[:, None] * 7
        return (rows + np.arange(33)[None, :]) % 250


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    torch.manual_seed(3)
    # Its weights, kept once a round by mistake, would be five times the growth that is allowed.
    shape = LlamaConfig(
        vocab_size=250, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).train()
    # aot_eager captures, partitions and guards as inductor does, and needs no C++ compiler.
    compute = ComputeConfig(
        device="cpu", precision="fp32", threads=1, compile="on", compile_backend="aot_eager"
    )
    trainer = Trainer(
        model,
        LocalConfig(batch_size=4, optimizer="muon", lr=5e-3),
        Schedule("constant", 1000),
        plan_compute(compute),
    )
    weights = {name: weight.clone() for name, weight in trainer.weights().items()}
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(CLIENTS)]
    cursors = [0] * CLIENTS
    compiled_first = rss_warm = 0
    losses: list[float] = []
    compiled = torch._dynamo.utils.counters["stats"]
    for number in range(ROUNDS):
        client = number % CLIENTS
        trainer.load_weights(weights)
        trainer.optimizer.load_state_tensors(states[client])
        result = trainer.fit(Text(), cursor=cursors[client], global_step=2 * number, steps=2)
        cursors[client] = result.cursor
        state = trainer.optimizer.state_tensors()
        states[client] = {name: tensor.clone() for name, tensor in state.items()}
        for name, weight in trainer.weights().items():
            weights[name].copy_(weight)
        with trainer.evaluating() as scored, torch.no_grad():
            # Another shape than training's, as evaluation mostly has.
            scored(input_ids=torch.zeros(3, 20, dtype=torch.int64), use_cache=False)
        losses.append(result.loss)
        if number == 0:
            compiled_first = compiled["unique_graphs"]
        if number + 1 == WARM_UP:
            rss_warm = rss_bytes()
    told = {
        "rounds": len(losses),
        "compiled_first_round": compiled_first,
        "compiled_later": compiled["unique_graphs"] - compiled_first,
        "rss_after_warm_up": rss_warm,
        "rss_end": rss_bytes(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
