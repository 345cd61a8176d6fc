"""Residuals at one federation: which of its members' layers leave, and where each goes from here.

A layer that attention gives little to leaves the mean that it was in. It is held against the
updates of the federations here, and goes down to the one that is most alike; else up, where it is
held against others. Barriers hold for whoever had it, at every step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from photon.aggregation.attention import AttentionMean, cosine, projections
from photon.config import LinkConfig, PrivacyConfig, RunConfig
from photon.config.children import PolicyConfig
from photon.federation.private import Purse, Spending, of_group
from photon.federation.stages import leaving
from photon.federation.tasks import FitTask, Residual
from photon.telemetry.events import ResidualRouted


class Residuals:
    """Those that one federation has.

    Args:
        config: the run file as its members have it.
        folder: of what participants keep.
        kept: those that wait, as `tensors` gave them for a checkpoint.
    """

    path = ""  #: Of the federation; with a "/" behind it, if it is not the root.
    above: PolicyConfig | None = None  #: Policy of the one around it.

    def __init__(self, config: RunConfig, folder: Path, kept: Mapping[str, Tensor]) -> None:
        self._config, self._folder, self._own = config, folder, config.federation.policy
        children = config.federation.children.items()
        #: What pays for those of its members; nothing at the root.
        self.spending: Callable[[FitTask], Spending] = partial(
            of_group, PrivacyConfig(), Purse(folder, ""), path=""
        )
        self._policies = {name: one.policy.within(self._own) for name, one in children}
        sends = any(one.lets("out") for one in (self._own, *self._policies.values()))
        self.least_share = config.parts.residual_share if sends else 0.0
        # That leave with its own update, and that wait for a member's next task: of each layer
        # of an origin the newest.
        self.up: dict[tuple[str, str], Residual] = {}
        self._waiting: dict[tuple[str, str, str], Residual] = {}
        for text in sorted(kept):
            words, name = text.split("\n")
            silo, record = json.loads(words)
            one = Residual(**record)
            one = self._waiting.setdefault((silo, one.origin, one.module), one)
            one.tensors[name] = kept[text]

    def tensors(self) -> dict[str, Tensor]:
        """Of those that wait; their names tell the rest."""
        return {
            json.dumps([silo, {**vars(one), "tensors": {}}]) + f"\n{name}": tensor
            for (silo, *_), one in self._waiting.items()
            for name, tensor in one.tensors.items()
        }

    def waiting(self, silo: str) -> list[Residual]:
        """For a member's next task."""
        return [self._waiting[key] for key in sorted(self._waiting) if key[0] == silo]

    def route(
        self, attention: AttentionMean, tasks: Sequence[FitTask], came: Sequence[Residual]
    ) -> Iterator[ResidualRouted]:
        """Send on what came up, and what did not fit in a merge; tells each decision.

        Args:
            tasks: whose updates were merged. What waited for these members, they have.
        """
        rows = dict(zip((task.silo for task in tasks), attention.rows, strict=False))
        self._waiting = {key: one for key, one in self._waiting.items() if key[0] not in rows}
        own, least, up = self._own, self._config.parts.residual_cosine, self.above
        own_barriers = own.never_with or []
        every = [*came, *self._misfits(attention, tasks)]
        for one in sorted(every, key=lambda found: (found.origin, found.module)):
            passed, barriers = [*one.passed, own.jurisdiction], one.never_with + own_barriers
            one = replace(one, passed=passed, never_with=barriers)
            row = projections(one.tensors, self._config.parts)[one.module]
            by = one.origin.removeprefix(self.path).partition("/")[0]
            others = rows.keys() & self._policies.keys() - {by}
            alike = {name: cosine(row, rows[name][one.module]) for name in others}
            # Of two as alike the first by name: the order of members decides nothing.
            best = sorted(alike, key=lambda name: (-alike[name], name))
            fit = [n for n in best if alike[n] > least and self._policies[n].lets("in")]
            free = [name for name in fit if not self._policies[name].bars(passed, barriers)]
            outcome, to, law = "barred" if fit else "unplaced", None, PolicyConfig()
            if free:
                outcome = "taken"
                self._waiting[free[0], one.origin, one.module] = one
            elif up and own.lets("out") and up.lets("in"):
                outcome = "barred" if up.bars(passed, barriers) else "up"
                one, fit = replace(one, hops=one.hops + (outcome == "up")), []
                to, law = self.path[:-1].rpartition("/")[0], up
                self.up |= {(one.origin, one.module): one} if outcome == "up" else {}
            for name in [*free, *fit][:1]:
                to, law = self.path + name, self._policies[name]
            yield ResidualRouted(
                **{**vars(one), "round": tasks[0].round, "silo": "", "outcome": outcome},
                at_jurisdiction=own.jurisdiction,
                origin_jurisdiction=passed[0],
                to=to,
                to_jurisdiction=law.jurisdiction,
                cosine=max(alike.values(), default=None),
            )

    def _misfits(self, attention: AttentionMean, tasks: Sequence[FitTask]) -> Iterator[Residual]:
        """Of members, as they leave: clipped and noised as their policies have it."""
        while attention.misfits:
            (module, place), found = attention.misfits.popitem()
            task, tensors = tasks[place], dict(sorted(found.items()))
            policy = self._policies.get(task.silo, self._own)
            law, barriers = [policy.jurisdiction], policy.never_with or []
            if policy.lets("out") and not self._own.bars(law, barriers):
                delta = tensors.items().__iter__
                shapes = {name: tensor.shape for name, tensor in tensors.items()}
                plain = LinkConfig(chunk_mib=self._config.link.chunk_mib)
                left = leaving(self.spending(task), plain, self._folder, task, delta, shapes)
                sent, size = dict(left.tensors()), left.receipt.bytes_up
                yield Residual(self.path + task.silo, module, sent, law, barriers, size)
