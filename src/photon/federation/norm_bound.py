"""How far one update may lie from the global state: a bound that is known before the round.

With federation.max_update_norm = "auto" an update is refused beyond the smaller of two bounds. Both
depend on the run file and on earlier rounds only, so the order of arrival decides nothing, and a
resume decides the same.

1. What tau steps of the recipe can move, times SLACK. A step of Adam's kind moves a coordinate by
   at most r lr, so P parameters by r lr sqrt(P), and weight decay moves them by lr wd |theta|:

       r = |m_t| / sqrt(v_t) <= (1 - b1) / sqrt(1 - b2) sqrt(sum_{j<t} (b1^2 / b2)^j)

   by Cauchy and Schwarz (compare Kingma & Ba, arXiv 1412.6980, section 2.1); with bias correction
   r is 1 at first. It is t^(1/4) for ADOPT, which clips there. Muon's update is scaled to Adam's
   size. SGD moves lr clip_norm, and without a clip there is no such bound. Where a codec's error
   is fed back, what is sent may hold all that earlier rounds held back: sum_k beta^k times as much.
   With [privacy] a node's clip bounds it, and its noise of z C sqrt(P) is allowed on top.
2. FACTOR times the lower median norm of the updates that the newest round merged (`usual_norm` has
   fewer than three), more where the learning rates of this round add up to more than that round's
   did. Absent in the first round.

Below both, an update beyond COUNTED times that median is scaled down to it (as by norm clipping,
arXiv 1911.07963): one that is turned round can then slow a mean of four down, not drive it away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from photon.aggregation import square_sum
from photon.config import LinkConfig, RunConfig
from photon.config.children import ChildConfig, inside
from photon.federation.checkpoint import RunState
from photon.federation.tasks import OPTIMIZER, WEIGHTS, GlobalState, section
from photon.privacy.epsilon import settled
from photon.training import Schedule, adam_betas

#: Between the recipe's bound and what is refused: rounding, codecs, eight-bit moments.
SLACK = 2.0
#: Times the last round's median. LAB.md has what honest runs need.
FACTOR = 10.0
#: Times the last round's median, as which larger ones count. Honest ones are hardly ever larger.
COUNTED = 2.0


@dataclass(frozen=True)
class NormBound:
    """Of one round.

    Attributes:
        norm: largest L2 distance of an update's weights from the global ones; inf: any.
        origin: where it comes from, in words.
        state: largest L2 norm of averaged inner-optimizer state; inf: any.
        counted: larger updates that are not refused are merged as if they had this norm.
    """

    norm: float = math.inf
    origin: str = ""
    state: float = math.inf
    counted: float = math.inf

    def share(self, norm: float) -> float:
        """What an update of this norm is multiplied with."""
        return self.counted / norm if norm > self.counted else 1.0

    def refuse(self, norm: float, state: float = 0.0) -> str | None:
        """Why an update of these norms must not be merged; None if it may."""
        if norm > self.norm:
            return f"its norm {norm:.4g} exceeds {self.origin}"
        if state > self.state:
            return (
                f"its inner optimizer's state has norm {state:.4g}; clipped gradients and the "
                f"global state lead to {self.state:.4g} at most"
            )
        return None


def lr_sum(config: RunConfig, global_step: int) -> float:
    """The learning rates of the round that begins at this step, added up."""
    schedule, local = Schedule.of(config), config.local
    steps = range(global_step, global_step + local.steps)
    return local.lr * math.fsum(schedule.factor(step) for step in steps)


def norm_bound(config: RunConfig, before: RunState, state: GlobalState) -> NormBound:
    """The bound on the updates of the round that comes after `before`.

    Args:
        before: the run so far.
        state: the global state that the round starts from.
    """
    config, given = settled(config), config.federation.max_update_norm
    if given == "none":
        return NormBound()
    inner = _state_bound(config, before, state)
    if given != "auto":
        return NormBound(given, f"federation.max_update_norm = {given:g}", inner)
    local = config.local
    weights = section(state, WEIGHTS)
    norm = norm_of(weights) if local.weight_decay else 0.0
    size = sum(one.numel() for one in weights.values()), norm
    # Key tensors of one's own stay away from the global ones.
    reach = math.inf if config.parts.own_key else SLACK * _reach(config, before, size)
    counted, deviation = math.inf, _deviation(config)
    noise = " and its noise" if deviation else ""
    words = f"{reach:.4g}, {SLACK:g} times what {local.steps} steps of this recipe{noise} can move"
    # What a sum is noised with goes by who is in it, and is nobody's to choose.
    if before.merged_norm > 0 and before.merged_lr_sum > 0 and not config.privacy.at_sum:
        risen = max(1.0, lr_sum(config, before.global_step) / before.merged_lr_sum)
        usual = FACTOR * before.merged_norm * risen
        counted = COUNTED * before.merged_norm * risen
        if deviation > config.privacy.deviation:  # than others have, by whom the median may be
            loud = SLACK * deviation * math.sqrt(size[0])
            usual, counted = max(usual, loud), max(counted, loud)
        if usual < reach:
            reach = usual
            words = (
                f"{reach:.4g}, {FACTOR * risen:.3g} times the median of what round {before.round} "
                f"merged ({before.merged_norm:.4g})"
            )
    return NormBound(reach, f'{words} (federation.max_update_norm = "auto")', inner, counted)


def usual_norm(norms: Sequence[float], before: RunState) -> float:
    """What the next round's bound goes by: the lower median of what was merged.

    Fewer than three have no honest majority: theirs raises the bound and never lowers it, or one
    tiny update would have everybody else's refused from then on.

    Args:
        norms: of the updates merged, at least one.
        before: the run before the round that merged them.
    """
    median = statistics.median_low(norms)
    return median if len(norms) > 2 else max(median, before.merged_norm or max(norms))


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """The L2 norm of all together."""
    return math.sqrt(math.fsum(square_sum(name, one) for name, one in tensors.items()))


def _deviation(config: RunConfig) -> float:
    """Of the noise on a coordinate of any participant's update, the most."""
    below = config.federation.children.values()
    inner = [one.rounds * _deviation(inside(config, one)) for one in below]
    own = [one.update_privacy.deviation for one in below]
    return max(config.privacy.deviation, *map(sum, zip(inner, own, strict=True)), 0.0)


def _group_reach(
    config: RunConfig, child: ChildConfig, before: RunState, size: tuple[int, float]
) -> float:
    """How far a group's update may lie from the version it was given."""
    inner, moved = inside(config, child), 0.0
    for index in range(child.rounds):
        clock = before.global_step + index * inner.local.steps
        number = before.round * child.rounds + index
        moved += _reach(inner, replace(before, global_step=clock, round=number), size)
    if child.outer.name != "fedavg" or child.outer.lr > 1:
        moved = math.inf
    moved = child.update_privacy.noised_norm(moved, size[0])
    return math.inf if LinkConfig(update_codec=child.update_codec).feeds_back else moved


def _reach(config: RunConfig, before: RunState, size: tuple[int, float]) -> float:
    """How far a round's steps can move the weights, and feedback what is sent.

    Args:
        size: the number of weights, and their norm where they decay.
    """
    local, schedule, (parameters, weights_norm) = config.local, Schedule.of(config), size
    step = step_over_lr(config, before, parameters)
    feeds_back, moved = config.feeds_back, 0.0
    # What comes late was trained when the rate may have been higher.
    peak = feeds_back or config.federation.keeps_late
    for index in range(before.global_step, before.global_step + local.steps):
        lr = local.lr * (1.0 if peak else schedule.factor(index))
        decay = local.weight_decay * (weights_norm + moved) if local.weight_decay else 0.0
        moved += lr * (step + decay)
    moved = config.privacy.noised_norm(moved, parameters)
    if feeds_back:
        beta, rounds = config.link.feedback_decay, before.round + 1
        moved *= rounds if beta == 1 else (1 - beta**rounds) / (1 - beta)
    groups = config.federation.children.values()
    return max([moved, *(_group_reach(config, one, before, size) for one in groups)])


def step_over_lr(config: RunConfig, before: RunState, parameters: int) -> float:
    """|step| / lr at most."""
    local = config.local
    if local.optimizer == "sgd":
        return local.clip_norm or math.inf
    fresh = config.federation.optimizer_state == "reset"
    taken = local.steps + (0 if fresh else before.global_step)
    if local.optimizer == "adopt":
        return taken**0.25 * math.sqrt(parameters)
    beta1, beta2 = adam_betas(local)
    ratio = beta1**2 / max(beta2, 1e-9)
    if ratio == 1 or taken * math.log(max(ratio, 1e-9)) > 700:
        series = float(taken) if ratio == 1 else math.inf
    else:
        series = (1 - ratio**taken) / (1 - ratio)
    most = max(1.0, local.adamw_lr_ratio) if local.optimizer == "muon" else 1.0
    most *= max(1.0, (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(series))
    return most * math.sqrt(parameters)


def _state_bound(config: RunConfig, before: RunState, state: GlobalState) -> float:
    """Moments are means of gradients and of their squares, and of what they were before."""
    local, inner = config.local, section(state, OPTIMIZER)
    if not inner or not local.clip_norm:
        return math.inf
    moved = local.clip_norm + local.clip_norm**2
    if local.optimizer == "adopt":  # its first moment is of normalised gradients
        moved += step_over_lr(config, before, sum(one.numel() for one in inner.values()))
    return SLACK * (norm_of(inner) + moved)
