"""What turns a round's updates into the next version: merging rule, outer optimizer, broadcast."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from photon.aggregation import OuterOptimizer, build_outer_optimizer
from photon.config import RunConfig
from photon.federation.broadcast import Broadcast
from photon.federation.checkpoint import RunState
from photon.federation.engine import Version
from photon.federation.merging import Merging, Verdict
from photon.federation.norm_bound import NormBound, lr_sum, norm_bound, usual_norm
from photon.federation.residuals import Residuals
from photon.federation.tasks import OPTIMIZER, WEIGHTS, GlobalState, StateRef, Update, section
from photon.link import Carrier, Ref, tensors_sha256


class Server:
    """The aggregator's maths; it knows no engine, no silo and no clock on the wall.

    Memory: the global state, one accumulator, the outer optimizer's state, and one tensor of the
    update being merged; the number of participants does not enter. (Rules that need all updates
    together keep them on disk.)

    Args:
        config: the run file.
        folder: where updates wait that a rule must see together.
        groups: "global" state, "outer" optimizer state, what the merging "rule" keeps from round
            to round, what the "broadcast" left out, and what travels "once"; fresh or from a
            checkpoint.
        before: the run so far.
        key: names of the tensors that parts.key_rule merges.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        groups: Mapping[str, Mapping[str, Tensor]],
        before: RunState,
        key: Collection[str] = (),
    ) -> None:
        self._config = config
        self._state: dict[str, Tensor] = dict(groups["global"])
        self._merging = Merging(config.federation, folder, config.parts, key)
        self.attention = self._merging.attention
        self.residuals = Residuals(config, folder, groups.get("residuals", {}))
        if self.attention:
            self.attention.least = self.residuals.least_share
        self._bound = NormBound()
        self._before = before
        self._outer: OuterOptimizer = build_outer_optimizer(config.outer)
        left_out, name = groups.get("broadcast"), config.run.name
        self._broadcast = Broadcast(config.link, name, left_out, before.outer_update_bytes)
        self._published: StateRef | None = None
        self._once = dict(groups.get("once", {}))
        self._once_at: Ref | None = None
        self._once_bytes = self._broadcast.once_bytes(self._once) if self._once else 0
        self._once_sha256 = tensors_sha256(self._once) if self._once else ""
        if groups.get("outer"):
            self._outer.load_state_tensors(dict(groups["outer"]))
        if groups.get("rule"):
            self._merging.rule.load_state_tensors(dict(groups["rule"]))
        self.version = self._version(before.round)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The global weights by parameter name."""
        return section(self._state, WEIGHTS)

    def begin(self, before: RunState) -> None:
        """What the next updates are held against is known from here on."""
        self._before = before
        self._bound = norm_bound(self._config, before, self._state)

    def offer(self, update: Update, weight: float, scale: float = 1.0) -> Verdict:
        """Check an update and merge it, or say why not.

        Args:
            weight: its share before normalising.
            scale: what it is multiplied with; see `Merging.offer`.
        """
        return self._merging.offer(update, self._state, weight, self._bound, scale)

    def discard(self) -> None:
        """Forget the updates since the last step."""
        self._merging.discard()

    @torch.no_grad()
    def step(self, *, keep_version: bool = False) -> tuple[float, dict[str, float]]:
        """Turn what was merged into the next version, as nodes will have it.

        Args:
            keep_version: leave the version of before as it is, as somebody still works from it;
                its tensors are changed in place otherwise.

        Returns:
            how far what was merged lies from the version before (L2, weights only), and changes of
            a run's state: what the next round goes by.

        Raises:
            RunError: what was merged is not fit for that; the version is as it was.
        """
        number = self.version.number + 1
        before = self._broadcast.keep(self._state)
        result = self._merging.result(self._state, self._bound)
        if keep_version:
            self._state = {name: tensor.clone() for name, tensor in self._state.items()}
        merged, weights = section(result.tensors, WEIGHTS), self.weights
        if self._config.federation.merge == "adopt":
            for name, weight in weights.items():
                weight.copy_(merged[name])
        else:
            self._outer.step(weights, merged, number)
        for name, tensor in section(self._state, OPTIMIZER).items():
            tensor.copy_(result.tensors[OPTIMIZER + name])
        self._broadcast.encode(number, self._state, before)
        self.version = self._version(number)
        changes = {
            "merged_norm": usual_norm(result.norms, self._before),
            "merged_lr_sum": lr_sum(self._config, self._before.global_step),
            "outer_update_bytes": self._broadcast.update_bytes,
        }
        return result.norm, changes

    def skip(self) -> None:
        """The next version is the one of now."""
        self._broadcast.encode(
            self.version.number + 1, self._state, self._broadcast.keep(self._state)
        )
        self.version = self._version(self.version.number + 1)

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors that a checkpoint needs, by group."""
        some = {
            "broadcast": self._broadcast.left_out,
            "rule": self._merging.rule.state_tensors(),
            "once": self._once,
            "residuals": self.residuals.tensors(),
        }
        some = {name: tensors for name, tensors in some.items() if tensors}
        return {"global": self._state, "outer": self._outer.state_tensors(), **some}

    def version_of(self, number: int, tensors: GlobalState) -> Version:
        """A version of before, from a checkpoint."""
        publish, held = partial(self._publish, number, tensors), self._once_sha256
        return Version(number, tensors, publish, once=self._once, once_sha256=held)

    def _version(self, number: int) -> Version:
        bytes_down = partial(self._bytes_down, number)
        return replace(self.version_of(number, self._state), bytes_down=bytes_down)

    def _publish(self, number: int, state: GlobalState, carrier: Carrier, folder: str) -> StateRef:
        before, base = self._published, None
        if before is not None and before.round == number - 1:
            base = before.sha256
        ref = self._broadcast.publish(carrier, folder, number, state, base=base)
        if self._once and self._once_at is None:
            self._once_at = self._broadcast.publish_once(carrier, folder, self._once)
        ref = replace(ref, once=self._once_at)
        if number == self.version.number:
            self._published = ref
        return ref

    def _bytes_down(self, number: int, held: int | None) -> int:
        if held == number:
            return 0
        size = self._broadcast.bytes_down(number + 1, self._state, holds_last=held == number - 1)
        return size + (self._once_bytes if held is None else 0)
