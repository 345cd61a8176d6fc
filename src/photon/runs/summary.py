"""What summary.json says of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from photon.config import RunConfig
from photon.energy.account import JOULES, KWH_J, figures
from photon.federation import EvalReceipt, RunState
from photon.federation.private import worst
from photon.federation.tasks import Epsilon
from photon.link import tensors_sha256
from photon.telemetry.baselines import all_reduce_bytes, bf16_exchange_bytes
from photon.version import photon_version


def summary_of(
    state: RunState,
    evaluation: Mapping[str | None, EvalReceipt],
    config: RunConfig,
    weights: Mapping[str, Tensor],
    *,
    elapsed_s: float,
    at_once: int,
    alone: bool,
) -> dict[str, Any]:
    """Of a run.

    Args:
        evaluation: its newest scores, by silo (None: the global set).
        weights: as they are now.
        elapsed_s: over all processes of the run.
        at_once: silos, or training processes, that trained at the same time.
        alone: nothing was exchanged.
    """
    overall, simulated_s = evaluation[None], state.clock.get("now_s")
    time_s = elapsed_s if simulated_s is None else simulated_s
    return {
        "rounds": state.round,
        "tokens": state.total_tokens,
        "global_loss": overall.loss,
        "global_perplexity": overall.perplexity,
        "bits_per_byte": overall.bits_per_byte,
        "per_silo": {
            silo: receipt.perplexity for silo, receipt in evaluation.items() if silo is not None
        },
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        **({"bytes_inside": state.bytes_inside} if state.bytes_inside else {}),
        **({} if alone else _baselines(state, config, weights)),
        "wall_s": elapsed_s,
        "local_train_s": state.local_train_s,
        "simulated_s": simulated_s,
        "train_share": state.local_train_s / time_s if time_s > 0 else 0.0,
        **shares_of_time(state, time_s, at_once),
        "tokens_lost": state.tokens_lost,
        **({"epsilon": promised} if (promised := _epsilon(state)) else {}),
        **({"energy": _energy(state, config, overall.loss)} if state.energy else {}),
        "weights_sha256": tensors_sha256(weights),
        "photon_version": photon_version(),
    }


def shares_of_time(state: RunState, time_s: float, at_once: int) -> dict[str, float]:
    """Utilisation and goodput, by the definitions of docs/clock.md.

    Args:
        time_s: the run's, by the clock that its silos' times are of.
        at_once: silos, or training processes, that trained at the same time.
    """
    told = state.good_s + state.exposed_s
    return {
        "utilisation": state.good_s / told if told > 0 else 0.0,
        "goodput": state.good_s / (at_once * time_s) if time_s > 0 else 0.0,
    }


def _epsilon(state: RunState) -> dict[str, Any] | None:
    """Of all silos that answered, the largest; None where one of them has none."""
    told = worst(Epsilon(**one) if one else None for one in state.epsilon.values())
    return vars(told) if told else None


def _energy(state: RunState, config: RunConfig, loss: float) -> dict[str, Any]:
    """What the run took and what that was good for; docs/energy.md."""
    moved = state.bytes_up + state.bytes_down + state.bytes_inside
    told, tokens = figures(vars(state), config.energy), state.total_tokens
    kwh, sent_s = told["kwh"], state.exposed_s if moved else 0.0
    gained = loss if state.first_loss is None else state.first_loss - loss
    own_j, witness_j = sum(state.energy[name] for name in JOULES), state.witness_j
    return {
        **told,
        "kwh_per_million_tokens": kwh / tokens * 1e6 if tokens else None,
        "kwh_per_nat": kwh / gained if gained > 0 and state.first_loss is not None else None,
        # Tokens a second and watt: a watt-second is a joule.
        "tokens_per_s_per_w": tokens / (kwh * KWH_J) if kwh else None,
        "granularity": state.good_s / sent_s if sent_s else None,
        "link_utilisation": sent_s / (state.good_s + sent_s) if sent_s else None,
        "independent_kwh": witness_j / KWH_J if witness_j else None,
        "unexplained": 1 - own_j / witness_j if witness_j else None,
    }


def _baselines(state: RunState, config: RunConfig, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """What the run's bytes are held against."""
    local = config.local
    tasks = state.total_tokens // (local.steps * local.batch_size * config.data.sequence_length)
    parameters = sum(weight.numel() for weight in weights.values())
    return {
        "all_reduce_bytes": all_reduce_bytes(parameters, local.steps, tasks),
        "bf16_exchange_bytes": bf16_exchange_bytes(parameters, tasks),
    }
