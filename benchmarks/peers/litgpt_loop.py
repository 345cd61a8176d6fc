"""litgpt's pretraining: `litgpt.pretrain.main` and its loop `fit`, held between steps by its data.

Its own GPT, Fabric and loop; the weights are converted from the same initial ones by litgpt's own
converter, so the first losses can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Fabric
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset

from peers.turns import Turns, Work, parameter_count


class Batches(IterableDataset):
    """Windows in batches; with `turns`, asking for the next batch says that a step is done."""

    def __init__(self, work: Work, turns: Turns | None) -> None:
        self._windows = np.load(work.windows, mmap_mode="r")
        self._size = work.batch_size
        self._turns = turns

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self._windows) - self._size + 1, self._size):
            if self._turns is not None:
                if start:
                    self._turns.step_done()
                else:
                    self._turns.wait()
            yield torch.from_numpy(self._windows[start : start + self._size].astype(np.int64))


class Windows(DataModule):
    def __init__(self, work: Work, turns: Turns) -> None:
        super().__init__()
        self._work = work
        self._turns = turns

    def connect(self, *args: Any, **kwargs: Any) -> None: ...

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self._work, self._turns), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        # `fit` checks two batches before it starts; never again, with the interval below.
        return DataLoader(Batches(self._work, None), batch_size=None)


def same_shape(hf: dict[str, Any]) -> Config:
    """litgpt's description of the llama that a Hugging Face config.json describes."""
    return Config(
        name="same-shape",
        block_size=hf["max_position_embeddings"],
        n_layer=hf["num_hidden_layers"],
        n_embd=hf["hidden_size"],
        n_head=hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        intermediate_size=hf["intermediate_size"],
        norm_class_name="RMSNorm",
        norm_eps=hf["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )


def convert(work: Work, config: Config) -> Path:
    """The initial weights as litgpt reads them; a folder."""
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(Path(work.model) / "model.safetensors"))
    folder = Path(work.scratch) / "initial"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "lit_model.pth")
    return folder


def record(turns: Turns) -> None:
    """Leave losses and the parameter count where they can be compared; the loop stays litgpt's."""
    cross_entropy, load_weights = pretrain.chunked_cross_entropy, Fabric.load_raw

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = cross_entropy(*args, **kwargs)
        turns.last_loss = loss.detach()
        return loss

    def counted(self: Fabric, path: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
        load_weights(self, path, obj, *args, **kwargs)
        turns.parameters = parameter_count(obj)

    pretrain.chunked_cross_entropy = recorded
    Fabric.load_raw = counted


def main() -> None:
    work = Work.from_command_line()
    turns = Turns(work, "lightning and litgpt")
    torch.set_num_threads(work.threads)
    if work.compile is False:
        torch.compiler.set_stance("force_eager")
    config = same_shape(json.loads((Path(work.model) / "config.json").read_text(encoding="utf-8")))
    initial = convert(work, config)
    record(turns)
    fabric = Fabric(
        accelerator=work.device,
        devices=1,
        precision="bf16-mixed" if work.precision == "bf16" else "32-true",
    )
    fabric.launch()
    never = work.total_steps + 1
    pretrain.main(
        fabric=fabric,
        devices=1,
        seed=work.seed,
        initial_checkpoint_dir=initial,
        resume=False,
        config=config,
        data=Windows(work, turns),
        out_dir=Path(work.scratch) / "out",
        tokenizer_dir=None,
        tokenizer=None,
        train=TrainArgs(
            save_interval=None,
            log_interval=never,
            global_batch_size=work.batch_size,
            micro_batch_size=work.batch_size,
            max_tokens=never * work.batch_size * work.sequence_length,
            max_norm=work.clip_norm,
            # Its schedule ends at min_lr: the peak itself makes it constant.
            min_lr=work.lr,
            lr_warmup_steps=0,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=never, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": work.lr,
                "betas": (work.beta1, work.beta2),
                "eps": work.epsilon,
                "weight_decay": work.weight_decay,
                # litgpt itself fuses on CUDA only; here everyone does everywhere.
                "fused": True,
            },
        },
    )


if __name__ == "__main__":
    main()
