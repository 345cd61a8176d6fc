"""Inner optimizers and their state by parameter name, so that it can be kept, moved or averaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from photon.config import LocalConfig
from photon.errors import ModelMismatchError
from photon.models import hidden_matrices, trainable_parameters
from photon.training.muon import Fp32Muon


class InnerOptimizer:
    """AdamW, Muon + AdamW, or SGD over a model's trainable parameters.

    Matrices are decayed; vectors (norms, biases) are not. State tensors are named
    "<parameter>.<key>", for instance "lm_head.weight.exp_avg"; step counters are 0-d fp32.

    Args:
        model: on its device already.
        config: the [local] table.
    """

    def __init__(self, model: nn.Module, config: LocalConfig) -> None:
        self.parameters: dict[str, nn.Parameter] = trainable_parameters(model)
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.parameters.items()
        }
        self._optimizers = _build(model, self.parameters, config)
        for group in self._groups():
            group["peak_lr"] = group["lr"]

    def step(self, lr_factor: float) -> None:
        """One step at `lr_factor` times each group's peak learning rate."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * lr_factor
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def reset(self) -> None:
        """Forget all state, as if no step had been taken."""
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """References to the state (not copies), by "<parameter>.<key>"."""
        return {
            f"{self._names[parameter]}.{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def initial_state(self) -> dict[str, Tensor]:
        """Zeros for all that the aggregator may average; loading them equals a reset."""
        return {
            f"{self._names[parameter]}.{key}": torch.zeros_like(parameter, requires_grad=False)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            for key in _averaged_keys(optimizer)
        }

    def load_state_tensors(
        self, tensors: Mapping[str, Tensor], *, steps_taken: int | None = None
    ) -> None:
        """Replace the state with copies of `tensors`; an empty mapping resets.

        Args:
            tensors: as `state_tensors` names them.
            steps_taken: sets every step counter; for state that came without counters (averaged
                by the aggregator, whose clock they then follow).

        Raises:
            ModelMismatchError: a name or shape that this model and optimizer do not have.
        """
        self.reset()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._load_one(optimizer, parameter, tensors, steps_taken)
        unknown = sorted(set(tensors) - set(self.state_tensors()))
        if unknown:
            raise ModelMismatchError(
                f"inner-optimizer state holds {unknown[0]!r}, which this model and optimizer lack"
            )

    def _load_one(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        tensors: Mapping[str, Tensor],
        steps_taken: int | None,
    ) -> None:
        name = self._names[parameter]
        for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
            value = tensors.get(f"{name}.{key}")
            if value is None:
                continue
            if value.ndim and value.shape != parameter.shape:
                raise ModelMismatchError(
                    f"inner-optimizer state {name}.{key} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
            optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
        if steps_taken is not None and "exp_avg" in optimizer.state[parameter]:
            optimizer.state[parameter]["step"] = torch.tensor(
                float(steps_taken), device=parameter.device
            )
        if not optimizer.state[parameter]:
            del optimizer.state[parameter]

    def _groups(self) -> list[dict]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def _averaged_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ()


def _build(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], config: LocalConfig
) -> list[torch.optim.Optimizer]:
    if config.optimizer == "sgd":
        return [
            torch.optim.SGD(
                parameters.values(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
            )
        ]
    hidden = set(hidden_matrices(model)) if config.optimizer == "muon" else set()
    optimizers: list[torch.optim.Optimizer] = []
    matrices = [parameters[name] for name in parameters if name in hidden]
    if matrices:
        kind = Fp32Muon if matrices[0].device.type == "cpu" else torch.optim.Muon
        optimizers.append(
            kind(
                matrices,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                # Same update size as AdamW's, so one learning rate serves both groups.
                adjust_lr_fn="match_rms_adamw",
            )
        )
    rest = {name: parameter for name, parameter in parameters.items() if name not in hidden}
    decayed = [parameter for parameter in rest.values() if parameter.ndim >= 2]
    plain = [parameter for parameter in rest.values() if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers.append(
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.beta1, 0.95 if config.beta2 is None else config.beta2),
            eps=config.epsilon or 1e-8,
            fused=True,
        )
    )
    return optimizers
