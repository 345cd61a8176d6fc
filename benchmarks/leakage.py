"""What an update and a model tell of a silo's text, with each privacy option off and on.

    python benchmarks/leakage.py --text FILE.jsonl [--seeds 3] [--out FILE.md]

Two attacks, by an aggregator that keeps to the protocol and knows the run file, the weights that it
sent out and what it merged:

- inversion, of the first round, on few sequences: the rows of a layer's gradient span the inputs of
  that layer, and an input of the second layer depends on no later token. So tokens are found one
  after the other, those whose hidden state lies in that span: what DAGER does (Petrov et al. 2024,
  arXiv 2405.15586), with no search by gradients. Muon keeps the span, Adam does not. The score is
  the share of tokens found in their places, of the sequences that come out best.
- membership, of the last model: is a sequence one that a silo trained on, or one held out? By how
  much its loss fell since the first model (Yeom et al. 2018, arXiv 1709.01604, calibrated by a
  reference). The score is the area under the curve: 0.5 is guessing, 1 is certain; and the share of
  members found with 1% of others taken for some.

The cost of an option is the held-out loss of the run that the second attack is made on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from photon.config import RunConfig, parse_run_config
from photon.data import PreparedData, PrepareOptions, held_out_text, open_data, open_stream, prepare
from photon.federation.layout import initial_model
from photon.models import trainable_parameters
from photon.runs import load_weights, simulate
from trainer import machine, table

#: Largest share of a hidden state that may lie outside a span, for it to be a found one.
OUTSIDE = 0.15
#: Prefixes that are followed at a time.
WIDTH = 64


@dataclass(frozen=True)
class Option:
    """What is set beside the plain run; `silos` send to one sum."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    silos: int = 1


CLIENT = {"privacy.mechanism": "client", "privacy.clip_norm": 1.0}
RECORD = {"privacy.mechanism": "dp_sgd", "privacy.clip_norm": 1.0, "privacy.delta": 1e-5}
SEALED = {"privacy.secure_aggregation": True}
INVERSIONS = (
    Option("one silo, Muon"),
    Option("one silo, AdamW", {"local.optimizer": "adamw"}),
    Option("one silo, Muon, int8", {"link.update_codec": "int8"}),
    Option("one silo, Muon, 16 steps", {"local.steps": 16}),
    Option("secure aggregation of 4, Muon", SEALED, 4),
    Option("client, z = 0.0001", CLIENT | {"privacy.noise_multiplier": 0.0001}),
    Option("client, z = 0.001", CLIENT | {"privacy.noise_multiplier": 0.001}),
    Option("dp_sgd, epsilon 8", RECORD | {"privacy.target_epsilon": 8.0}),
)
MEMBERSHIPS = (
    Option("none"),
    Option("secure aggregation", SEALED),
    Option("client, z = 0.01", CLIENT | {"privacy.noise_multiplier": 0.01}),
    Option("dp_sgd, clip alone", RECORD | {"privacy.noise_multiplier": 0.0}),
    Option("dp_sgd, epsilon 8", RECORD | {"privacy.target_epsilon": 8.0}),
    Option("dp_sgd, epsilon 2", RECORD | {"privacy.target_epsilon": 2.0}),
)


def run_file(data: Path, settings: Mapping[str, Any]) -> RunConfig:
    """A run file of these keys, as --set has them."""
    tree: dict[str, Any] = {"model": {"preset": "tiny"}, "data": {"path": str(data)}}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return parse_run_config(tree)


def update_of(config: RunConfig, data: PreparedData, folder: Path) -> dict[str, Tensor]:
    """What the aggregator merged in the first round: one silo's update, or a sum's mean."""
    before = trainable_parameters(initial_model(config, data))
    after = trainable_parameters(load_weights(folder)[0])
    return {name: before[name].detach() - after[name].detach() for name in before}


class Spans:
    """What the gradients of the first two layers' queries, keys and values say of their inputs.

    Args:
        model: with the weights that the silo started from.
        update: what became of them.
        tokens: that went through it, as many as the span has dimensions.
    """

    def __init__(self, model: nn.Module, update: Mapping[str, Tensor], tokens: int) -> None:
        self._model = model.eval()
        self._bases = []
        for layer in (0, 1):
            name = f"model.layers.{layer}.self_attn."
            rows = torch.cat([update[f"{name}{one}_proj.weight"] for one in "qkv"]).double()
            # A layer of fewer dimensions than tokens spans all there is: nothing is told apart.
            basis = torch.linalg.svd(rows, full_matrices=False)[2]
            self._bases.append(basis[: min(tokens, len(basis))])

    def outside(self, prefixes: Tensor, layer: int) -> Tensor:
        """Of the last token's input to the layer, the share of its norm outside the span, [N].

        Args:
            prefixes: tokens [N, L].
        """
        found: list[Tensor] = []
        norm = self._model.get_submodule(f"model.layers.{layer}.input_layernorm")
        hook = norm.register_forward_hook(lambda _m, _i, out: found.append(out[:, -1]))
        with torch.no_grad(), hook:
            self._model(input_ids=prefixes)
        states = found[0].double()
        basis = self._bases[layer]
        rest = states - states @ basis.T @ basis
        return rest.norm(dim=1) / states.norm(dim=1)


def inverted(spans: Spans, vocabulary: int, length: int) -> list[list[int]]:
    """Sequences whose every prefix fits both spans, best first; empty where nothing is told."""
    distances = spans.outside(torch.arange(vocabulary)[:, None], 0)
    there = (distances < OUTSIDE).nonzero().flatten()
    # Half the vocabulary inside the span: it spans everything, or noise did it.
    if not len(there) or len(there) > vocabulary // 2:
        return []
    prefixes = there[:, None]
    for place in range(length):
        if place:
            grown = torch.cat(
                [prefixes.repeat_interleave(len(there), 0), there.repeat(len(prefixes))[:, None]], 1
            )
        else:
            grown = prefixes
        distances = torch.cat([spans.outside(part, 1) for part in grown.split(512)])
        order = distances.argsort()[:WIDTH]
        prefixes = grown[order[distances[order] < OUTSIDE]]
        if not len(prefixes):
            return []
    return prefixes.tolist()


def in_place(found: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> float:
    """Share of tokens found in their places, of each true sequence by its best match."""

    def share(one: Sequence[int], other: Sequence[int]) -> float:
        return sum(a == b for a, b in zip(one, other, strict=True)) / len(other)

    return statistics.fmean(max((share(one, seen) for one in found), default=0) for seen in true)


def inversion(data: Path, option: Option, seed: int, scratch: Path, length: int) -> float:
    """Share of one silo's tokens that the aggregator reads in one round."""
    settings = {
        "run.seed": seed,
        "data.sequence_length": length,
        "federation.rounds": 1,
        "federation.optimizer_state": "reset",
        "local.steps": 1,
        "local.batch_size": 2,
        "local.optimizer": "muon",
        "local.lr": 0.01,
        "local.warmup_steps": 0,
        "local.schedule": "constant",
        "local.weight_decay": 0.0,
        "eval.every": 0,
        "eval.max_tokens": 1000,
        "compute.threads": 1,
        **option.settings,
    }
    config = run_file(data, settings)
    prepared = open_data(config.data.path)
    simulate(config, run_dir=scratch)
    silos = sorted(prepared.silos)
    tokens = length * config.local.steps * config.local.batch_size * len(silos)
    with open_stream(config, prepared, silos[:1]) as stream:
        # The last token of a window is a target only.
        true = stream.batch(0, config.local.batch_size)[:, :length].tolist()
    update = update_of(config, prepared, scratch)
    spans = Spans(initial_model(config, prepared), update, tokens)
    return in_place(inverted(spans, prepared.vocab_size, length), true)


def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of each window, [N]."""
    with torch.no_grad():
        parts = [
            nn.functional.cross_entropy(
                model.eval()(input_ids=part[:, :-1]).logits.transpose(1, 2),
                part[:, 1:],
                reduction="none",
            ).mean(1)
            for part in windows.split(32)
        ]
    return torch.cat(parts)


def membership(
    data: Path, option: Option, seed: int, scratch: Path, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Area under the curve, members found at 1% of others, held-out loss of the last model."""
    settings = {
        "run.seed": seed,
        "data.sequence_length": options.length,
        "federation.rounds": options.rounds,
        "federation.optimizer_state": "keep",
        "local.steps": options.steps,
        "local.batch_size": options.batch,
        "local.optimizer": "muon",
        "local.lr": options.lr,
        "local.warmup_steps": options.steps // 2,
        "eval.every": 0,
        "eval.max_tokens": 20_000,
        "compute.threads": 1,
        **option.settings,
    }
    config = run_file(data, settings)
    prepared = open_data(config.data.path)
    summary = simulate(config, run_dir=scratch).summary
    first, last = initial_model(config, prepared), load_weights(scratch)[0]
    members = []
    for silo in sorted(prepared.silos):
        with open_stream(config, prepared, [silo]) as stream:
            members.append(torch.as_tensor(stream.batch(0, options.batch * options.steps)).long())
    others = torch.tensor(
        [
            window.tokens.tolist()
            for window in held_out_text(prepared, None).windows(options.length, 10**6)
            if len(window.tokens) == options.length + 1
        ]
    ).long()
    fell = [losses(first, part) - losses(last, part) for part in (torch.cat(members), others)]
    area = (fell[0][:, None] > fell[1]).double().mean().item()
    found = (fell[0] > torch.quantile(fell[1], 0.99)).double().mean().item()
    return area, found, summary["global_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="JSONL with text, a file or a folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="tau")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="of a sequence, for membership")
    parser.add_argument("--bytes", type=int, default=150_000, help="of text, for membership")
    parser.add_argument("--lr", type=float, default=0.012)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.steps = 1, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        text = measured(options, Path(folder))
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


def little(text: str, file: Path, size: int) -> Path:
    """The beginnings of so many texts, 400 characters each, that they have `size` bytes."""
    with file.open("w", encoding="utf-8") as out:
        for path in sorted(Path(text).glob("*.jsonl") if Path(text).is_dir() else [Path(text)]):
            for line in path.open(encoding="utf-8"):
                piece = json.loads(line)["text"][:400]
                if (size := size - len(piece.encode())) < 0:
                    return file
                out.write(json.dumps({"text": piece}) + "\n")
    return file


def measured(options: argparse.Namespace, scratch: Path) -> str:
    """Both tables."""
    data = {}
    few_texts = little(options.text, scratch / "little.jsonl", options.bytes)
    for name, text, silos in ((1, options.text, 1), (4, options.text, 4), ("little", few_texts, 4)):
        data[name], held_out = scratch / f"data-{name}", 0.25 if name == "little" else 0.01
        cut = {"iid": silos, "vocab_size": 1024, "global_fraction": held_out}
        prepare(PrepareOptions(input=str(text), out=data[name], **cut))
    seeds = range(1, options.seeds + 1)
    few, rows = 12, []
    for number, option in enumerate(INVERSIONS):
        read = [
            inversion(data[option.silos], option, seed, scratch / f"i{number}-{seed}", few)
            for seed in seeds
        ]
        rows.append((option.name, spread([100 * one for one in read], "%")))
    text = f"# What leaves tells of a silo's text, {machine()}\n\n"
    text += (
        f"Tiny Llama (1 M parameters, width 128), vocabulary 1,024, {options.seeds} seeds, mean ± "
        "standard deviation.\n\n## Inversion\n\nOne round of one step on 2 sequences of "
        f"{few} tokens unless said; tokens of the first silo that are found in their places.\n\n"
    )
    text += table(("option", "tokens read"), rows)
    rows, plain = [], math.nan
    for number, option in enumerate(MEMBERSHIPS):
        found = [
            membership(data["little"], option, seed, scratch / f"m{number}-{seed}", options)
            for seed in seeds
        ]
        areas, at_one, loss = zip(*found, strict=True)
        mean = statistics.fmean(loss)
        plain = mean if math.isnan(plain) else plain
        rows.append(
            (
                option.name,
                spread(areas, ""),
                spread([100 * one for one in at_one], "%"),
                spread(loss, ""),
                f"{math.exp(mean):.1f}",
                f"{100 * (math.exp(mean - plain) - 1):+.0f}%",
            )
        )
    tokens = options.rounds * options.steps * options.batch * options.length
    text += (
        f"\n\n## Membership\n\nFour silos, {options.rounds} rounds of tau = {options.steps}, "
        f"{options.batch} x {options.length} tokens a step, {tokens:,} tokens a silo, Muon at "
        f"{options.lr:g}. Members: sequences of each silo's first {options.steps} steps; others: "
        "held out.\n\n"
    )
    heads = ("option", "area under the curve", "found at 1% false", "held-out loss")
    return text + table((*heads, "perplexity", "dearer by"), rows) + "\n"


def spread(values: Sequence[float], unit: str) -> str:
    """Mean and standard deviation."""
    digits = 1 if unit else 3
    told = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        told += f" ± {statistics.stdev(values):.{digits}f}"
    return told + unit


if __name__ == "__main__":
    main()
