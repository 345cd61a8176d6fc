"""transformers.Trainer (on accelerate), held between steps by a callback."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peers.turns import Turns, Work, parameter_count


class Windows(Dataset):
    """One window a sample; labels are shifted already, so L tokens give L predictions."""

    def __init__(self, path: str) -> None:
        self._windows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self._windows[index].astype(np.int64))
        # With shift_labels given, labels only say that a loss is wanted.
        return {"input_ids": window[:-1], "labels": window[1:], "shift_labels": window[1:]}


class OneAtATime(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turns.step_done()


class RecordingTrainer(Trainer):
    """The Trainer as it is; it only leaves its loss where it can be compared."""

    turns: Turns

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.turns.last_loss = loss.detach()
        return loss


def main() -> None:
    work = Work.from_command_line()
    turns = Turns(work, "transformers and accelerate")
    torch.set_num_threads(work.threads)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    model.config.use_cache = False
    turns.parameters = parameter_count(model)
    arguments = TrainingArguments(
        output_dir=work.scratch,
        max_steps=work.total_steps,
        per_device_train_batch_size=work.batch_size,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=work.lr,
        adam_beta1=work.beta1,
        adam_beta2=work.beta2,
        adam_epsilon=work.epsilon,
        weight_decay=work.weight_decay,
        max_grad_norm=work.clip_norm,
        lr_scheduler_type="constant",
        bf16=work.precision == "bf16",
        use_cpu=work.device == "cpu",
        torch_compile=bool(work.compile),
        dataloader_pin_memory=work.device == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=work.seed,
    )
    trainer = RecordingTrainer(
        model=model,
        args=arguments,
        train_dataset=Windows(work.windows),
        callbacks=[OneAtATime(turns)],
    )
    trainer.turns = turns
    trainer.train()


if __name__ == "__main__":
    main()
