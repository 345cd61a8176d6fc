"""The keys of run.toml, their types, bounds and defaults.

Each field's description is the documentation: docs/configuration.md is written from it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from photon.config.children import ChildConfig, Level
from photon.config.compute import ComputeConfig, EnergyConfig
from photon.config.link import LinkConfig
from photon.config.outer import OuterConfig, known_name
from photon.config.parts import PartsConfig
from photon.config.privacy import LEAST_SUMMED, PrivacyConfig, unsummable, voided
from photon.config.section import LocalPath, Positive, Section
from photon.config.serve import ComplyConfig, ServeConfig
from photon.plugins import MERGING_RULES

MERGING_RULE_NAMES = ("mean", "clipped_mean", "median", "trimmed_mean", "edit")
PRESETS = ("mini", "tiny", "small", "75m", "125m", "350m", "1.3b", "3b", "7b")


class RunSection(Section):
    """[run]: the run itself."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        default="run", description="Names the run folder (runs/NAME) and the report."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0,
        description="Seeds initial weights, data order, sampling of participants and dropout.",
    )
    log_every: Positive = Field(default=10, description="Local steps between two progress events.")
    keep_checkpoints: Positive = Field(
        default=2, description="Newest checkpoints kept in the run folder."
    )


class ModelConfig(Section):
    """[model]: a preset, or any Hugging Face causal language model."""

    preset: Literal["mini", "tiny", "small", "75m", "125m", "350m", "1.3b", "3b", "7b"] | None = (
        Field(
            default=None,
            description="A shape from the Photon paper, or `mini`, `tiny`, `small` for a CPU.",
        )
    )
    family: Literal["llama", "mpt"] = Field(
        default="llama",
        description="Blocks of a preset: llama (serves everywhere) or mpt with ALiBi (the paper).",
    )
    path: str | None = Field(
        default=None,
        description="A Hugging Face causal LM instead of a preset: its folder, or hf:OWNER/NAME "
        "for one on the hub.",
    )
    init: Literal["random", "pretrained"] = Field(
        default="random",
        description="With path: fresh weights of that shape, or the weights it holds.",
    )
    qk_norm: bool = Field(
        default=False,
        description="Normalise queries and keys (RMSNorm per head) in a preset of the llama "
        "family; the model is then exported as a Qwen3.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.preset is None) == (self.path is None):
            given = "both" if self.preset is not None else "neither"
            raise ValueError(f"name either preset or path, not {given}")
        if self.init == "pretrained" and self.path is None:
            raise ValueError('init = "pretrained" needs path; a preset has no weights')
        if self.qk_norm and (self.preset is None or self.family != "llama"):
            raise ValueError('qk_norm = true needs a preset with family = "llama"')
        return self


class DataConfig(Section):
    """[data]: the prepared text."""

    path: LocalPath = Field(
        description="Folder made by `photon data prepare`; relative to the current directory."
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(
        default=128, description="Tokens a training sequence predicts."
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Weight of each source inside a silo; empty takes sources by their size.",
    )
    verify: bool = Field(default=True, description="Check every shard's sha256 before training.")


class FederationConfig(Level):
    """[federation]: rounds, who takes part, and what happens to their updates."""

    rounds: Positive = Field(default=10, description="Exchanges between silos and aggregator.")
    merge: Literal["delta", "adopt"] = Field(
        default="delta",
        description="What is averaged: deltas through the outer optimizer, or the nodes' weights "
        "themselves (adopt; bit-exact for one participant).",
    )
    merging_rule: Annotated[str, known_name(MERGING_RULE_NAMES, MERGING_RULES)] = Field(
        default="mean",
        description="How updates become one. mean: weighted. clipped_mean: weighted, of updates "
        "scaled down to clip_update_norm. median, trimmed_mean: coordinate by coordinate and "
        "unweighted (arXiv 1803.01498); updates wait in the run folder, 4 bytes per parameter "
        "each. edit: EDiT's penalty (arXiv 2412.07210) refuses unusual norms, lets large ones "
        "count less and clips the result. Or a rule a plugin registered.",
    )
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.2,
        description="Of trimmed_mean: share of the participants dropped at each end of each "
        "coordinate, rounded down; with fewer than 1 / trim of them none is dropped.",
    )
    clip_update_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Largest L2 norm that clipped_mean gives one update (needed), or edit the "
        "merged one (not clipped by default).",
    )
    anomaly_z: Annotated[float, Field(gt=0)] = Field(
        default=3.0,
        description="Of edit: refuse norms that lie more standard deviations above the mean of "
        "norms merged in earlier rounds, once 16 were merged.",
    )
    max_update_norm: Annotated[float, Field(gt=0)] | Literal["auto", "none"] = Field(
        default="auto",
        description="Refuse updates whose weights lie further (L2) from the global ones, whatever "
        "the merging rule. auto: twice what the round's steps can move at most by this recipe, and "
        "10 times the median of what the last round merged, and of deltas count those beyond twice "
        "that median as if they were that large; none: no bound.",
    )
    optimizer_state: Literal["reset", "keep", "average"] = Field(
        default="reset",
        description="Inner optimizer state between rounds: forgotten, kept by the node, or "
        "averaged by the aggregator with the weights.",
    )
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="Local training processes; 0 trains in the aggregator's own process."
    )
    silence_s: Annotated[float, Field(gt=0)] = Field(
        default=600.0,
        description="Seconds a worker may go without a step or an answer before it is replaced.",
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        default=3600.0,
        description="Seconds after which a silo that is there and training, but whose local step "
        "is still the same, is left out of its round. Silos tell every run.log_every steps.",
    )
    pace: Literal["synchronous", "quorum", "buffered"] = Field(
        default="synchronous",
        description="When a round closes. synchronous: everybody asked has answered. quorum: a "
        "quorum has, and a window of grace is over. buffered: a quorum has, and the others go on "
        "from the version they have (FedBuff, arXiv 2106.06639).",
    )
    grace: Annotated[float, Field(ge=0)] = Field(
        default=0.25,
        description="Of pace quorum: who has not answered is waited for so many times as long as a "
        "quorum usually takes.",
    )
    over_sample: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Of pace quorum: participants asked beyond federation.sample; as many good "
        "updates as that close the round.",
    )
    late: Literal["drop", "merge"] = Field(
        default="drop",
        description="Of pace quorum: what becomes of updates that come after their round has "
        "closed. merge: a later round takes them, weighted 1 / sqrt(1 + merges missed).",
    )
    max_staleness: Positive = Field(
        default=8, description="Late and buffered updates that missed more merges are dropped."
    )
    deadline_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = Field(
        default=86_400.0,
        description="Seconds from the start of a round after which a silo that has not answered is "
        "left out of it. (federation.silence_s is for silos that say nothing at all.)",
    )
    unequal_steps: bool = Field(
        default=False,
        description="Let each silo take as many of local.steps as it is fast beside the fastest, "
        "by its measured steps a second (DyLU, arXiv 2401.09135), so that all end together.",
    )
    normalise: bool = Field(
        default=False,
        description="Divide each update by its local steps, and multiply what they merge to by the "
        "mean of the steps (FedNova, arXiv 2007.07481): who takes fewer counts as much.",
    )
    branches: ChildConfig | None = Field(
        default=None,
        description="Groups by silos' names in the place of children: those whose names agree up "
        "to a dot are a group, at each dot, and each is like this table: "
        "[federation.branches] rounds = 2. `photon data prepare --silo-tree` names silos so.",
    )

    @model_validator(mode="after")
    def _late_updates_are_deltas(self) -> FederationConfig:
        if self.keeps_late and (self.merge == "adopt" or self.optimizer_state == "average"):
            raise ValueError(
                "updates that come late are merged as deltas from what they began with; they can't "
                'be with merge = "adopt" or optimizer_state = "average"'
            )
        if self.normalise and self.merge == "adopt":
            raise ValueError('normalise divides deltas; it can\'t be with merge = "adopt"')
        return self

    @property
    def in_task_order(self) -> bool:
        """Whether updates are merged in the order of tasks: whoever was faster changes no bit."""
        return self.pace == "synchronous"

    @property
    def keeps_late(self) -> bool:
        """Whether a merge may take updates that began before the merge before it."""
        return self.pace == "buffered" or (self.pace == "quorum" and self.late == "merge")


class LocalConfig(Section):
    """[local]: the recipe of a node's tau local steps."""

    steps: Positive = Field(default=32, description="tau: optimizer steps between exchanges.")
    batch_size: Positive = Field(
        default=16, description="Sequences per optimizer step, per participant."
    )
    lr: Annotated[float, Field(gt=0, le=1e38)] = Field(
        default=1e-3, description="Peak learning rate."
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Last learning rate over the peak."
    )
    adamw_lr_ratio: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=1.0,
        description="Of muon: learning rate of what its AdamW steps (embeddings, head, vectors), "
        "over local.lr.",
    )
    optimizer: Literal["adamw", "muon", "adopt", "amsgrad", "sgd"] = Field(
        default="adamw",
        description="Inner optimizer. muon: hidden matrices by Muon, the rest by AdamW. adopt: "
        "Adam that converges with any beta2 (arXiv 2411.02853). amsgrad: FedLALR's form; needs "
        'federation.optimizer_state = "average". sgd: plain SGD, for checking the maths.',
    )
    optimizer_bits: Literal[32, 8] = Field(
        default=32,
        description="Bits of AdamW's two moments, also beside muon; 8 stores those of matrices "
        "block-wise (arXiv 2110.02861).",
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="Learning rate over global steps, after the warm-up."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Global steps of linear warm-up."
    )
    decay_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Global steps of the final decay (wsd); a tenth of all by default.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Decoupled weight decay."
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Largest gradient norm of a step; 0 does not clip."
    )
    no_decay: list[str] = Field(
        default_factory=list,
        description="Parameters without weight decay, as shell patterns of their names, for "
        'instance ["*embed*"]. Vectors (norms, biases) never decay.',
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Weight of the mean squared log-partition, which keeps logits small (PaLM: "
        "1e-4). Not part of reported losses.",
    )
    document_mask: bool = Field(
        default=False,
        description="Forbid attention from one document to another inside a training sequence.",
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="First-moment decay of adamw, adopt and amsgrad."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="Second-moment decay: by default 0.95 for adamw and muon's AdamW, 0.9999 for "
        "adopt, 0.99 for amsgrad.",
    )
    epsilon: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="By default 1e-8 for adamw and muon's AdamW, 1e-6 for adopt; 1e-3 for amsgrad, "
        "whose v-hat starts at its square.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Muon momentum."
    )
    row_beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="Of muon: with a number (0.95), NorMuon (arXiv 2510.05491): each row of an "
        "update is divided by the root of a running mean of its squares, whose decay this is.",
    )


class EvalConfig(Section):
    """[eval]: perplexity on held-out text."""

    every: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Rounds between evaluations; 0 evaluates only at the end."
    )
    batch_size: Positive = Field(default=32, description="Sequences per forward pass.")
    max_tokens: Positive | None = Field(
        default=None,
        description="Score a sample of so many held-out tokens of each set, spread evenly over its "
        "sources and the same in every round; all of them by default.",
    )
    per_silo: bool = Field(
        default=True, description="Also evaluate on each silo's own held-out text."
    )


class TrainConfig(Section):
    """[train]: `photon train`, the centralised baseline. Defaults give equal tokens and steps."""

    batch_size: Positive | None = Field(
        default=None,
        description="Sequences per step; local.batch_size x participants of a round by default.",
    )
    lr: Annotated[float, Field(gt=0, le=1e38)] | None = Field(
        default=None, description="Peak learning rate; local.lr by default."
    )


class RunConfig(Section):
    """A whole run.toml."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig
    parts: PartsConfig = PartsConfig()
    federation: FederationConfig = FederationConfig()
    local: LocalConfig = LocalConfig()
    compute: ComputeConfig = ComputeConfig()
    outer: OuterConfig = OuterConfig()
    link: LinkConfig = LinkConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    eval: EvalConfig = EvalConfig()
    energy: EnergyConfig = EnergyConfig()
    train: TrainConfig = TrainConfig()
    serve: ServeConfig = ServeConfig()
    comply: ComplyConfig = ComplyConfig()

    def having(self, **tables: Section | dict[str, Any]) -> RunConfig:
        """With other tables, or other values of some of their keys; nothing is checked again."""
        own = {
            k: getattr(self, k).model_copy(update=v) for k, v in tables.items() if type(v) is dict
        }
        return self.model_copy(update=tables | own)

    @property
    def total_steps(self) -> int:
        """Global steps of the whole run: rounds x tau. Schedules stretch over it."""
        return self.federation.rounds * self.local.steps

    @property
    def own_jurisdictions(self) -> list[str]:
        """Federations in it that have a jurisdiction of their own."""
        children = self.federation.children.items()
        return [name for name, child in children if child.policy.jurisdiction is not None]

    @property
    def most_rounds(self) -> int:
        """Of the run: federation.rounds; buffered merges are more, each at least a global step."""
        buffered = self.federation.pace == "buffered"
        return self.total_steps if buffered else self.federation.rounds

    def quorum_of(self, participants: int) -> int:
        """Fewest good updates that close a round of so many participants."""
        quorum, least = self.federation.quorum, self.least_merged
        if quorum is None:
            return max(least, math.ceil(participants / 2))
        return max(least, min(quorum, participants))

    @property
    def least_merged(self) -> int:
        """Fewest updates that any merge is of."""
        return LEAST_SUMMED if self.privacy.secure_aggregation else 1

    @property
    def feeds_back(self) -> bool:
        """Whether nodes keep what did not leave with an update."""
        if self.privacy.secure_aggregation:
            return self.link.error_feedback is not False and not self.privacy.at_sum
        return self.link.feeds_back

    @property
    def silos_needed(self) -> int:
        """Fewest silos that must be here before a served round begins.

        With fewer than the quorum a round would be lost, or the quorum be lowered to them.
        """
        federation = self.federation
        drawn = max(federation.sample or 1, federation.quorum or 1)
        return max(self.serve.min_silos, drawn, self.least_merged)

    @model_validator(mode="after")
    def _compatible(self) -> RunConfig:
        federation, outer = self.federation, self.outer
        if federation.merge == "adopt" and (outer.name != "fedavg" or outer.lr != 1.0):
            raise ValueError(
                'federation.merge = "adopt" takes the nodes\' weights as they are, so it needs '
                f'outer.name = "fedavg" with outer.lr = 1.0 (found {outer.name!r}, {outer.lr}); '
                'use merge = "delta" with any other outer optimizer'
            )
        if federation.merge == "adopt" and not self.link.takes_weights:
            raise ValueError(
                f"link.update_codec = {self.link.update_codec!r} is for deltas, and "
                'federation.merge = "adopt" sends weights; use merge = "delta", or fp32, bf16, '
                "fp16, lowrank, each with or without zstd, and no error feedback"
            )
        self.parts.require_compatible(federation.optimizer_state, per_silo=self.eval.per_silo)
        self._check_merging()
        if why := voided(self.privacy, self) or unsummable(self):
            raise ValueError(f"[privacy]: {why}")
        if federation.sampling == "weighted" and federation.weighting == "data":
            raise ValueError(
                'federation.sampling = "weighted" draws silos by their data already, so '
                'federation.weighting = "data" would count it twice; use "tokens" or "equal" with '
                'it, or "data" with sampling = "uniform"'
            )
        sample, quorum = federation.sample, federation.quorum
        if sample is not None and quorum is not None and quorum > sample:
            raise ValueError(f"federation.quorum = {quorum} exceeds federation.sample = {sample}")
        self._check_schedule()
        self._check_optimizer()
        micro, batch = self.compute.micro_batch_size, self.local.batch_size
        if micro is not None and batch % micro:
            raise ValueError(
                f"compute.micro_batch_size = {micro} does not divide local.batch_size = {batch}"
            )
        if self.local.document_mask and self.model.preset and self.model.family == "mpt":
            raise ValueError(
                'local.document_mask = true needs model.family = "llama"; transformers\' MPT '
                "can't mask documents"
            )
        return self

    def _check_merging(self) -> None:
        federation = self.federation
        rule = federation.merging_rule
        if rule in ("clipped_mean", "edit"):
            if federation.merge == "adopt":
                raise ValueError(
                    f'federation.merging_rule = "{rule}" goes by the norm of deltas, and '
                    'federation.merge = "adopt" sends weights; use merge = "delta", or mean, '
                    "median or trimmed_mean"
                )
            if federation.optimizer_state == "average":
                raise ValueError(
                    f'federation.merging_rule = "{rule}" goes by the norm of deltas, and '
                    'federation.optimizer_state = "average" sends inner optimizer state with them; '
                    'use optimizer_state = "reset" or "keep", or another rule'
                )
        elif federation.clip_update_norm is not None:
            raise ValueError(
                "federation.clip_update_norm only means something with merging_rule = "
                f'"clipped_mean" or "edit" (found {rule!r}); max_update_norm works with any'
            )
        if rule == "clipped_mean" and federation.clip_update_norm is None:
            raise ValueError(
                'federation.merging_rule = "clipped_mean" needs federation.clip_update_norm'
            )

    def _check_schedule(self) -> None:
        local = self.local
        if local.warmup_steps >= self.total_steps and local.schedule != "constant":
            raise ValueError(
                f"local.warmup_steps = {local.warmup_steps} leaves nothing of the run's "
                f"{self.total_steps} global steps (federation.rounds x local.steps)"
            )
        if local.schedule == "wsd":
            decay = local.decay_steps
            if decay is not None and decay + local.warmup_steps > self.total_steps:
                raise ValueError(
                    f"local.warmup_steps + local.decay_steps = {local.warmup_steps + decay} "
                    f"exceeds the run's {self.total_steps} global steps"
                )
        elif local.decay_steps is not None:
            raise ValueError(
                f'local.decay_steps only means something with schedule = "wsd" '
                f"(found {local.schedule!r})"
            )

    def _check_optimizer(self) -> None:
        local, state = self.local, self.federation.optimizer_state
        if local.optimizer == "amsgrad" and state != "average":
            raise ValueError(
                'local.optimizer = "amsgrad" is FedLALR\'s: without the aggregator averaging m and '
                f'v-hat it is another method; use federation.optimizer_state = "average" (found '
                f"{state!r}), or adamw"
            )
        if local.optimizer_bits == 8 and local.optimizer not in ("adamw", "muon"):
            raise ValueError(
                f"local.optimizer_bits = 8 only means something for adamw and muon (found "
                f"{local.optimizer!r})"
            )
