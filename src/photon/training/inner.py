"""Inner optimizers and their state by parameter name, so that it can be kept, moved or averaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from photon.config import LocalConfig
from photon.errors import IncompatibleConfigError, ModelMismatchError, some
from photon.models import hidden_matrices, trainable_parameters
from photon.training.eight_bit import EightBitAdamW
from photon.training.elementwise import Adopt, Amsgrad, Elementwise
from photon.training.local_tensors import copy_as
from photon.training.muon import ROW_MOMENT, Muon, NorMuon, rows_of


@dataclass(frozen=True)
class _State:
    """What an optimizer keeps of a parameter.

    Attributes:
        averaged: keys the aggregator may average; all or none are there.
        derived: (key, the averaged key it starts as where a state lacks it); never averaged.
        counts: whether there is a "step" counter.
    """

    averaged: tuple[str, ...] = ()
    derived: tuple[tuple[str, str], ...] = ()
    counts: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        return ("step", *self.averaged) if self.counts else self.averaged

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.needed, *(key for key, _ in self.derived))


_ADAM_STATE = _State(("exp_avg", "exp_avg_sq"), counts=True)
_STATES: dict[type[torch.optim.Optimizer], _State] = {
    torch.optim.AdamW: _ADAM_STATE,
    EightBitAdamW: _ADAM_STATE,
    Adopt: _ADAM_STATE,
    Amsgrad: _State(("exp_avg", "max_exp_avg_sq"), derived=(("exp_avg_sq", "max_exp_avg_sq"),)),
    Muon: _State(("momentum_buffer",)),
    NorMuon: _State(("momentum_buffer", ROW_MOMENT)),
    torch.optim.SGD: _State(),
}

#: Whose beta2 and epsilon hold where the run file leaves them out; of muon, its AdamW's.
_ADAPTIVE: dict[str, type[Elementwise]] = {"adopt": Adopt, "amsgrad": Amsgrad}


class InnerOptimizer:
    """AdamW, Muon or NorMuon + AdamW, ADOPT, AMSGrad or SGD over a model's trainable parameters.

    Matrices are decayed; vectors (norms, biases) and what config.no_decay names are not. State
    tensors are named "<parameter>.<key>", for instance "lm_head.weight.exp_avg"; step counters are
    0-d fp32. Where parameters are DTensors (FSDP2), so is the rest of their state.

    Args:
        model: on its device already, cut already if it is to be.
        config: the [local] table.
        group: ranks that hold copies of the model (DDP) and share Muon's work; the ranks of cut
            parameters are known from the parameters.

    Raises:
        IncompatibleConfigError: a pattern of config.no_decay matches no parameter.
    """

    def __init__(
        self, model: nn.Module, config: LocalConfig, *, group: dist.ProcessGroup | None = None
    ) -> None:
        self.parameters: dict[str, nn.Parameter] = trainable_parameters(model)
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.parameters.items()
        }
        self._optimizers = _build(model, self.parameters, config, group)
        for options in self._groups():
            options["peak_lr"] = options["lr"]

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
        """The state by "<parameter>.<key>", in the same order on every rank.

        References, not copies; except that 8-bit moments are decoded into new fp32 tensors.
        """
        return {name: tensor for name, _, tensor in self._state()}

    def averaged_state(self) -> dict[str, Tensor]:
        """What of `state_tensors` the aggregator averages: neither counters nor AMSGrad's v."""
        return {name: tensor for name, averaged, tensor in self._state() if averaged}

    def initial_state(self) -> dict[str, Tensor]:
        """What the aggregator starts averaging from; loading it at step 0 equals a reset."""
        return {
            f"{name}.{key}": torch.full_like(
                rows_of(parameter) if key == ROW_MOMENT else parameter,
                options["eps"] ** 2 if key == "max_exp_avg_sq" else 0.0,
                requires_grad=False,
            )
            for optimizer, options, name, parameter in self._stepped()
            for key in _STATES[type(optimizer)].averaged
        }

    def load_state_tensors(
        self, tensors: Mapping[str, Tensor], *, steps_taken: int | None = None
    ) -> None:
        """Replace the state with copies of `tensors`; an empty mapping resets.

        Args:
            tensors: as `state_tensors` names them: whole tensors (of DTensor parameters every rank
                takes its part; nothing is sent), or DTensors cut like their parameter.
            steps_taken: sets every step counter; for state that came without counters (averaged
                by the aggregator, whose clock they then follow).

        Raises:
            ModelMismatchError: a name or shape that this model and optimizer do not have, or a
                parameter whose state is only half there. The state is then reset.
        """
        self.reset()
        try:
            self._load(tensors, steps_taken)
        except ModelMismatchError:
            self.reset()
            raise

    def _load(self, tensors: Mapping[str, Tensor], steps_taken: int | None) -> None:
        known: set[str] = set()
        for optimizer, _, name, parameter in self._stepped():
            layout = _STATES[type(optimizer)]
            known.update(f"{name}.{key}" for key in layout.keys)
            state = _read(name, parameter, tensors, layout)
            if state:
                _complete(name, state, layout, steps_taken)
                _write(optimizer, parameter, state)
        unknown = sorted(set(tensors) - known)
        if unknown:
            raise ModelMismatchError(
                f"inner-optimizer state holds {unknown[0]!r}, which this model and optimizer lack"
            )

    def _groups(self) -> list[dict]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _stepped(
        self,
    ) -> Iterator[tuple[torch.optim.Optimizer, Mapping[str, Any], str, nn.Parameter]]:
        """Each parameter's optimizer, options and name."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield optimizer, group, self._names[parameter], parameter

    def _state(self) -> Iterator[tuple[str, bool, Tensor]]:
        """Name of each state tensor, and whether the aggregator averages it."""
        for optimizer, _, name, parameter in self._stepped():
            averaged = _STATES[type(optimizer)].averaged
            for key, value in _state_of(optimizer, parameter).items():
                yield f"{name}.{key}", key in averaged, value


def _state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(optimizer, EightBitAdamW):
        return optimizer.decoded(parameter)
    state = optimizer.state.get(parameter, {})
    return {key: state[key] for key in _STATES[type(optimizer)].keys if key in state}


def _read(
    name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor], layout: _State
) -> dict[str, Tensor]:
    """Copies of a parameter's state among `tensors`, as the parameter is kept."""
    state: dict[str, Tensor] = {}
    for key in layout.keys:
        value = tensors.get(f"{name}.{key}")
        if value is None:
            continue
        model = rows_of(parameter) if key == ROW_MOMENT else parameter
        expected = torch.Size() if key == "step" else model.shape
        if value.shape != expected:
            raise ModelMismatchError(
                f"inner-optimizer state {name}.{key} has shape {tuple(value.shape)}, "
                f"not {tuple(expected)}"
            )
        if key == "step":
            state[key] = value.detach().to("cpu", torch.float32, copy=True)
            continue
        try:
            state[key] = copy_as(value, model)
        except ValueError as error:
            raise ModelMismatchError(f"inner-optimizer state {name}.{key}: {error}") from error
    return state


def _complete(name: str, state: dict[str, Tensor], layout: _State, steps_taken: int | None) -> None:
    """Set the counter and fill in derived keys, in place."""
    if layout.counts and steps_taken is not None:
        state["step"] = torch.tensor(float(steps_taken), dtype=torch.float32)
    for key in layout.needed:
        if key not in state:
            found = next(other for other in reversed(layout.keys) if other in state)
            raise ModelMismatchError(
                f"inner-optimizer state holds {name}.{found} but lacks {name}.{key}"
            )
    for key, source in layout.derived:
        if key not in state:
            state[key] = state[source].clone()


def _write(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]
) -> None:
    if isinstance(optimizer, EightBitAdamW):
        optimizer.encode(parameter, state)
        return
    if isinstance(optimizer, torch.optim.AdamW):
        # torch's fused kernel reads the counter on the device, the other optimizers on the CPU.
        state["step"] = state["step"].to(parameter.device)
    optimizer.state[parameter] = state


def _build(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    config: LocalConfig,
    group: dist.ProcessGroup | None,
) -> list[torch.optim.Optimizer]:
    decayed = decayed_names(parameters, config.no_decay)
    if config.optimizer == "sgd":
        groups = _decay_groups(parameters, decayed, config.weight_decay)
        return [torch.optim.SGD(groups, lr=config.lr, foreach=True)]
    hidden = set(hidden_matrices(model)) if config.optimizer == "muon" else set()
    matrices = {name: parameters[name] for name in parameters if name in hidden}
    rest = {name: parameters[name] for name in parameters if name not in hidden}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        options: dict[str, Any] = {
            "group": group,
            "lr": config.lr,
            "momentum": config.momentum,
            # Same update size as AdamW's, so one learning rate may serve both groups.
            "adjust_lr_fn": "match_rms_adamw",
        }
        groups = _decay_groups(matrices, decayed, config.weight_decay)
        optimizers.append(
            Muon(groups, **options)
            if config.row_beta2 is None
            else NorMuon(groups, row_beta2=config.row_beta2, **options)
        )
    if rest:
        ratio = config.adamw_lr_ratio if config.optimizer == "muon" else 1.0
        groups = _decay_groups(rest, decayed, config.weight_decay)
        optimizers.append(_adaptive(groups, config, config.lr * ratio))
    return optimizers


def _adaptive(
    groups: list[dict[str, Any]], config: LocalConfig, lr: float
) -> torch.optim.Optimizer:
    ours = _ADAPTIVE.get(config.optimizer, EightBitAdamW)
    epsilon = ours.eps if config.epsilon is None else config.epsilon
    options: dict[str, Any] = {"lr": lr, "betas": adam_betas(config), "eps": epsilon}
    if ours is EightBitAdamW and config.optimizer_bits == 32:
        return torch.optim.AdamW(groups, **options, fused=True)
    return ours(groups, **options)


def adam_betas(config: LocalConfig) -> tuple[float, float]:
    """beta1 and beta2 of adamw, muon's AdamW, adopt and amsgrad."""
    usual = _ADAPTIVE.get(config.optimizer, EightBitAdamW).betas[1]
    return config.beta1, usual if config.beta2 is None else config.beta2


def decayed_names(parameters: Mapping[str, nn.Parameter], patterns: Iterable[str]) -> set[str]:
    """Names of the parameters that weight decay acts on: matrices that no pattern spares.

    Args:
        parameters: by name; shapes are all that is looked at.
        patterns: local.no_decay.

    Raises:
        IncompatibleConfigError: a pattern matches no parameter.
    """
    spared: set[str] = set()
    for pattern in patterns:
        matching = {name for name in parameters if fnmatchcase(name, pattern)}
        if not matching:
            raise IncompatibleConfigError(
                f"local.no_decay names {pattern!r}, but no parameter of this model is called so",
                hint=f"Its parameters are called {some(parameters)}.",
            )
        spared |= matching
    return {name for name, p in parameters.items() if p.ndim >= 2 and name not in spared}


def _decay_groups(
    parameters: Mapping[str, nn.Parameter], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    groups = [
        {
            "params": [parameters[name] for name in parameters if (name in decayed) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]
