"""Outer optimizers: how the global parameters follow the round's pseudo-gradient.

The pseudo-gradient is D = theta_global - theta_local (merged over participants), so every rule
*subtracts*: with learning rate 1 and no momentum, theta - D is the merged local model. Symbols:
theta parameters, lr `outer.lr`, mu `outer.momentum`, b1 b2 `outer.beta1` `outer.beta2`,
eps `outer.epsilon`. All state is fp32, shaped like the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from photon.aggregation.check import require_same_names, require_shape
from photon.config import OuterConfig
from photon.errors import IncompatibleConfigError, ModelMismatchError
from photon.plugins import OUTER_OPTIMIZERS, load_plugin

_Tensors = dict[str, torch.Tensor]


class OuterOptimizer(ABC):
    """One rule for moving the global parameters.

    A plugin derives from this class, names its state in `slots` and writes `update`; it is built
    as `cls(config)` and finds its own settings in `config.options`.
    """

    #: Names of the state tensors kept for each parameter, for example ("momentum",).
    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: OuterConfig) -> None:
        self.config = config
        self.number = 0
        self._state: dict[str, _Tensors] = {}

    @abstractmethod
    def update(self, theta: torch.Tensor, d: torch.Tensor, state: _Tensors) -> None:
        """Move one parameter and its state in place.

        Args:
            theta: the global parameter, fp32, any shape.
            d: its pseudo-gradient theta_global - theta_local, same shape; not to be changed.
            state: a tensor of the same shape per name in `slots`.
        """

    def initial(self, slot: str) -> float:
        """The value a fresh state tensor is filled with."""
        return 0.0

    def step(
        self,
        parameters: dict[str, torch.Tensor],
        pseudo_gradient: Mapping[str, torch.Tensor],
        number: int = 0,
    ) -> None:
        """Move the global parameters in place.

        Args:
            parameters: theta_global by name, fp32.
            pseudo_gradient: theta_global - theta_local by name, same names and shapes.
            number: of this step, counted from 1, for rules that don't do the same in each.

        Raises:
            ModelMismatchError: names or shapes of parameters, pseudo-gradient and state differ;
                nothing was moved.
        """
        require_same_names("the pseudo-gradient", pseudo_gradient, parameters)
        for name, theta in parameters.items():
            require_shape(name, pseudo_gradient[name], theta)
        if self.slots and not self._state:
            self._state = {
                name: {s: torch.full_like(theta, self.initial(s)) for s in self.slots}
                for name, theta in parameters.items()
            }
        if self.slots:
            require_same_names("the outer optimizer's state", self._state, parameters)
            for name, theta in parameters.items():
                for tensor in self._state[name].values():
                    require_shape(f"outer state of {name}", tensor, theta)
        self.number = number
        with torch.no_grad():
            for name, theta in parameters.items():
                self.update(theta, pseudo_gradient[name], self._state.get(name, {}))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """State by `slot/parameter name`, fp32; empty before the first step. Live, not copies."""
        return {
            f"{slot}/{name}": tensor
            for name, state in self._state.items()
            for slot, tensor in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave, bit for bit (copied); empty starts afresh.

        Raises:
            ModelMismatchError: the tensors are not the state of this kind of outer optimizer, or
                not of the parameters it already follows. The old state is kept.
        """
        names = list(dict.fromkeys(key.partition("/")[2] for key in tensors))
        expected = [f"{slot}/{name}" for name in names for slot in self.slots]
        require_same_names(f"state of outer optimizer {type(self).__name__}", tensors, expected)
        if self._state and names:
            require_same_names("the outer optimizer's state", names, self._state)
        for key, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise ModelMismatchError(
                    f"outer state {key!r} is {tensor.dtype}, expected torch.float32"
                )
        self._state = {
            name: {slot: tensors[f"{slot}/{name}"].detach().clone() for slot in self.slots}
            for name in names
        }


class FedAvg(OuterOptimizer):
    """theta <- theta - lr D. McMahan et al. 2017 (arXiv 1602.05629); Photon's published recipe."""

    def update(self, theta: torch.Tensor, d: torch.Tensor, state: _Tensors) -> None:
        theta.sub_(d, alpha=self.config.lr)


class FedAvgM(OuterOptimizer):
    """m <- mu m + D; theta <- theta - lr m. Hsu et al. 2019 (arXiv 1909.06335)."""

    slots = ("momentum",)

    def update(self, theta: torch.Tensor, d: torch.Tensor, state: _Tensors) -> None:
        m = state["momentum"].mul_(self.config.momentum).add_(d)
        theta.sub_(m, alpha=self.config.lr)


class Nesterov(OuterOptimizer):
    """m <- mu m + D; theta <- theta - lr (D + mu m). DiLoCo (arXiv 2311.08105), Photon's server."""

    slots = ("momentum",)

    def update(self, theta: torch.Tensor, d: torch.Tensor, state: _Tensors) -> None:
        lr, mu = self.config.lr, self.config.momentum
        m = state["momentum"].mul_(mu).add_(d)
        theta.sub_(d, alpha=lr).sub_(m, alpha=lr * mu)


class DelayedNesterov(OuterOptimizer):
    """Liu et al. 2024 (arXiv 2401.09135, algorithm 3): momentum moves at every N-th merge only.

    S <- S + D; theta <- theta - lr D / N; at every N-th merge instead: m <- mu m + S / N;
    theta <- theta - lr (mu m + D / N); S <- 0. N is `outer.delay`.
    """

    slots = ("momentum", "sum")

    def update(self, theta: torch.Tensor, d: torch.Tensor, state: _Tensors) -> None:
        lr, mu, n = self.config.lr, self.config.momentum, self.config.delay
        state["sum"].add_(d)
        theta.sub_(d, alpha=lr / n)
        if self.number % n == 0:
            m = state["momentum"].mul_(mu).add_(state["sum"], alpha=1 / n)
            theta.sub_(m, alpha=lr * mu)
            state["sum"].zero_()


class _Adaptive(OuterOptimizer):
    """Reddi et al. 2021, algorithm 2 (arXiv 2003.00295), their tau -> our eps. No bias correction.

    m <- b1 m + (1 - b1) D; v by the rule; theta <- theta - lr m / (sqrt(v) + eps); v_0 = eps^2.
    """

    slots = ("m", "v")

    def initial(self, slot: str) -> float:
        return self.config.epsilon**2 if slot == "v" else 0.0

    @abstractmethod
    def second_moment(self, v: torch.Tensor, d: torch.Tensor) -> None:
        """Move v in place."""

    def update(self, theta: torch.Tensor, d: torch.Tensor, state: _Tensors) -> None:
        c = self.config
        m, v = state["m"], state["v"]
        m.mul_(c.beta1).add_(d, alpha=1 - c.beta1)
        self.second_moment(v, d)
        theta.addcdiv_(m, v.sqrt().add_(c.epsilon), value=-c.lr)


class FedAdam(_Adaptive):
    """v <- b2 v + (1 - b2) D^2."""

    def second_moment(self, v: torch.Tensor, d: torch.Tensor) -> None:
        v.mul_(self.config.beta2).addcmul_(d, d, value=1 - self.config.beta2)


class FedYogi(_Adaptive):
    """v <- v - (1 - b2) D^2 sign(v - D^2)."""

    def second_moment(self, v: torch.Tensor, d: torch.Tensor) -> None:
        square = d * d
        v.addcmul_(square, (v - square).sign_(), value=self.config.beta2 - 1)


class FedAdagrad(_Adaptive):
    """v <- v + D^2."""

    def second_moment(self, v: torch.Tensor, d: torch.Tensor) -> None:
        v.addcmul_(d, d)


#: Values of `outer.name` that need no plugin.
BUILTIN_OUTER: dict[str, type[OuterOptimizer]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "nesterov": Nesterov,
    "delayed_nesterov": DelayedNesterov,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
}


def build_outer_optimizer(config: OuterConfig) -> OuterOptimizer:
    """The built-in outer optimizer `config.name`, or the plugin's, without any state yet.

    Raises:
        IncompatibleConfigError: options are given to a built-in, which would ignore them.
        PluginError: neither built-in nor plugin, or the plugin can't be loaded.
    """
    kind = BUILTIN_OUTER.get(config.name)
    if kind is None:
        return load_plugin(OUTER_OPTIMIZERS, config.name, OuterOptimizer)(config)
    if config.options:
        raise IncompatibleConfigError(
            f"outer.options = {config.options} is for plugins, but outer.name = {config.name!r} "
            "is built in and would ignore it",
            hint="Use outer.lr, outer.momentum, outer.beta1, outer.beta2 and outer.epsilon.",
        )
    return kind(config)
